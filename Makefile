SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-with-ray test-without-ray check bench install

# The main job on one machine, with embedded defaults: facts change in a running model.
demo: $(INSTALLED)
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

# The tests that start Ray are one after the other; the rest run beside them, a thread each.
RAY_TESTS := tests/e2e tests/faults tests/integration/test_replica.py tests/integration/test_training.py

test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-with-ray test-without-ray

test-with-ray: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(RAY_TESTS) | sed --unbuffered 's/^/with Ray: /'

test-without-ray: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(addprefix --ignore=,$(RAY_TESTS)) | sed --unbuffered 's/^/without: /'

# In CI files are checked, not rewritten.
check: $(INSTALLED)
	$(BIN)/ruff format $(if $(CI),--check)
	$(BIN)/ruff check $(if $(CI),,--fix)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

install: $(INSTALLED)

# torch comes first and by exact version: a looser requirement may choose a build for other hardware.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
