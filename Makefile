# `make demo` and `make test` need python3 (3.10 or newer), a C++17 compiler and make; everything
# else is installed into .venv from requirements-dev.txt.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# One pytest process a core, which conftest.py gives a thread each. worksteal: each process starts
# with a contiguous part of the tests, so that fixtures of a module are built in one of them, and
# takes from the others when it has done its own.
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
JOBS ?= $(shell test $(CORES) -gt 8 && echo 8 || echo $(CORES))
PYTEST_ARGS ?= --timeout=600 --durations=20 -n $(JOBS) --dist worksteal
# Without PYLOSS_CUDA_ARCHS the build is for the GPUs of this machine, else for 90.
PYLOSS_CMAKE_ARGS ?= -DPYLOSS_BUILD_TESTS=ON -DPYLOSS_CUDA_WERROR=ON \
  $(if $(CUDA_ARCHS),"-DPYLOSS_CUDA_ARCHS=$(CUDA_ARCHS)")
export PYLOSS_CMAKE_ARGS

DEPS := $(VENV)/.deps.stamp
BUILT := $(VENV)/.built.stamp
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: build demo test test-all test-matrix gpu-proof shim-races races proof-barriers proof-asan \
  proof-compile proof-interpreter proof-specs proof-triton-3.6 ctest sanitize other-archs pytest \
  peers bench lint format docs release-check clean help
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

# All that a change must pass; CI gives it 15 minutes on 2 cores, from a fresh clone on: 4 of them
# are the build, and about 9 these tests.
## builds everything and runs the tests: C++, CUDA kernels on the CPU, Python
test: ctest pytest

# As the nightly workflow runs it. Two threads in each Python process, where `make test` has one a
# core.
## all tests that need no GPU: test, sanitize, gpu-proof, test-matrix, and those marked exhaustive
test-all: $(BUILT) ctest sanitize other-archs races proof-barriers test-matrix
	PYLOSS_TEST_THREADS=2 $(PY) -m pytest $(PYTEST_ARGS) --exhaustive

