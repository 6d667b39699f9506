# Everything a contributor needs; each target sets itself up.
#   make demo   a real S3 server, two checkpoints, workers that read from each other, every tensor compared
#   make test   all tests, several side by side (ARGS="-k name" goes to pytest)
#   make test-fast   tests without servers and slow steps, for the loop of a contributor (TESTS=plugins/mx-s3/tests)
#   make test-nightly   all tests, and property tests with all their examples, drawn at random
#   make test-vllm   tests with real vLLM, in a separate environment
#   make lint   formatting, lint, types, layers
#   make lock   write uv.lock anew, after a change of dependencies
#   make check-lock   uv.lock fits the packages, and each supported Python has wheels of all dependencies
#   make bench  figures as ratios to limits and to other libraries (ARGS="local s3 --quick")
#   make bench-vllm   the same of real vLLM, with each of its loaders (ARGS="--rounds 3")

PYTHON ?= python3
VENV ?= .venv
# PyPI's torch for x86_64 has CUDA, several GB. Name here the index of CPU builds that pytorch.org/get-started shows.
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV ?= .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_BENCH_STAMP := $(VLLM_VENV)/.installed-bench
# Every folder with a pyproject.toml in plugins/ and integrations/ is a package.
MEMBERS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml integrations/*/pyproject.toml))
# With the parts of mx-streamer for S3, GCS and Azure, which its tests need.
PACKAGES := . $(MEMBERS:%/mx-streamer=%/mx-streamer[s3,gcs,azure])

.PHONY: demo test test-fast test-nightly test-vllm lint lock check-lock bench bench-vllm format clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# Installs the CPU build of torch: from where pip is configured to look, else from TORCH_INDEX. If neither has it for this
# Python, what comes next installs the one that pip finds.
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints-dev.txt)
define install_torch
@[ "$$(uname -sm)" != "Linux x86_64" ] || \
	$(1) -m pip install --quiet --no-deps '$(TORCH)+cpu' 2>/dev/null || \
	{ [ -n "$(TORCH_INDEX)" ] && \
	  $(1) -m pip install --quiet --no-deps --retries 0 --index-url '$(TORCH_INDEX)' '$(TORCH)+cpu'; } || \
	echo "pip finds no CPU build of $(TORCH): the one with CUDA is installed, several GB. To avoid it, stop, and set" \
		"TORCH_INDEX to the index of CPU builds that pytorch.org/get-started shows" >&2
endef

$(STAMP): pyproject.toml $(MEMBERS:%=%/pyproject.toml) constraints-dev.txt requirements-checkpoint.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call install_torch,$(BIN)/python)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt \
		$(addprefix --editable ,$(PACKAGES)) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-checkpoint.txt
	@touch $@

# An environment keeps the Python that it was made with: another one that is asked for would be ignored.
ifneq ($(origin PYTHON),file)
$(STAMP): | same-python
endif
.PHONY: same-python
same-python:
	@[ ! -x $(BIN)/python ] || [ "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" ] || { \
		echo "$(VENV) has $$($(BIN)/python -V), $(PYTHON) is $$($(PYTHON) -V):" \
			"remove $(VENV), or name another environment: make PYTHON=$(PYTHON) VENV=.venv-other" >&2; exit 1; }

demo: $(STAMP)
	@$(BIN)/python -m devtools.demo

# conftest.py chooses how many workers there are; tests of one xdist_group share a worker, and with it what they set up.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadgroup
TESTS ?= tests/unit tests/docs $(wildcard plugins/*/tests)

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-fast: $(STAMP)
	HYPOTHESIS_PROFILE=fast $(PYTEST) -m "not server and not slow" $(TESTS) $(ARGS)

test-nightly: $(STAMP)
	HYPOTHESIS_PROFILE=nightly $(PYTEST) $(ARGS)

# vLLM's CPU build asks for media libraries whose builds do not go with the CPU build of torch; text models need none.
$(VLLM_STAMP): pyproject.toml $(MEMBERS:%=%/pyproject.toml) integrations/vllm/tests/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(call install_torch,$(VLLM_VENV)/bin/python)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement integrations/vllm/tests/requirements.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet $(addprefix --editable ,$(PACKAGES))
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal integrations/vllm/tests $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m devtools.package_imports

# The index that the lock file names, also where uv is configured for a mirror. The check needs no network.
UV_LOCK = $(BIN)/uv lock --default-index $(shell sed -n 's/^source = { registry = "\(.*\)" }/\1/p' uv.lock | sort -u)
lock: $(STAMP)
	$(UV_LOCK)

# The Pythons that are supported, as pyproject.toml lists them. Their wheels are looked up, not downloaded.
PYTHONS := 3.10 3.11 3.12 3.13 3.14
RESOLVE := $(BIN)/uv pip compile --quiet --all-extras --constraint constraints-dev.txt --only-binary :all: \
	--python-version {} --python-platform x86_64-manylinux_2_28 pyproject.toml >/dev/null
check-lock: $(STAMP)
	$(UV_LOCK) --check --offline
	@printf '%s\n' $(PYTHONS) | xargs -P 8 -I{} sh -c '$(RESOLVE) || { echo "Python {}: see above" >&2; exit 1; }; \
		echo "Python {}: every dependency has a wheel"'

$(BENCH_STAMP): pyproject.toml $(wildcard plugins/*/pyproject.toml) constraints-dev.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(call install_torch,$(BENCH_VENV)/bin/python)
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints-dev.txt \
		$(addprefix --editable ,$(PACKAGES)) --editable '.[dev]' --requirement benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_STAMP)
	@$(BENCH_VENV)/bin/python -m benchmarks $(ARGS)

# What vLLM's own loaders need, in the versions that all benchmarks compare with.
$(VLLM_BENCH_STAMP): $(VLLM_STAMP) benchmarks/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint benchmarks/requirements.txt \
		runai-model-streamer runai-model-streamer-s3
	@touch $@

bench-vllm: $(BENCH_STAMP) $(VLLM_BENCH_STAMP)
	@VLLM_VENV=$(VLLM_VENV) $(BENCH_VENV)/bin/python -m benchmarks vllm vllm_peers $(ARGS)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
