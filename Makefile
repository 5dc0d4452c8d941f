SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-with-ray test-without-ray test-cluster check bench install

# The main job on one machine, with embedded defaults: facts change in a running model.
demo: $(INSTALLED)
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

# The tests that start Ray are one after the other; the rest run beside them, a thread each.
RAY_TESTS := tests/e2e tests/faults tests/integration/test_replica.py tests/integration/test_training.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-with-ray test-without-ray

test-with-ray: $(INSTALLED)
	$(PYTEST) $(RAY_TESTS) | sed --unbuffered 's/^/with Ray: /'

test-without-ray: $(INSTALLED)
	$(PYTEST) $(addprefix --ignore=,$(RAY_TESTS) tests/cluster) | sed --unbuffered 's/^/without: /'

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
