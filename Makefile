# Every target sets itself up in .venv, under constraints.txt; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the tests run as two workers.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-all check bench audit mutate clean

demo: $(VENV)/.run
	$(BIN)/fastvae demo demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

test-all: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q -m "slow or not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	$(BIN)/python bench/encode_folder.py --json bench/results/cpu/encode_folder.json
	$(BIN)/python bench/tables.py

# Compiles every kernel for six targets; a quarter of an hour with a cold Triton cache.
audit: $(VENV)/.dev
	env -u TRITON_INTERPRET $(BIN)/python bench/audit.py

# Every small wrong change in the list must turn a test red; about seven minutes.
mutate: $(VENV)/.dev
	$(BIN)/python bench/mutate.py

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache *.egg-info

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
