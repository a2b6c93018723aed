# Each target sets up what it needs in .venv; a stamp file there keeps it from doing so twice.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
BIN := $(VENV)/bin
# Not compiled to bytecode: Python does that for what is imported, which is little of it.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
CONSTRAINTS := --constraint constraints-dev.txt

CXX_FILES := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE_SOURCES := CMakeLists.txt setup.py $(filter csrc/%, $(CXX_FILES))

# Development builds are for this machine: without a GPU the CPU core alone. 0 and 1 as setup.py has
# them: never, and for all architectures.
export SEQKERNELS_CUDA ?= local

# Dozens of tests start Python; without its cache each start compiles torch's sources again.
unexport PYTHONDONTWRITEBYTECODE

JOBS ?= $(shell nproc 2>/dev/null || echo 1)
# Whatever shares nothing runs side by side; tests/conftest.py says what stays together.
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(JOBS) --no-loadscope-reorder

# What a change to the Python code needs first; the rest runs kernels in emulation or builds.
FAST_TESTS := tests/ops tests/nn tests/test_swap.py tests/swap tests/backends --ignore tests/backends/test_cuda.py

PYTHON_FILES := setup.py seqkernels tests $(wildcard bench examples)
TEXT_FILES := $(PYTHON_FILES) csrc CMakeLists.txt pyproject.toml .ci

# Not for this project: flags of the building machine, an interface gone from Triton, a machine's
# own paths, unfinished work.
BANNED := -march=native|make_block_ptr|(^|[^A-Za-z0-9_.}])/(home|root|work|Users|opt|tmp)/|\b(TODO|FIXME)\b

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-exhaustive test-all test-triton-newest test-triton-oldest \
    test-torch-oldest test-aarch64 test-gpu bench lint format native clean

help:  ## this list
	@echo "make <target>, where <target> is one of:"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(VENV)/.demo $(VENV)/.native  ## train an engagement ranker on real data, swap it, compare
	@echo "==> demo"
	$(BIN)/python -m seqkernels demo

test: $(VENV)/.dev $(VENV)/.native-for-tests  ## all tests but the exhaustive ones
	@echo "==> compiling what the tests run"
	$(BIN)/python -m tests.prebuild
	@echo "==> tests"
	$(PYTEST) tests -m "not exhaustive and not timing" $(PARALLEL)
	$(PYTEST) tests -m "timing and not exhaustive"

test-fast: $(VENV)/.dev $(VENV)/.native-for-tests  ## ops, nn, swap and backends on the best instruction set
	@echo "==> the quick ones among the tests"
	$(PYTEST) $(FAST_TESTS) --best-isa $(PARALLEL)

test-exhaustive: $(VENV)/.dev $(VENV)/.native-for-tests  ## what `make test` leaves out: every architecture, full grids
	@echo "==> compiling what the exhaustive tests run"
	$(BIN)/python -m tests.prebuild --exhaustive
	@echo "==> exhaustive tests"
	$(PYTEST) tests -m exhaustive $(PARALLEL)

test-all: test test-exhaustive test-triton-newest test-triton-oldest  ## every test, with three versions of Triton

test-triton-newest: ## what `make test` takes of the Triton tests, with the newest Triton
test-triton-oldest: ## what `make test` takes of the Triton tests, with the oldest Triton
test-torch-oldest: ## the fast tests with the oldest torch, where pip finds its CPU build
test-triton-newest test-triton-oldest: OVERLAID_TESTS := tests/triton
test-torch-oldest: OVERLAID_TESTS := $(FAST_TESTS)
test-triton-newest test-triton-oldest test-torch-oldest: test-%: \
    $(VENV)/.dev $(VENV)/.native-for-tests build/%/.installed
	@echo "==> tests with $$(grep -o '^[a-z].*' constraints-$*.txt | paste -sd ' ')"
	@PYTHONPATH=$(CURDIR)/build/$* $(BIN)/python -c 'import re; from importlib.metadata import version; \
	    pins = re.findall(r"(?m)^(\w+)==(\S+)", open("constraints-$*.txt").read()); \
	    assert pins == [(name, version(name)) for name, _ in pins], pins'
	PYTHONPATH=$(CURDIR)/build/$* $(PYTEST) $(OVERLAID_TESTS) -m "not exhaustive" $(PARALLEL)

test-aarch64: $(VENV)/.dev  ## the native core for AArch64, emulated; needs a cross compiler and qemu-user
	@echo "==> the native core on AArch64"
	$(PYTEST) tests/cpp/test_aarch64.py --require-aarch64

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

native: $(VENV)/.native-for-tests  ## compile the native module where its sources changed

clean:  ## remove build results; .venv stays
	rm -rf build dist seqkernels.egg-info seqkernels/_native*.so seqkernels/lib $(VENV)/.native*

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
	@$(PIP_INSTALL) $(CONSTRAINTS) torch numpy rich cmake ninja pybind11 setuptools wheel
	@touch $@

# The package itself is installed in place; its native module is compiled with warnings as errors.
# That of the tests holds the emulated AMX kernels too, and does for everything else as well.
$(VENV)/.native: FOR_TESTS := OFF
$(VENV)/.native-for-tests: FOR_TESTS := ON
$(VENV)/.native $(VENV)/.native-for-tests: $(NATIVE_SOURCES) pyproject.toml | $(VENV)/.build
	@echo "==> compiling the native module"
	@CMAKE_ARGS="-DSEQKERNELS_WERROR=ON -DSEQKERNELS_TESTS=$(FOR_TESTS) $(CMAKE_ARGS)" \
	    $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $(VENV)/.native $@

# Without the native module: installing tools neither compiles it nor touches the one in place.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: constraints-dev.txt pyproject.toml | $(VENV)/.build
	@echo "==> installing what the extra [$*] names (once)"
	@SEQKERNELS_NATIVE=0 $(PIP_INSTALL) $(CONSTRAINTS) --no-build-isolation --editable '.[$*]'
	@touch $@

# Beside .venv, whose versions go together, and in front of it on the path.
build/%/.installed: constraints-%.txt | $(BIN)/python
	@echo "==> installing what constraints-$*.txt names (once)"
	@rm -rf $(@D)
	@$(PIP_INSTALL) --requirement $< --no-deps --target $(@D)
	@touch $@
