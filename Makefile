# On a machine with Python >= 3.10 and a C++ compiler:
#
#   make demo      train on synthetic fundus images, evaluate, predict, draw
#   make test      the fast tests, with the CUDA kernels in the emulator of tests/emulator
#   make test-all  the slow rest: planted faults, all CUDA architectures, sanitizers, other
#                  compilers and processors, installed wheels
#   make gpu       with an NVIDIA GPU and nvcc: all tests, the kernels also under compute-sanitizer if
#                  it is installed, and the table of timings
#   make lint      ruff, clang-format, mypy
#   make bench RUN="benchmarks rois --write"
#                  a benchmark; `pip install '.[bench]'` adds peers of `benchmarks mmd`, and
#                  RUN="pytest --benchmark-only benchmarks"
#
# Each creates .venv from $(PYTHON) and installs the package into it, editable. PYTEST_ARGS is passed
# to pytest, DIFFMIC_CUDA and TORCH_CUDA_ARCH_LIST to setup.py. demo and bench compile the CUDA kernels
# only for a GPU that is visible, unless a target that compiles them in any case was made before.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
CXX_SOURCES := $(shell find csrc tests/native tests/emulator \
  -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# A change here compiles what it concerns.
COMPILED := $(filter csrc/%,$(CXX_SOURCES)) csrc/bindings/build_config.h.in CMakeLists.txt setup.py \
  $(wildcard build_support/*.py) pyproject.toml

RUN ?= benchmarks rois

.PHONY: demo test test-all gpu lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.all
	$(BIN)/diffmic-fast demo

test: $(VENV)/.test
	$(BIN)/python tests/emulated_module.py
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.test
	$(PYTEST) -m slow

gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu: there is no nvidia-smi, so no GPU"; exit 1; }
	rm -f $(VENV)/.test
	DIFFMIC_CUDA=on $(MAKE) $(VENV)/.test
	$(PYTEST) -m ""
	$(BIN)/python -m diffmic_fast info
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck synccheck initcheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest \
	      tests/ops -m gpu -k "not triton and not compile and not opcheck" || exit 1; \
	  done; \
	else echo "make gpu: compute-sanitizer is not installed, the kernels were not run under it"; fi
	$(MAKE) bench RUN="benchmarks gpu --write"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

bench: $(VENV)/.all
	$(BIN)/python -m $(RUN)

clean:
	rm -rf $(VENV) build dist diffmic_fast/_C.* diffmic_fast/_build.json

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "diffmic_fast needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
	touch $@

# Without a GPU nothing here runs the CUDA kernels, and they take long to compile. All targets share one
# extension: kernels that were compiled for the tests stay.
$(VENV)/.all: DIFFMIC_CUDA ?= $(if $(wildcard $(VENV)/.test $(VENV)/.dev),auto,visible)

# Built in this environment, not in an isolated one, whose paths change: only what has changed is
# compiled. The names are extras of pyproject.toml.
$(VENV)/.all $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.venv $(COMPILED)
	DIFFMIC_CUDA=$(DIFFMIC_CUDA) $(PIP) install --no-build-isolation --editable ".[$*]"
	@$(BIN)/python -c 'import json; built = json.load(open("diffmic_fast/_build.json")); \
	  built["cuda"] or print("diffmic_fast: built without CUDA:", built["cuda_reason"])'
	touch $@
