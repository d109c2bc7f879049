# `make help` lists the targets. Variables that may be overridden:
#   VENV=/path/to/venv   use an environment that exists already (nothing is installed into it)
#   PY=python3.12        the Python that .venv is made from
#   PYTHON=python3       the Python of `make gpu`, used as it is
#   ARGS="..."           appended: overrides for demo, options of pytest for the tests
#   WORKERS=2            processes of the tests
#   MINUTES=4            of the benchmark of `make gpu`, after which no further row is begun
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY ?=
PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 4
ARGS ?=
VENV ?= .venv

# An environment that the caller named is the caller's: it is checked, never installed into.
ifeq ($(VENV),.venv)
  ENVIRONMENT := .venv/.installed
else
  ENVIRONMENT := check-venv
endif

BIN := $(abspath $(VENV))/bin
# So that a package that is not installed (VENV=..., make gpu) is found by the processes the tests start.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# One thread a process: the tests run as many processes as there are cores. Freed memory is kept, as the commands do.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483647

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------- use
.PHONY: demo
demo: $(ENVIRONMENT) ## set up, train on the digits with the defaults, evaluate, show the table (ARGS="defense=trades")
	@$(BIN)/python -m mi_at.train $(ARGS)

.PHONY: install
install: $(ENVIRONMENT) ## make .venv and install what pyproject.toml and constraints.txt say

# ---------------------------------------------------------------- checks
.PHONY: test
test: lint types contracts ## set up, then lint, types, contracts and every test that takes seconds
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: test-slow
test-slow: $(ENVIRONMENT) ## the tests that take minutes: the wheel, the notebooks, whole runs
	@$(ONE_THREAD) $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

.PHONY: mutants
mutants: $(ENVIRONMENT) ## plant wrong signs and factors one by one; each must make a test fail (ARGS="namid trades")
	@$(ONE_THREAD) $(BIN)/python -m tests.mutants $(ARGS)

.PHONY: test-all
test-all: test test-slow ## both of the above

.PHONY: lint
lint: $(ENVIRONMENT) ## ruff: rules and format, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: format
format: $(ENVIRONMENT) ## ruff: mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: types
types: $(ENVIRONMENT) ## mypy over mi_at
	@$(BIN)/mypy

.PHONY: contracts
contracts: $(ENVIRONMENT) ## import-linter: who may import whom
	@$(BIN)/lint-imports --no-cache

.PHONY: habits
habits: $(ENVIRONMENT) ## file sizes, notebook outputs, pins: tests/test_habits.py alone
	@$(BIN)/python -m pytest -q tests/test_habits.py

.PHONY: hooks
hooks: $(ENVIRONMENT) ## run the checks of .pre-commit-config.yaml before every commit
	@$(BIN)/pre-commit install

# ---------------------------------------------------------------- speed
.PHONY: bench
bench: $(ENVIRONMENT) ## the step benchmark, side by side with plain loops and peers
	@$(BIN)/python benchmarks/step.py $(ARGS)

.PHONY: tables
tables: $(ENVIRONMENT) ## write the README's tables anew from the records in results/
	@$(BIN)/python -m mi_at.results.readme

# No environment is made: it runs with the Python that is there, and files of gpu tests import nothing optional.
.PHONY: gpu
gpu: ## the tests marked gpu and the step benchmark, with the Python that is there (PYTHON=python3)
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "make gpu: $(PYTHON) has no PyTorch; name one that has: make gpu PYTHON=..."; exit 1; }
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PYTHON) -c 'import sys, torch; print("make gpu:", torch.cuda.get_device_name(), "- torch", torch.__version__, "- Python", sys.version.split()[0])'; \
	  files=$$(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests || true); \
	  if [ -n "$$files" ]; then $(PYTHON) -m pytest -m gpu $$files $(ARGS); else echo "make gpu: no test is marked gpu"; fi; \
	  $(PYTHON) benchmarks/step.py --gpu --minutes $(MINUTES); \
	else \
	  echo "make gpu: no GPU here ($(PYTHON), torch.cuda.is_available() is False); nothing was run."; \
	fi

# ---------------------------------------------------------------- house-keeping
.PHONY: constraints
constraints: $(ENVIRONMENT) ## write constraints.txt anew from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | LC_ALL=C sort -f; } > constraints.tmp
	@mv constraints.tmp constraints.txt

.PHONY: clean
clean: ## remove caches and build leftovers (not .venv, not runs)
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache constraints.tmp
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- the environment
.PHONY: check-venv
check-venv:
	@test -x $(BIN)/python || { echo "VENV=$(VENV): no $(VENV)/bin/python there; leave VENV out to have .venv made"; exit 1; }

# The stamp is written last, so an interrupted installation is taken up again by the next make.
.venv/.installed: pyproject.toml constraints.txt
	@.ci/setup "$(PY)"
	@touch $@
