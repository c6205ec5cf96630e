# Each target sets up what it needs: a virtual environment in .venv and the package with its tools in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

STEPS ?= 20

.PHONY: help setup test cluster lint demo verify clean

help:
	@echo 'make test    lint, type check and run all tests but the next'
	@echo 'make cluster the tests of launchers, faults, several hosts and SLURM (the last two need root)'
	@echo 'make demo    train digits at batch 32 and at batch 512 with LARS, and compare'
	@echo 'make verify  prove that the recipes are the same run in every layout (STEPS=$(STEPS))'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make setup   the virtual environment alone (PYTHON=$(PYTHON), VENV=$(VENV))'
	@echo 'make clean   remove the virtual environment, caches and demo runs'

setup: $(READY)

# The stamp is written last, so that an install that broke off is done again; an environment that works is kept.
$(READY): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || (set -x; $(PYTHON) -m venv --clear $(VENV))
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

test: lint
	$(BIN)/python -m pytest

cluster: $(READY)
	$(BIN)/python -m pytest -m cluster

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh

verify: $(READY)
	@for recipe in configs/digits/*_*.yaml configs/fashion_mnist/*_*.yaml $(if $(wildcard runs/data/kjv.txt),configs/kjv/*_*.yaml); do \
		$(BIN)/bigbatch verify $$recipe --steps $(STEPS) || exit 1; \
	done

clean:
	rm -rf $(VENV) runs/demo .mypy_cache .pytest_cache .ruff_cache
