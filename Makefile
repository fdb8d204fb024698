# The two commands of the README, and what a release asks on top. Each makes .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
SHELL  := bash

.PHONY: help install repro test test-slow release bases clean

help:            ## what there is
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(VENV)/.installed   ## a virtual environment with exact versions

# torch first and torchvision without its dependencies: otherwise pip resolves both to the newest CUDA builds
$(VENV)/.installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v.major}.{v.minor} is too old: 3.11 or newer is needed, e.g. make install PYTHON=python3.12" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps torchvision
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 > /dev/null
	touch $@

repro: install   ## train SPAR in miniature and evaluate it: everything, from a clone to the tables
	dvc pull -q -r store data.dvc
	dvc repro

test: install    ## notebooks clean and in sync, nbdev_test, pytest
	tests/check.sh

test-slow: install   ## what takes longer: stages on two processes, killed and continued
	tests/check.sh slow

release: test test-slow   ## the same, and every stage of the lock up to date
	@stale=$$(dvc status -q dvc.yaml || echo stale); [ -z "$$stale" ] || { echo 'The lock is not in sync: run `dvc repro` and commit.'; dvc status dvc.yaml; exit 1; }
	@test -z "$$(git status --porcelain)" || { echo 'Uncommitted changes.'; exit 1; }

bases: install   ## train the miniature backbones again (hours on two cores); `spar stage promote --bases` ships them
	for name in perceptual dcae judge mllm sana; do spar stage $$name --bases || exit 1; done

clean:           ## what runs left behind (artifacts stay)
	rm -rf runs build *.egg-info .pytest_cache
