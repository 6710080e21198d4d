# Every target installs what it needs into .venv and build/, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process. Three workers on two cores: one waits for a child or a disk most of the time.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The oldest versions that pyproject.toml accepts. They are installed into build/, and PYTHONPATH puts them first.
OLDEST_TRITON := 3.6.0
OLDEST_FOLDER := $(CURDIR)/build/triton-$(OLDEST_TRITON)
OLDEST_DIFFUSERS := 0.38.0
DIFFUSERS_FOLDER := $(CURDIR)/build/diffusers-$(OLDEST_DIFFUSERS)
# Hugging Face's loader of kernels: one test needs it.
INTEGRATIONS := kernels==0.17.2
INTEGRATIONS_FOLDER := $(CURDIR)/build/integrations
# Coverage-guided fuzzing. Its wheels exist for few versions of Python, so it is no part of [dev].
ATHERIS := atheris==3.0.0
FUZZ_FOLDER := $(CURDIR)/build/fuzz
FUZZ_SECONDS ?= 60
FUZZ_PARSERS ?= config index weights record plan facts shard lease manifest archive table structure image
RESULTS ?= bench/results/cpu/results.json
BASE ?= HEAD
# Prints one line, then installs without a word: $(call install,what it is) ARGUMENTS OF PIP.
install = @echo "Installing $(1)"; $(BIN)/python -m pip install --quiet

.PHONY: demo test test-all test-oldest-triton test-oldest-diffusers test-diffusers test-integrations fuzz check bench bench-cpu report bench-compare audit mutate clean

demo: $(VENV)/.run
	$(BIN)/fastvae demo demo

# Tests take at most five CPU seconds each on a quiet machine; one that takes ten fails (tests/support/cpu_limit.py).
# The longest files begin first (tests/support/longest_first.py); xdist would begin with those of the most tests.
test: $(VENV)/.dev
	CPU_SECONDS_LIMIT=10 $(ONE_THREAD) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q --durations=10

test-all: $(VENV)/.dev test-oldest-diffusers
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q -m "slow or not slow"

