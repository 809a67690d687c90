# make run ARGS="sp.size=4 zero.stage=3" | make test | make setup | make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: of 17,000 modules a few hundred are ever imported
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: run test test-long test-gpu setup lint bench audit wheels
run: setup
	@$(BIN)/python run.py $(ARGS)

test: setup
	@$(BIN)/python -m pytest

test-long: setup # one after another: some look at what is left on the machine
	@$(BIN)/python -m pytest -m long -n 0

test-gpu: # where there is a GPU; perhaps without a network, so nothing is set up
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pytest -m gpu -n 0

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

bench: setup
	@$(BIN)/python benchmarks/speed.py

wheels: setup # what a machine lacks that has torch and transformers, and no network: docs/gpu.md
	@$(BIN)/python benchmarks/gpu_wheels.py

audit:
	@PYTHON="$(PYTHON)" .ci/audit

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) has no venv; install it (Debian: apt install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing the pinned dependencies (once)"
	@$(PIP) torch
	@$(PIP) -e '.[dev,hub,dashboard,slurm,optuna]'
	@touch $(STAMP)
