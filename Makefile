SHELL := /bin/bash -o pipefail
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The service is many processes that import the same modules: each is compiled once, by the first.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-whole test-parts test-cluster check bench install

# The main job on one machine, with embedded defaults: facts change in a running model.
demo: $(INSTALLED)
	$(BIN)/python -m deploy.demo $(if $(KEEP),--keep)

# Tests of the whole service beside those of its parts, a core and a thread each. Ray's workers would
# give way to whatever else runs: here that is the other tests.
WHOLE := tests/e2e tests/faults
PYTEST := RAY_worker_niceness=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=20

test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 test-whole test-parts

test-whole: $(INSTALLED)
	$(PYTEST) $(WHOLE) | sed --unbuffered 's/^/whole: /'

test-parts: $(INSTALLED)
	$(PYTEST) $(addprefix --ignore=,$(WHOLE) tests/cluster) | sed --unbuffered 's/^/parts: /'

# Ray clusters of machines in network namespaces: takes half an hour, root, iproute2, redis-server,
# and a machine that does nothing else meanwhile.
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

# As in the images, but that modules are compiled when they are first imported.
$(INSTALLED): pyproject.toml constraints.txt docker/install.sh
	PIP_COMPILE=0 PYTHON=$(PYTHON) VENV=$(VENV) docker/install.sh dev
	touch $@
