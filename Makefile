SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-first test-second test-cluster check bench install

# The main job on one machine, with embedded defaults: facts change in a running model.
demo: $(INSTALLED)
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

# Two lanes, a thread each; in each the tests that start Ray come one after the other.
FIRST_LANE := tests/e2e tests/faults tests/integration/test_training.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-first test-second

test-first: $(INSTALLED)
	$(PYTEST) $(FIRST_LANE) --ignore=tests/faults/test_two_clusters.py | sed --unbuffered 's/^/first: /'

test-second: $(INSTALLED)
	$(PYTEST) $(addprefix --ignore=,$(FIRST_LANE) tests/cluster) | sed --unbuffered 's/^/second: /'
	$(PYTEST) tests/faults/test_two_clusters.py | sed --unbuffered 's/^/second: /'

# A Ray cluster of machines in network namespaces: takes root, iproute2, redis-server, and a machine
# that does nothing else meanwhile.
test-cluster: $(INSTALLED)
	$(PYTEST) tests/cluster

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
