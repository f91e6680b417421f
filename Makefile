# Everything a fresh machine with Python >= 3.10 and a C++ compiler needs:
#
#   make demo   install, train on synthetic fundus images, evaluate, predict, draw
#   make test   build the wheel, install it, and test it from outside the sources, the CUDA kernels
#               in the emulator of tests/emulator
#   make gpu    on a machine with an NVIDIA GPU and nvcc: build for that GPU, test everything there, the
#               kernels under compute-sanitizer where it is installed, and write the table of timings
#   make lint   ruff, clang-format, mypy
#   make bench RUN="benchmarks rois --write"
#               a benchmark's module and arguments, with the installed package;
#               "benchmarks mmd" has two more peers after `pip install '.[bench]'`, which is also
#               what RUN="pytest --benchmark-only benchmarks" needs
#
# Each makes .venv from $(PYTHON) if it is not there. PYTEST_ARGS is handed to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
EMULATOR_SOURCES := $(shell find tests/emulator -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# Whatever the wheel is made of: a change there builds and installs it again.
SOURCES := $(CXX_SOURCES) $(shell find diffmic_fast -name '*.py' -o -name '*.yml') \
           csrc/bindings/build_config.h.in setup.py pyproject.toml MANIFEST.in CMakeLists.txt

RUN ?= benchmarks rois

.PHONY: demo test gpu lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package
	$(BIN)/diffmic-fast demo

test: $(VENV)/.test
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	emulated=$$($(BIN)/python tests/emulated_module.py) && \
	cp -r tests pyproject.toml "$$scratch" && cd "$$scratch" && \
	DIFFMIC_SOURCE="$(CURDIR)" DIFFMIC_EMULATED="$$emulated" $(BIN)/python -m pytest -p no:cacheprovider $(PYTEST_ARGS) tests

# compute-sanitizer sees every access of a kernel; racecheck sees those of shared memory.
SANITIZED := tests/ops -k "cuda and not emulated and not compile and not opcheck"

gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu: there is no nvidia-smi, so no GPU"; exit 1; }
	rm -f $(VENV)/.package
	DIFFMIC_CUDA=on TORCH_CUDA_ARCH_LIST="$$(nvidia-smi --query-gpu=compute_cap \
	  --format=csv,noheader | sort -u | paste -sd ';')" $(MAKE) test
	$(BIN)/python -m diffmic_fast info
	@if command -v compute-sanitizer >/dev/null; then \
	  scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	  cp -r tests pyproject.toml "$$scratch" && cd "$$scratch" && \
	  for tool in memcheck racecheck synccheck initcheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest -p no:cacheprovider $(SANITIZED) || exit 1; \
	  done; \
	else echo "make gpu: compute-sanitizer is not installed, the kernels were not run under it"; fi
	$(MAKE) bench RUN="benchmarks gpu --write"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) tests/native/*.cpp tests/native/*.h \
	  $(EMULATOR_SOURCES)
	$(BIN)/mypy

# From a folder that does not hold the sources, which have no extension and would be found first.
bench: $(VENV)/.package
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	ln -s "$(CURDIR)/benchmarks" "$$scratch" && cd "$$scratch" && $(BIN)/python -m $(RUN)

clean:
	rm -rf $(VENV) build dist

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "diffmic_fast needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The dependencies come with the first install; a later one only replaces the package itself, unless
# they changed.
$(VENV)/.package: $(VENV)/.venv $(SOURCES)
	rm -rf build/wheel
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	$(PIP) install build/wheel/diffmic_fast-*.whl
	$(PIP) install --no-deps --force-reinstall build/wheel/diffmic_fast-*.whl
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) install "$$(echo build/wheel/diffmic_fast-*.whl)[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) install "$$(echo build/wheel/diffmic_fast-*.whl)[dev]"
	touch $@