# Runs the kernels' tests in the interpreter of the oldest Triton; one to five minutes.
test-oldest-triton: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	PYTHONPATH=$(OLDEST_FOLDER) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton"
	PYTHONPATH=$(OLDEST_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/ops

# Runs the tests of the swap-in with the oldest diffusers; about a minute.
test-oldest-diffusers: $(VENV)/.dev $(DIFFUSERS_FOLDER)/.done
	PYTHONPATH=$(DIFFUSERS_FOLDER) $(BIN)/python -c "import diffusers as d; assert d.__version__ == '$(OLDEST_DIFFUSERS)', d"
	PYTHONPATH=$(DIFFUSERS_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/swap_in

# Runs diffusers' tests of AutoencoderKL, first with every model accelerated, then on fastvae's class:
# make test-diffusers DIFFUSERS=<its repository>
test-diffusers: $(VENV)/.dev
	@test -d "$(DIFFUSERS)/tests/models" || { echo "DIFFUSERS must name a checkout of diffusers, got '$(DIFFUSERS)'"; exit 2; }
	for plugin in everywhere own_class_everywhere; do \
		(cd $(DIFFUSERS) && PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests $(ONE_THREAD) HF_HUB_OFFLINE=1 \
			$(CURDIR)/$(BIN)/python -m pytest -q -p swap_in.$$plugin tests/models/autoencoders/test_models_autoencoder_kl.py) \
			|| failed=1; \
	done; test -z "$$failed"

# Loads the exported kernels with Hugging Face's kernels; half a minute.
test-integrations: $(VENV)/.dev $(INTEGRATIONS_FOLDER)/.done
	PYTHONPATH=$(INTEGRATIONS_FOLDER) $(ONE_THREAD) $(BIN)/python -m pytest -q tests/examples/test_export_kernels.py

# Gives malformed bytes to every parser: first Hypothesis, then atheris for FUZZ_SECONDS each. A failing input stays in
# build/fuzz and ends the run.
fuzz: $(VENV)/.dev $(FUZZ_FOLDER)/.done
	FUZZ_EXAMPLES=2000 $(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q tests/fuzz
	cd $(FUZZ_FOLDER) && for parser in $(FUZZ_PARSERS); do echo "$$parser"; \
		PYTHONPATH=$(FUZZ_FOLDER) $(ONE_THREAD) $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz/guided.py $$parser \
			-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=20 -verbosity=0 -print_final_stats=1 || exit 1; done

# Lint, format, types and plain English.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_plain_english.py

# Times ops, encoder, decoder and a folder of photographs beside other implementations, and profiles both networks; at
# most ten minutes. Only `make report` writes the tables.
bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench/timing -v -rfEs -p no:logging --results $(RESULTS)

# Times encoder and decoder beside every other implementation for CPUs, in fp32 and once in bf16; half an hour.
bench-cpu: $(VENV)/.bench
	name=$$($(BIN)/python -c "import torch; from fastvae.fast.forms import device_name as d; print(d.name_of(torch.device('cpu')))") && \
		$(BIN)/python -m pytest bench/timing/test_networks.py --rivals -v -rfEs -p no:logging \
			--results bench/results/$$name/results.json

# Tables and pictures of README and docs, from bench/results and from the imports of the code.
report: $(VENV)/.dev
	$(BIN)/python -m bench.pages.tables
	$(BIN)/python -m bench.pages.architecture_svg

# Times this tree and the commit BASE in turns; fails if an op or the encoder became slower.
bench-compare: $(VENV)/.bench
	$(BIN)/python -m bench.timing.regressions $(BASE)

# Compiles every kernel for six targets under two Tritons; up to half an hour with a cold Triton cache.
audit: $(VENV)/.dev $(OLDEST_FOLDER)/.done
	$(BIN)/python -m bench.kernels.audit

# Checks that every small wrong change of a list fails a test; about seven minutes.
mutate: $(VENV)/.dev
	$(BIN)/python -m bench.kernels.mutate

clean:
	rm -rf $(VENV) $(OLDEST_FOLDER) $(DIFFUSERS_FOLDER) $(INTEGRATIONS_FOLDER) $(FUZZ_FOLDER) demo .pytest_cache .ruff_cache *.egg-info

$(VENV)/bin/python:
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -c "import sys; sys.exit('fastvae needs Python 3.11 or newer, as in make demo PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# What the C kernels are built from.
BUILT_FROM := setup.py build_backend.py kernels/fastvae_kernels/cpu/sources.py $(wildcard kernels/fastvae_kernels/cpu/*.[ch])

# torch first, at its exact version: without one, pip may choose a build with gigabytes of CUDA libraries.
$(VENV)/.run: pyproject.toml constraints.txt $(BUILT_FROM) | $(VENV)/bin/python
	$(call install,torch (some minutes)) "$$(grep '^torch==' constraints.txt)"
	$(call install,fastvae and the packages of the demo) --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(call install,the packages of the tests (some minutes)) --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(call install,the packages of the benchmarks (some minutes)) --constraint constraints.txt --editable ".[bench]"
	@touch $@

$(OLDEST_FOLDER)/.done: | $(VENV)/bin/python
	$(call install,triton $(OLDEST_TRITON)) --upgrade --no-deps --target $(@D) triton==$(OLDEST_TRITON)
	@touch $@

# It needs this httpx: newer versions have another client.
$(DIFFUSERS_FOLDER)/.done: | $(VENV)/bin/python
	$(call install,diffusers $(OLDEST_DIFFUSERS)) --upgrade --no-deps --target $(@D) diffusers==$(OLDEST_DIFFUSERS) \
		httpx==0.28.1 httpcore==1.0.9 h11==0.16.0
	@touch $@

$(FUZZ_FOLDER)/.done: | $(VENV)/bin/python
	$(call install,$(ATHERIS)) --upgrade --no-deps --target $(@D) $(ATHERIS)
	@touch $@

$(INTEGRATIONS_FOLDER)/.done: constraints.txt | $(VENV)/bin/python
	$(call install,$(INTEGRATIONS)) --upgrade --target $(@D) --constraint constraints.txt $(INTEGRATIONS)
	@touch $@
