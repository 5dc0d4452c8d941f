SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-with-ray test-beside-it check bench install

# The main job on one machine, with embedded defaults: facts change in a running model.
demo: $(INSTALLED)
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

# The tests that start Ray on this machine are one after the other. The rest run beside them, a
# thread each: those without Ray, then those of a cluster of machines in network namespaces.
RAY_TESTS := tests/e2e tests/faults tests/integration/test_replica.py tests/integration/test_training.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-with-ray test-beside-it

test-with-ray: $(INSTALLED)
	$(PYTEST) $(RAY_TESTS) | sed --unbuffered 's/^/with Ray: /'

test-beside-it: $(INSTALLED)
	$(PYTEST) $(addprefix --ignore=,$(RAY_TESTS) tests/cluster) | sed --unbuffered 's/^/without: /'
	$(PYTEST) tests/cluster | sed --unbuffered 's/^/cluster: /'

# In CI files are checked, not rewritten.
check: $(INSTALLED)
	$(BIN)/ruff format $(if $(CI),--check)
	$(BIN)/ruff check $(if $(CI),,--fix)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

install: $(INSTALLED)

# As in the images.
$(INSTALLED): pyproject.toml constraints.txt docker/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) docker/install.sh dev
	touch $@
