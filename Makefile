# Every target sets itself up in .venv, under constraints.txt; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the tests run as two workers.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The oldest that pyproject.toml takes; it lies beside the environment's own, and comes first on the path when asked for.
OLDEST_TRITON := 3.6.0
OLDEST_FOLDER := $(CURDIR)/build/triton-$(OLDEST_TRITON)
OLDEST_DIFFUSERS := 0.38.0
DIFFUSERS_FOLDER := $(CURDIR)/build/diffusers-$(OLDEST_DIFFUSERS)
# Hugging Face's loader of kernels: one test needs it.
INTEGRATIONS := kernels==0.17.2
INTEGRATIONS_FOLDER := $(CURDIR)/build/integrations
# Coverage-guided fuzzing; its wheels are for few Pythons, so it lies beside the environment too.
ATHERIS := atheris==3.0.0
FUZZ_FOLDER := $(CURDIR)/build/fuzz
FUZZ_SECONDS ?= 60
FUZZ_PARSERS ?= config index weights record plan facts shard lease manifest archive table structure image
RESULTS ?= bench/results/cpu/results.json
BASE ?= HEAD

.PHONY: demo test test-all test-oldest-triton test-oldest-diffusers test-diffusers test-integrations fuzz check bench report bench-compare audit mutate clean

demo: $(VENV)/.run
	$(BIN)/fastvae demo demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

test-all: $(VENV)/.dev test-oldest-diffusers
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q -m "slow or not slow"

# The kernels' tests under the interpreter of the oldest Triton; one to five minutes.
test-oldest-triton: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	PYTHONPATH=$(OLDEST_FOLDER) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	PYTHONPATH=$(OLDEST_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/ops

# What swapping in promises, on the oldest diffusers; about a minute.
test-oldest-diffusers: $(VENV)/.dev $(DIFFUSERS_FOLDER)/.done
	PYTHONPATH=$(DIFFUSERS_FOLDER) $(BIN)/python -c "import diffusers as d; assert d.__version__ == '$(OLDEST_DIFFUSERS)', d"
	PYTHONPATH=$(DIFFUSERS_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/swap_in

# diffusers' own tests of AutoencoderKL, each model accelerated: make test-diffusers DIFFUSERS=<a checkout of its sources>
test-diffusers: $(VENV)/.dev
	@test -d "$(DIFFUSERS)/tests/models" || { echo "DIFFUSERS must name a checkout of diffusers, got '$(DIFFUSERS)'"; exit 2; }
	cd $(DIFFUSERS) && PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests $(ONE_THREAD) HF_HUB_OFFLINE=1 \
		$(CURDIR)/$(BIN)/python -m pytest -q -p swap_in.everywhere tests/models/autoencoders/test_models_autoencoder_kl.py

# The exported kernels in Hugging Face's own loader; half a minute.
test-integrations: $(VENV)/.dev $(INTEGRATIONS_FOLDER)/.done
	PYTHONPATH=$(INTEGRATIONS_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -q tests/examples/test_export_kernels.py

# Every parser of ours under bytes that nobody should write: by Hypothesis, then by atheris for FUZZ_SECONDS each. What
# is found is left in build/fuzz, and ends this.
fuzz: $(VENV)/.dev $(FUZZ_FOLDER)/.done
	FUZZ_EXAMPLES=2000 $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/fuzz
	cd $(FUZZ_FOLDER) && for parser in $(FUZZ_PARSERS); do echo "$$parser"; \
		PYTHONPATH=$(FUZZ_FOLDER) $(ONE_THREAD) $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz/guided.py $$parser \
			-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=20 -verbosity=0 -print_final_stats=1 || exit 1; done

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Times ops, encoder, decoder and a folder of photographs beside their rivals, profiles both networks, then writes the
# tables; at most ten minutes.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench -q -rfE -p no:logging --results $(RESULTS)
	$(BIN)/python -m bench.pages.tables

# README's and docs/performance.md's tables and pictures, from bench/results.
report: $(VENV)/.dev
	$(BIN)/python -m bench.pages.tables

# This tree beside the commit BASE, in turns; red where an op or the encoder became slower.
bench-compare: $(VENV)/.bench
	$(BIN)/python -m bench.timing.regressions $(BASE)

# Compiles every kernel for six targets under two Tritons; up to half an hour with a cold Triton cache.
audit: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	$(BIN)/python -m bench.kernels.audit

# Every small wrong change in the list must turn a test red; about seven minutes.
mutate: $(VENV)/.dev
	$(BIN)/python -m bench.kernels.mutate

clean:
	rm -rf $(VENV) $(OLDEST_FOLDER) $(DIFFUSERS_FOLDER) $(INTEGRATIONS_FOLDER) $(FUZZ_FOLDER) demo .pytest_cache .ruff_cache *.egg-info

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

# httpx and what it needs come with it: newer ones have another client.
$(DIFFUSERS_FOLDER)/.done: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) diffusers==$(OLDEST_DIFFUSERS) \
		httpx==0.28.1 httpcore==1.0.9 h11==0.16.0
	touch $@

$(FUZZ_FOLDER)/.done: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) $(ATHERIS)
	touch $@

$(INTEGRATIONS_FOLDER)/.done: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade --target $(@D) --constraint constraints.txt $(INTEGRATIONS)
	touch $@
