# `make demo` and `make test` need python3 (3.10 or newer), a C++17 compiler and make; everything
# else is installed into .venv from requirements-dev.txt.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The GPU of this machine, else 90 (sm_90, compiled but not run): one architecture keeps the build
# short. A release wheel lists its own.
ifndef CUDA_ARCHS
CUDA_ARCHS := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | head -n 1 | tr -cd 0-9),90)
endif
PYLOSS_CMAKE_ARGS ?= "-DPYLOSS_CUDA_ARCHS=$(CUDA_ARCHS)"
PYTEST_ARGS ?= --timeout=600
export PYLOSS_CMAKE_ARGS

DEPS := $(VENV)/.deps.stamp
BUILT := $(VENV)/.built.stamp
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: build demo test ctest pytest sanitize peers bench lint format docs clean help
.DEFAULT_GOAL := build

## the environment in .venv and an editable install (what `make` alone does)
build: $(BUILT)

$(DEPS): requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(BUILT): $(DEPS) $(SOURCES)
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

## trains on real input with pyloss and with PyTorch, and compares
demo: $(BUILT)
	$(PY) -m pyloss.demo

## builds everything and runs all tests: C++, then Python
test: ctest pytest

# $(call run_ctest,build directory,CMake options)
define run_ctest
	CMAKE="$$($(PY) -c 'import cmake; print(cmake.CMAKE_BIN_DIR)')" && \
	NINJA="$$($(PY) -c 'import ninja; print(ninja.BIN_DIR)')" && \
	"$$CMAKE/cmake" -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM="$$NINJA/ninja" \
	  -DPYLOSS_BUILD_TESTS=ON -DPYLOSS_CUDA=OFF $(2) && \
	"$$CMAKE/cmake" --build $(1) && \
	"$$CMAKE/ctest" --test-dir $(1) --output-on-failure
endef

## the C++ tests
ctest: $(DEPS)
	$(call run_ctest,build/cpp,-DPYLOSS_BUILD_PYTHON=OFF)

# The C++ tests and the boundary fuzz under AddressSanitizer and UBSan.
## C++ tests and the boundary fuzz under AddressSanitizer and UBSan
sanitize: $(DEPS)
	$(call run_ctest,build/sanitize,-DPYLOSS_SANITIZE=ON -DPython_EXECUTABLE="$(abspath $(PY))" \
	  -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)")

## the Python tests; a part of them: make pytest PYTEST_ARGS=tests/test_fork.py
pytest: $(BUILT)
	$(PY) -m pytest $(PYTEST_ARGS)

# torchsort compiles against the installed torch, and fails where it sees an nvcc that torch was not
# built with; hence the short PATH. Where it fails all the same, the benchmarks and the test of
# equality go on without it.
## installs torchsort, which benchmarks and a test of equality compare with
peers: $(DEPS)
	-env -u CUDA_HOME PATH=/usr/bin:/bin $(abspath $(PY)) -m pip install \
	  --disable-pip-version-check --no-deps --no-build-isolation torchsort

## benchmark of row_softmax; others: python -m bench.run --op NAME
bench: $(BUILT)
	$(PY) -m bench.run --op row_softmax

## ruff, clang-format, and basedpyright on a program with every public name
lint: $(DEPS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m basedpyright --pythonpath $(PY)

## formats Python, C++ and CUDA
format: $(DEPS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format -i

## the documentation as a site in site/
docs: $(DEPS)
	$(PY) -m pip install --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

## removes what was built, but not .venv
clean:
	rm -rf build dist site *.egg-info $(BUILT) pyloss/_C*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A line that starts with two # signs says what the target below it does.
## this list
help:
	@awk '/^## / { text = substr($$0, 4) } \
	  /^[a-z-]+:/ && text { sub(":.*", ""); printf "make %-12s %s\n", $$0, text; text = "" }' \
	  $(firstword $(MAKEFILE_LIST))
