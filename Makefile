# make demo       train, sample and evaluate a small model on handwritten digits
# make test       the whole test suite
# make test-newest  a part of it on the newest Python here, with the newest JAX
# make test-faults  stops and damages runs in many more ways
# make lint       style
# make types      mypy
# make docs       the site, in build/docs: docs/, notebooks, docstrings; links are checked
# make notebooks  runs the notebooks anew, with their outputs
# make test-notebooks  runs them with few steps of everything
# make tutorial   trains small models and draws the figures of docs/tutorial.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO := configs/vp/digits.py
# Networks and samplers by golden numbers, a likelihood, FID, XLA's flags, runs that are stopped.
SOME := tests/models/test_golden_networks.py tests/test_golden_sde.py tests/test_likelihood.py \
  tests/samplers/test_samplers.py tests/evaluation/test_metrics.py tests/runtime/test_start.py \
  tests/training/test_loop.py tests/run_lib/test_run.py

.PHONY: demo test test-newest test-some test-faults lint types docs notebooks test-notebooks tutorial

demo: $(VENV)/installed
	$(BIN)/python main.py --config $(DEMO) --mode train
	$(BIN)/python main.py --config $(DEMO) --mode stats
	$(BIN)/python main.py --config $(DEMO) --mode eval
	@echo
	@echo "Samples:       $$(ls -t runs/vp/digits/eval/step_*/samples.png | head -n 1)"
	@echo 'The whole run: runs/vp/digits/index.html'
	@echo 'Next:'
	@echo '  $(BIN)/python main.py --config $(DEMO) --mode sample --config.sampling.trajectory'
	@echo '  $(BIN)/python main.py --config configs/vp/digits_conditional.py --mode train'
	@echo '  $(BIN)/python main.py --config configs/vp/photos.py --mode train --config.data.path=PHOTOS'

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# In .venv/newest; where there is no newer Python than that of .venv, there is nothing to do.
test-newest:
	@python=$$(scripts/newest_python.sh); if [ -z "$$python" ]; then \
	  echo 'There is no Python 3.12 or 3.13 here that works: the newest JAX is not tested.'; \
	else $(MAKE) VENV=.venv/newest PYTHON="$$python" lint test-some; fi

test-some: $(VENV)/installed-dev
	$(BIN)/python -c 'import sys, jax, numpy; print("Python", *sys.version_info[:2], "JAX", jax.__version__, "NumPy", numpy.__version__)'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SOME)

test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/run_lib/test_faults.py tests/run_lib/test_cifar10_fast.py \
	  -m "slow or not slow" --kills 50 -rP

test-notebooks: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/test_notebooks.py -m "slow or not slow"

tutorial: $(VENV)/installed-dev
	$(BIN)/python -m tutorial

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/sphinx-build -c docs --fail-on-warning --keep-going --quiet -j 2 . build/docs

# The digits are trained anew: a run that is there would have nothing left to do.
notebooks: $(VENV)/installed-dev
	rm -rf runs/notebooks
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, and this is %d.%d; try make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) -r requirements-dev.txt
	@touch $@
