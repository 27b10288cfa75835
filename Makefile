# make demo and make test set up everything they need, in .venv.

PYTHON ?= python3
VENV := .venv
RUN = $(VENV)/bin/python
READY := $(VENV)/.ready
WHEELS := .gpu-wheels
# Whether one answers: asks for a wheel of some kilobytes.
INDEX = $(PYTHON) -m pip download -q --no-deps --no-cache-dir --retries 0 -d "$$(mktemp -d)" iniconfig

# Only here: in an environment of the user's own, nothing is pinned.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest test-slow test-gpu gpu gpu-wheels coverage lint clean

help:
	@echo "make demo       train, evaluate and draw a small Mask R-CNN (about 5 minutes)"
	@echo "make test       the tests (under 10 minutes on 2 cores)"
	@echo "make test-lowest  the same with the lowest versions of all that is required, in .venv-lowest"
	@echo "make coverage   the tests, and which lines they reach"
	@echo "make test-slow  the tests that take longer, or need PyPI"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make gpu        all that is measured on a GPU, in at most 5 minutes, or in parts: PARTS=\"step compile\""
	@echo "make gpu-wheels what that needs where there is no network"
	@echo "make lint       ruff and the floors, as the tests run them"
	@echo "make setup      only set up .venv"
	@echo "make clean      remove .venv, output/ and the demo's dataset"

setup: $(READY)

demo: $(READY)
	@$(RUN) tools/demo.py

# Most tests are too small for threads: processes of one thread each, files apart.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(READY)
	@if $(RUN) -c 'import importlinter, mypy, ruff' 2>/dev/null; then \
	    $(RUN) -m ruff check -q . && $(RUN) -m ruff format -q --check . && \
	    { $(VENV)/bin/lint-imports --verbose >/dev/null || $(VENV)/bin/lint-imports; } && \
	    $(RUN) -m mypy; \
	else \
	    echo "ruff, mypy or import-linter is not installed: the tests alone"; \
	fi
	$(PYTEST)

# Without birder, whose own bounds are higher: the tests that compare with it are left out.
test-lowest: VENV := .venv-lowest
test-lowest:
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) tests/support/lowest_requirements.py >$(VENV)/lowest.txt
	PIP_CONSTRAINT=$(VENV)/lowest.txt $(RUN) -m pip install -q -e '.[test]'
	PIP_CONSTRAINT=$(VENV)/lowest.txt $(RUN) tools/install_detectron2.py
	$(PYTEST)

coverage: $(READY)
	$(PYTEST) --cov=rope_vit_det --cov-report=term:skip-covered

test-slow: $(READY)
	$(RUN) -m pytest -q -m slow
	$(RUN) -m pytest -q tests/properties --hypothesis-profile=thorough

test-gpu: $(READY)
	$(RUN) -m pytest -q -n0 tests/gpu

# DRY_RUN=1: on the CPU, at tiny sizes.
gpu: $(READY)
	@$(RUN) -m projects.benchmark.gpu $(if $(PARTS),--parts $(PARTS)) $(if $(DRY_RUN),--dry-run)

# HAS=file: what `pip list --format=freeze` prints on the machine with the GPU.
gpu-wheels: $(READY)
	@$(RUN) projects/benchmark/gpu_wheels.py $(if $(HAS),--has $(HAS))

lint: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) .venv-lowest output datasets/rope_vit_det_demo

# Written last, so that a set-up which was interrupted is done again.
$(READY): pyproject.toml setup.py constraints.txt tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	    "error: this is Python %d.%d; name one from 3.11 to 3.13: make PYTHON=python3.11" % v)'
	@if test -d $(WHEELS) && ! $(INDEX) >/dev/null 2>&1; then \
	    echo "=== No package index answers: $(VENV) from $(WHEELS), over what $(PYTHON) has"; \
	    $(PYTHON) projects/benchmark/gpu_wheels.py --install $(VENV); \
	else \
	    echo "=== Setting up $(VENV): the first time, PyTorch and more, some gigabytes, are downloaded"; \
	    { test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
	        { echo "error: no virtual environment; on Debian: apt-get install python3-venv"; \
	          rm -rf $(VENV); exit 1; }; } && \
	    $(RUN) -m pip install --disable-pip-version-check -e '.[dev]' && \
	    $(RUN) tools/install_detectron2.py; \
	fi
	@touch $@
