# On a machine with Python >= 3.10 and a C++ compiler:
#
#   make demo      train on synthetic fundus images, evaluate, predict, draw
#   make test      the fast tests, with the CUDA kernels in the emulator of tests/emulator
#   make test-all  the slow rest: planted faults, all CUDA architectures, sanitizers, other
#                  compilers and processors, installed wheels
#   make gpu       with an NVIDIA GPU and nvcc: gpu-build, then the stages gpu-check (kernels at full
#                  size, and tests), gpu-time (timings) and gpu-sanitize (compute-sanitizer), of
#                  which each is a target of its own; logs and results are written to $(OUT)
#   make lint      ruff, clang-format, mypy
#   make docs      the site of the documentation, in build/site
#   make bench RUN="benchmarks rois --write"
#                  a benchmark; `pip install '.[bench]'` adds peers of `benchmarks mmd`, and
#                  RUN="pytest --benchmark-only benchmarks"
#
# Each creates .venv from $(PYTHON) and installs the package into it, editable. OFFLINE=1 fetches
# nothing: .venv then shows the packages of $(PYTHON), which must have torch and what builds the
# package. That is also the case without OFFLINE if $(PYTHON) has these and nothing can be fetched.
# PYTEST_ARGS is passed to pytest, DIFFMIC_CUDA and TORCH_CUDA_ARCH_LIST to setup.py. demo and bench
# compile the CUDA kernels only for a GPU that is visible, unless a target that compiles them in any
# case was made before.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
# Built in this environment, not in an isolated one, whose paths change: only what has changed is
# compiled. The argument is an extra of pyproject.toml.
install = $(PIP) install --no-build-isolation \
  $$(if [ -n "$(OFFLINE)" ] || [ -e $(VENV)/.offline ]; then \
       echo "--no-index --no-deps --editable ."; else echo "--editable .[$(1)]"; fi)
CXX_SOURCES := $(shell find csrc tests/native tests/emulator \
  -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# A change here compiles what it concerns.
COMPILED := $(filter csrc/%,$(CXX_SOURCES)) csrc/bindings/build_config.h.in CMakeLists.txt setup.py \
  $(wildcard build_support/*.py) pyproject.toml

RUN ?= benchmarks rois
OUT ?= build/gpu

.PHONY: demo test test-all docs gpu gpu-build gpu-check gpu-time gpu-sanitize lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.all
	$(BIN)/diffmic-fast demo

test: $(VENV)/.test
	$(BIN)/python tests/emulated_module.py
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.test
	$(PYTEST) -m slow

gpu: gpu-build
	$(BIN)/python -m benchmarks.gpu_stages --out $(OUT) check time sanitize

gpu-check gpu-time gpu-sanitize: gpu-%: gpu-build
	$(BIN)/python -m benchmarks.gpu_stages --out $(OUT) $*

# Always installed anew, which compiles what has changed: another target may have built without CUDA.
# Reports of compute-sanitizer name source lines. A new compiler's warnings are no reason to stop.
gpu-build: $(VENV)/.venv
	@command -v nvidia-smi >/dev/null || { echo "make gpu: there is no nvidia-smi, so no GPU"; exit 1; }
	DIFFMIC_CUDA=on DIFFMIC_WERROR=off CUDAFLAGS="-lineinfo $$CUDAFLAGS" $(call install,test)
	$(BIN)/python -m diffmic_fast info

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.all
	$(BIN)/python -m $(RUN)

clean:
	rm -rf $(VENV) build dist diffmic_fast/_C.* diffmic_fast/_build.json

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "diffmic_fast needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) build_support/environment.py $(VENV) $(if $(OFFLINE),--offline)
	touch $@

# Without a GPU nothing here runs the CUDA kernels, and they take long to compile. All targets share one
# extension: kernels that were compiled for the tests stay.
$(VENV)/.all $(VENV)/.docs: DIFFMIC_CUDA ?= $(if $(wildcard $(VENV)/.test $(VENV)/.dev),auto,visible)

# Named after the extras of pyproject.toml.
$(VENV)/.all $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.venv $(COMPILED)
	DIFFMIC_CUDA=$(DIFFMIC_CUDA) $(call install,$*)
	@$(BIN)/python -c 'import json; built = json.load(open("diffmic_fast/_build.json")); \
	  built["cuda"] or print("diffmic_fast: built without CUDA:", built["cuda_reason"])'
	touch $@
