#!/usr/bin/env bash
# What `make test` does, in the order in which failures are cheapest. Runs inside the environment that make has activated.
# `check.sh slow` is `make test-slow`: the tests that start several processes and kill them, and that install the wheel.
# `check.sh lint`, `notebooks` and `pytest` are its parts, which CI runs beside each other.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step() { printf '\n== %s\n' "$*"; }
unchanged() {   # unchanged WHAT CMD...: running CMD must not change a tracked or untracked file
  local before after what=$1; shift
  before=$(git status --porcelain; git diff | sha256sum)
  "$@" > /dev/null
  after=$(git status --porcelain; git diff | sha256sum)
  [ "$before" = "$after" ] || { echo "$what: out of date. Run it and commit:"; git status --short; exit 1; }
  echo "$what: in sync"
}

lint() {
  step "Ruff and mypy"
  ruff check .
  mypy
  step "Notebooks are clean, modules and README follow from them"
  unchanged "nbdev_clean"  nbdev_clean
  unchanged "nbdev_export" nbdev_export
  unchanged "README.md"    python tools/readme.py
}
notebooks() {
  step "Every notebook runs"
  nbdev_test --n_workers 2 --do_print --timing
}
tests() {
  step "Tests"
  [ -d data/bases ] || dvc pull -q -r store data.dvc      # tests/test_golden.py trains on the backbones
  python -m pytest -q tests -m 'not slow' -n 2 --dist loadfile
}

slow() {
  step "Slow tests"
  python -m pytest -q tests -m slow
}

case "${1:-}" in
  lint|notebooks|slow) "$1"; exit ;;
  pytest) tests; exit ;;
  '') lint; notebooks; tests ;;
  *) echo "check.sh: unknown '$1'; allowed: lint, notebooks, pytest, slow, or nothing for all but slow."; exit 1 ;;
esac

step "The pipeline's lock"
if [ -f dvc.lock ]; then
  stale=$(dvc status --json dvc.yaml 2>/dev/null | python -c 'import json, sys; print(" ".join(sorted(k for k in json.load(sys.stdin) if not k.endswith(".dvc"))))')
  [ -z "$stale" ] && echo "every stage is up to date" || echo "stale stages (dvc repro would run them): $stale"
fi
