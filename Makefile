# From a fresh clone to a trained network (`make demo`) and to a tested one (`make test`). `make help` lists the rest.
#
# Needs make, Python >= 3.11 with venv and headers, and a C++ compiler; everything else is installed into $(VENV).
#   PYTHON=python3.12   the interpreter that the virtual environment is made with
#   VENV=DIR            another place for it
#   ARGS="..."          more arguments for the command at the end (demo, test, test-long, bench*, report, test-gpu)
#   GPU_PYTHON=python3  the interpreter of test-gpu and bench-gpu, with a CUDA build of PyTorch. These two make no
#                       virtual environment and use no network; they need nvcc, cmake, ninja, numpy, pytest and
#                       pytest-benchmark

PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON ?= python3
ARGS ?=

VENV_PYTHON := $(VENV)/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check --quiet

# Stamps, inside the environment so that they go when it goes.
INSTALLED := $(VENV)/.pyconv-requirements
BENCH_INSTALLED := $(VENV)/.pyconv-bench-requirements
CUDA_CHECK_INSTALLED := $(VENV)/.pyconv-cuda-check-requirements
BUILT := $(VENV)/.pyconv-built
TESTS_BUILT := $(VENV)/.pyconv-tests-built

files_in = $(shell find $(1) -type f -not -path '*/__pycache__/*')
NATIVE_SOURCES := CMakeLists.txt $(call files_in,cmake csrc cuda)
NATIVE_TESTS := $(call files_in,tests/cpp tests/cuda tests/emulation)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long test-gpu bench-quick bench bench-all bench-gpu bench-gate report cuda-budget build \
        build-gpu lint clean distclean

help:  ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(BUILT)  ## Set up, then train a network of two convolutional layers on the embedded digits
	$(VENV_PYTHON) -m pyconv train $(ARGS)

test: $(TESTS_BUILT) $(CUDA_CHECK_INSTALLED)  ## Set up, then run all tests but the long ones
	@$(VENV_PYTHON) -m pytest $(ARGS)

test-long: $(TESTS_BUILT) $(CUDA_CHECK_INSTALLED)  ## Run every test, those of many minutes too
	@$(VENV_PYTHON) -m pytest -m "" $(ARGS)

test-gpu: BUILD_TOO := tests
test-gpu: build-gpu  ## Build for the GPUs of this machine and run the operators' tests on CUDA
	@# One word: a second, cuda, would be taken for the directory, and tests/conftest.py, which has the option, not read.
	@$(GPU_PYTHON) -m pytest --backend=cuda -m "" $(ARGS)

bench-quick: $(BUILT)  ## Compare the speed with PyTorch's on the main shapes: about 2 minutes
	$(VENV_PYTHON) -m benchmarks run --suite quick $(ARGS)

bench: $(BUILT) $(BENCH_INSTALLED)  ## The committed list of benchmarks, JAX among the peers: at most 30 minutes
	$(VENV_PYTHON) -m benchmarks run --suite full $(ARGS)

bench-all: $(BUILT) $(BENCH_INSTALLED)  ## Every shape, precision and phase, up to 1024 images: hours
	$(VENV_PYTHON) -m benchmarks run --suite all $(ARGS)

bench-gpu: build-gpu  ## Build for the GPUs of this machine and compare the speed there
	@$(GPU_PYTHON) -m benchmarks run --suite gpu $(ARGS)

bench-gate: $(BUILT)  ## Measure the main shapes; fail where a speed-up fell below the committed result's
	$(VENV_PYTHON) -m benchmarks gate $(ARGS)

report: $(INSTALLED)  ## Write the committed benchmark results as one page, build/report.html
	$(VENV_PYTHON) -m benchmarks report $(ARGS)

cuda-budget: $(TESTS_BUILT) $(CUDA_CHECK_INSTALLED)  ## Write what each CUDA kernel takes to tests/cuda_budget.json
	@$(VENV_PYTHON) tests/cuda_budget.py

build: $(BUILT)  ## Set up and build the extension

build-gpu:
	@$(GPU_PYTHON) cmake/cuda_facts.py gpu
	@PYCONV_CUDA=1 PYCONV_CUDA_ARCHS=native $(GPU_PYTHON) cmake/native_build.py $(BUILD_TOO)

lint: $(INSTALLED)  ## Check the Python code with ruff
	$(VENV_PYTHON) -m ruff check .

clean:  ## Remove what was built; the virtual environment stays
	rm -rf build dist pyconv.egg-info pyconv/_C.*.so $(BUILT) $(TESTS_BUILT)

distclean: clean  ## Remove the virtual environment too
	rm -rf $(VENV)

# Everything that can be missing is asked for before anything is downloaded.
$(VENV_PYTHON):
	@command -v $(PYTHON) >/dev/null || { echo "pyconv: $(PYTHON) is missing;" \
	  "install it (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev)" >&2; exit 1; }
	@$(PYTHON) cmake/build_tools.py python venv headers compiler
	@echo "Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): requirements/torch.txt requirements/build.txt requirements/dev.txt | $(VENV_PYTHON)
	@echo "Installing the pinned requirements, torch first: a few minutes"
	@$(PIP) install -r requirements/torch.txt
	@$(PIP) install -r requirements/build.txt -r requirements/dev.txt
	@touch $@

$(BENCH_INSTALLED): requirements/bench.txt $(INSTALLED)
	@$(PIP) install -r requirements/bench.txt
	@touch $@

# Only some tests need these: they are skipped, and say so, where there is no such package for the machine.
$(CUDA_CHECK_INSTALLED): requirements/cuda-check.txt $(INSTALLED)
	@echo "Installing the CUDA compiler for the tests"
	@if $(PIP) install -r requirements/cuda-check.txt; then touch $@; fi

$(BUILT): $(INSTALLED) $(NATIVE_SOURCES) setup.py pyproject.toml
	@echo "Building the extension"
	@# compat: a path on sys.path, over which a directory that happens to be called pyconv cannot win
	@$(PIP) install --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

$(TESTS_BUILT): $(BUILT) $(NATIVE_TESTS)
	@echo "Building the tests' programs and the emulation of CUDA"
	@$(VENV_PYTHON) cmake/native_build.py tests
	@touch $@
