# make demo       train, sample and evaluate a small model on handwritten digits
# make test       the whole test suite
# make test-faults  stops and damages runs in many more ways
# make lint       style
# make types      mypy
# make docs       the docstrings as pages, in build/docs
# make tutorial   trains small models and draws the figures of docs/tutorial.md

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO := configs/vp/digits.py

.PHONY: demo test test-faults lint types docs tutorial

demo: .venv/installed
	$(BIN)/python main.py --config $(DEMO) --mode train
	$(BIN)/python main.py --config $(DEMO) --mode stats
	$(BIN)/python main.py --config $(DEMO) --mode eval

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/run_lib/test_faults.py -m "slow or not slow" --kills 50 -rP

tutorial: .venv/installed-dev
	$(BIN)/python -m tutorial

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m pdoc --math --docformat google --output-directory build/docs \
	  $(filter-out main page,$(basename $(wildcard *.py))) models

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, and this is %d.%d; try make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	@touch $@
