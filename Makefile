# Every target sets itself up in .venv, under constraints.txt; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the tests run as two workers.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The oldest that pyproject.toml takes; it lies beside the environment's own, and comes first on the path when asked for.
OLDEST_TRITON := 3.6.0
OLDEST_FOLDER := $(CURDIR)/build/triton-$(OLDEST_TRITON)
RESULTS ?= bench/results/cpu/results.json
BASE ?= HEAD

.PHONY: demo test test-all test-oldest-triton check bench report bench-compare audit mutate clean

demo: $(VENV)/.run
	$(BIN)/fastvae demo demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

test-all: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q -m "slow or not slow"

# The kernels' tests under the interpreter of the oldest Triton; one to five minutes.
test-oldest-triton: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	PYTHONPATH=$(OLDEST_FOLDER) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	PYTHONPATH=$(OLDEST_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/ops

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Ops, encoder, decoder and a folder of photographs beside their rivals, then the tables; within ten minutes.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench -q -rfE -p no:logging --results $(RESULTS)
	$(BIN)/python bench/tables.py

# README's and docs/performance.md's tables, from bench/results.
report: $(VENV)/.dev
	$(BIN)/python bench/tables.py

# This tree beside the commit BASE, in turns; red where an op or the encoder became slower.
bench-compare: $(VENV)/.bench
	$(BIN)/python bench/compare.py $(BASE)

# Compiles every kernel for six targets under two Tritons; up to half an hour with a cold Triton cache.
audit: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	$(BIN)/python bench/audit.py

# Every small wrong change in the list must turn a test red; about seven minutes.
mutate: $(VENV)/.dev
	$(BIN)/python bench/mutate.py

clean:
	rm -rf $(VENV) $(OLDEST_FOLDER) demo .pytest_cache .ruff_cache *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: with a looser wish pip may choose a build with gigabytes of CUDA libraries.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

$(OLDEST_FOLDER)/.done: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) triton==$(OLDEST_TRITON)
	touch $@