# Those that build/torch has; more by name: make test-matrix TORCHES="2.6.0 2.8.0".
TORCHES ?= $(notdir $(wildcard build/torch/*))
## the tests on each torch of build/torch, or of TORCHES, with one wheel: docs/versions.md
test-matrix: $(DEPS) $(TORCHES:%=build/torch/%/.deps.stamp)
	$(if $(TORCHES),rm -rf build/versions && mkdir -p build/versions)
	$(if $(TORCHES),$(TOOLS) TMPDIR="$(abspath build/versions)" PYLOSS_CMAKE_ARGS=-DPYLOSS_CUDA=OFF \
	  $(PY) -m build --no-isolation --outdir build/versions/dist .)
	$(if $(TORCHES),$(PY) tests/versions.py --jobs $(JOBS) --wheel build/versions/dist/*.whl \
	  $(TORCHES:%=build/torch/%),@echo "skipped: no torch in build/torch")

# torch and the Triton that it wants; with the pinned packages that tests need.
build/torch/%/.deps.stamp: requirements-dev.txt
	$(PYTHON) -m venv build/torch/$*
	grep -vE '^(torch|triton|ruff|clang-format|basedpyright)[=>]' $< > build/torch/$*/requirements.txt
	build/torch/$*/bin/python -m pip install --disable-pip-version-check torch==$* \
	  -r build/torch/$*/requirements.txt
	touch $@

# In this order; what a stage finds is kept when another fails. make gpu-proof PROOF="proof-specs"
# runs a part. docs/gpu.md has what each takes.
PROOF := other-archs races proof-barriers proof-asan proof-compile proof-interpreter proof-specs \
  proof-triton-3.6
## GPU code without a GPU, beyond `make test`: sanitizers, races, all architectures, Triton 3.6
gpu-proof: $(BUILT)
	@failed=; taken=; for stage in $(PROOF); do \
	  start=$$(date +%s); result=passed; \
	  $(MAKE) --no-print-directory $$stage || { result=FAILED; failed=yes; }; \
	  taken="$$taken$$(printf '%-18s %5d s  %s' $$stage $$(($$(date +%s) - start)) $$result)|"; \
	done; printf '%s' "$$taken" | tr '|' '\n'; test -z "$$failed"

shim-races: $(DEPS)
	$(call configure,build/races,-DPYLOSS_BUILD_TESTS=ON -DPYLOSS_BUILD_PYTHON=OFF \
	  -DPYLOSS_CUDA=OFF -DPYLOSS_SHIM_ALL=ON)
	$(TOOLS) cmake --build build/races $(MAKE_JOBS) --target shim_races

# All problems under ThreadSanitizer.
## races in the CUDA kernels, on the CPU
races: shim-races
	$(TOOLS) ctest --test-dir build/races --no-tests=error --output-on-failure -j $(JOBS) -R '^race_'

# Each barrier of the kernels is left out in turn.
proof-barriers: shim-races
	$(PY) tests/cpp/cuda_shim/barriers.py build/races/tests/cpp

proof-asan: $(DEPS)
	$(call configure,build/sanitize,$(SANITIZE))
	$(TOOLS) cmake --build build/sanitize $(MAKE_JOBS) --target shim
	$(TOOLS) ctest --test-dir build/sanitize --output-on-failure -j $(JOBS) -L shim

proof-compile: $(BUILT)
	$(PY) -m pytest $(PYTEST_ARGS) --exhaustive -m exhaustive tests/compile

proof-interpreter: $(BUILT)
	$(PY) -m pytest $(PYTEST_ARGS) --exhaustive -m exhaustive tests/test_triton_interpreter.py

# Specs on the CUDA kernels as fibers. Not what a GPU does otherwise by intent: it reports bad labels
# and NaN in the result.
ON_SHIM := not compile and not attention and not errors and not (betti and nan)
proof-specs: $(BUILT)
	$(TOOLS) cmake -DPYLOSS_BUILD_TESTS=ON $(BUILD_DIR)
	$(TOOLS) cmake --build $(BUILD_DIR) $(MAKE_JOBS) --target shim_module
	PYLOSS_SHIM_MODULE="$$(ls $(BUILD_DIR)/tests/cpp/shim_module/_C*.so)" \
	  $(PY) -m pytest $(PYTEST_ARGS) tests/test_specs.py -k "$(ON_SHIM)"

# A Triton of its own folder, older than that of .venv: PyTorch 2.11 comes with it.
TRITON_36 := build/triton-3.6
proof-triton-3.6: $(BUILT)
	test -d $(TRITON_36) || $(PY) -m pip install --disable-pip-version-check --no-deps \
	  --target $(TRITON_36) triton==3.6.0 || echo "skipped: Triton 3.6 cannot be installed"
	if test -d $(TRITON_36)/triton; then PYTHONPATH=$(TRITON_36) \
	  $(PY) -m pytest $(PYTEST_ARGS) --exhaustive tests/compile/test_triton_compile.py; fi

# cmake, ctest and ninja as pip installed them, else those of the system.
TOOLS := PATH="$(abspath $(VENV))/bin:$$PATH"
MAKE_JOBS := $(if $(MAX_JOBS),-j $(MAX_JOBS))
SANITIZE := -DPYLOSS_SANITIZE=ON -DPYLOSS_BUILD_TESTS=ON -DPYLOSS_CUDA=OFF
# $(call configure,build directory,CMake options)
configure = $(TOOLS) cmake -S . -B $(1) -G Ninja -DPython_EXECUTABLE="$(abspath $(PY))" \
  -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" $(2)

# The folder of the build, whose objects the C++ tests link.
BUILD_DIR = build/cmake-$(shell $(PY) -c "import sysconfig; print(sysconfig.get_config_var('SOABI'))")
## the C++ tests, and the CUDA kernels on the CPU
ctest: $(BUILT)
	$(TOOLS) cmake -DPYLOSS_BUILD_TESTS=ON $(BUILD_DIR)
	$(TOOLS) cmake --build $(BUILD_DIR) $(MAKE_JOBS) --target cpp_tests
	$(TOOLS) ctest --test-dir $(BUILD_DIR) --output-on-failure -j $(JOBS)

## C++ tests, CUDA kernels and the boundary fuzz under AddressSanitizer and UBSan
sanitize: $(DEPS)
	$(call configure,build/sanitize,$(SANITIZE))
	$(TOOLS) cmake --build build/sanitize $(MAKE_JOBS) --target cpp_tests
	$(TOOLS) ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

# For tests/compile/test_nvcc_compile.py. Nothing without nvcc.
other-archs: $(DEPS)
	$(call configure,build/gpu-proof,-DPYLOSS_BUILD_PYTHON=OFF -DPYLOSS_CUDA_WERROR=ON \
	  "-DPYLOSS_CUDA_ARCHS=80-real;100-real")
	if grep -q 'CMAKE_CUDA_COMPILER:.*nvcc' build/gpu-proof/CMakeCache.txt; then \
	  $(TOOLS) cmake --build build/gpu-proof $(MAKE_JOBS) --target pyloss_cuda; fi

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
	find csrc packaging tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m basedpyright --pythonpath $(PY)

## formats Python, C++ and CUDA
format: $(DEPS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc packaging tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format -i

## the documentation as a site in site/
docs: $(DEPS)
	$(PY) -m pip install --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The wheel is for this Python and this machine; the ones to publish: .github/workflows/wheels.yml.
## archive, wheel, twine check, and an install from a local index: in build/release
release-check: $(DEPS)
	$(PY) -m pip install --disable-pip-version-check -q twine
	$(TOOLS) PYTHON=$(abspath $(PY)) PYLOSS_CMAKE_ARGS=-DPYLOSS_CUDA=OFF packaging/release_check.sh build/release

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
