# Each target sets up what it needs in .venv; a stamp file there keeps it from doing so twice.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := --constraint constraints-dev.txt

CXX_FILES := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE_SOURCES := CMakeLists.txt setup.py $(filter csrc/%, $(CXX_FILES))
NEWEST_TRITON := build/triton-newest

PYTHON_FILES := setup.py seqkernels tests $(wildcard bench examples)
TEXT_FILES := $(PYTHON_FILES) csrc CMakeLists.txt pyproject.toml .ci

# Not for this project: flags of the building machine, an interface gone from Triton, a machine's
# own paths, unfinished work.
BANNED := -march=native|make_block_ptr|(^|[^A-Za-z0-9_.}])/(home|root|work|Users|opt|tmp)/|\b(TODO|FIXME)\b

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-triton-newest test-gpu bench lint format native clean

help:  ## this list
	@echo "make <target>, where <target> is one of:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(VENV)/.demo $(VENV)/.native  ## train an engagement ranker on real data, swap it, compare
	@echo "==> demo"
	$(BIN)/python -m seqkernels demo

test: $(VENV)/.dev $(VENV)/.native  ## all tests, the native core's under sanitizers included
	@echo "==> tests"
	$(BIN)/python -m pytest tests

test-triton-newest: $(VENV)/.dev $(NEWEST_TRITON)/.installed  ## the Triton kernels with the newest Triton
	@echo "==> tests of the Triton kernels with the newest Triton"
	@PYTHONPATH=$(CURDIR)/$(NEWEST_TRITON) $(BIN)/python -c 'import triton; from pathlib import Path; \
	    assert f"triton=={triton.__version__}" in Path("constraints-triton-newest.txt").read_text().split()'
	PYTHONPATH=$(CURDIR)/$(NEWEST_TRITON) $(BIN)/python -m pytest tests/triton

test-gpu: $(VENV)/.dev $(VENV)/.native  ## the kernels on the GPU at hand
	@echo "==> tests on the GPU"
	$(BIN)/python -m pytest tests/gpu

bench: $(VENV)/.bench $(VENV)/.native  ## measure every workload beside its peers, write a report
	@echo "==> benchmarks"
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json
	$(BIN)/python -m bench.report

lint: $(VENV)/.dev  ## style, types, formatting; changes nothing
	@echo "==> ruff check"
	@$(BIN)/ruff check $(PYTHON_FILES)
	@echo "==> ruff format"
	@$(BIN)/ruff format --check $(PYTHON_FILES)
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> clang-format"
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@echo "==> banned words"
	@if grep -rnEI --exclude-dir=__pycache__ -e '$(BANNED)' $(TEXT_FILES); then \
	    echo "lint: the lines above hold what this project bans (BANNED in the Makefile)"; exit 1; fi
	@echo "lint: all clean ($(words $(CXX_FILES)) C++ files, \
	$$(find $(PYTHON_FILES) -name '*.py' | wc -l) Python files)"

format: $(VENV)/.dev  ## let ruff and clang-format rewrite the sources
	@$(BIN)/ruff check --fix --quiet $(PYTHON_FILES)
	@$(BIN)/ruff format $(PYTHON_FILES)
	@$(BIN)/clang-format -i $(CXX_FILES)
	@echo "format: done"

native: $(VENV)/.native  ## compile the native module where its sources changed

clean:  ## remove build results; .venv stays
	rm -rf build dist seqkernels.egg-info seqkernels/_native*.so $(VENV)/.native

# --- set-up ---------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "seqkernels needs Python 3.11 or newer, not " + sys.version.split()[0] \
	    + "; name another one: make PYTHON=python3.12 ...")'
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# What building the native module needs, and torch (the largest download) as the constraints pin it.
$(VENV)/.build: constraints-dev.txt | $(BIN)/python
	@echo "==> installing PyTorch and the build tools (once)"
	@$(PIP) install $(CONSTRAINTS) torch numpy rich cmake ninja pybind11 setuptools wheel
	@touch $@

# The package itself is installed in place; its native module is compiled with warnings as errors.
$(VENV)/.native: $(NATIVE_SOURCES) pyproject.toml | $(VENV)/.build
	@echo "==> compiling the native module"
	@CMAKE_ARGS="-DSEQKERNELS_WERROR=ON $(CMAKE_ARGS)" \
	    $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# Without the native module: installing tools neither compiles it nor touches the one in place.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: constraints-dev.txt pyproject.toml | $(VENV)/.build
	@echo "==> installing what the extra [$*] names (once)"
	@SEQKERNELS_NATIVE=0 $(PIP) install $(CONSTRAINTS) --no-build-isolation --editable '.[$*]'
	@touch $@

# Beside .venv, whose Triton is the one that goes with its torch, and in front of it on the path.
$(NEWEST_TRITON)/.installed: constraints-triton-newest.txt | $(BIN)/python
	@echo "==> installing the newest Triton (once)"
	@rm -rf $(NEWEST_TRITON)
	@$(PIP) install --constraint $< --no-deps --target $(NEWEST_TRITON) triton
	@touch $@
