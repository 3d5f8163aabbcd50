# What people type. Everything runs in $(VENV), which is made on first use; delete it to start over.
PYTHON ?= python3
VENV ?= .venv
# The torch that is installed where $(VENV) has none.
TORCH ?= 2.13.0
# The torchvision that belongs to it, for tests and benchmarks only.
TORCHVISION ?= 0.28.0
# Compiler warnings are errors: OFF, or ON as in continuous integration.
WERROR ?= OFF
# Sanitizers that the kernels' own tests are built with, as in make native-test SANITIZE=address,undefined.
SANITIZE ?=
# More arguments for pytest, as in make test PYTEST_ARGS="-k histogram".
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
# Folders of Python too: an editable installation has to learn of files that come, go or move.
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f) \
	$(shell find python/fastquant -type d ! -name __pycache__)
NATIVE = $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/native/*.cpp benchmarks/*.cpp)
# Built against the torch of $(VENV): with isolation pip would download another one to build with.
INSTALL = $(BIN)/pip install --quiet --no-build-isolation \
	--config-settings=cmake.define.FASTQUANT_WERROR=$(WERROR) --editable

# For builds without pip; cmake and ninja may have come with it.
export PATH := $(abspath $(BIN)):$(PATH)
CMAKE_OPTIONS = -S . -G Ninja -DFASTQUANT_WERROR=$(WERROR) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
NATIVE_BUILD := build/native-$(or $(SANITIZE),plain)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test native-test cuda-emulation lint format audit bench bench-table limits wheel \
	cuda-compile cuda-objects cuda-check clean

help:
	@echo "make demo         a small CNN on real data, float to int8, beside torch.ao"
	@echo "make test         the whole test suite"
	@echo "make native-test  the kernels alone, without torch and Python"
	@echo "make lint         formatting, lint and types; make format mends the formatting"
	@echo "make cuda-check   the CUDA kernels, on a machine with a GPU: tests, sanitizer, benchmarks"
	@echo "make audit        stable ABI, symbols of the built library"
	@echo "make bench        measure against torch.ao; make bench-table updates the README"
	@echo "make limits       what bounds counting a histogram on this machine"
	@echo "make wheel        build a wheel into dist/"
	@echo "make clean        remove what was built; $(VENV) stays"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# One thread for each of two processes: more of them would wait for each other. Tests of threading
# ask for their own.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

native-test: $(VENV)/.installed
	cmake -B $(NATIVE_BUILD) $(CMAKE_OPTIONS) \
		-DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		$(if $(SANITIZE),-DCMAKE_CXX_FLAGS="-fsanitize=$(SANITIZE) -fno-sanitize-recover=all")
	cmake --build $(NATIVE_BUILD) --target kernels_test statistics_test
	ctest --test-dir $(NATIVE_BUILD) --output-on-failure

# The CUDA kernels on the CPU, which `make test` runs too: here under sanitizers, or with
# FASTQUANT_EMULATION_RACES=1 in the environment looked over for races. AddressSanitizer has to be
# there before Python, and misses how to throw without libstdc++; -s shows what an emulation says
# that ends the process.
cuda-emulation: $(VENV)/.dev
	FASTQUANT_EMULATION_FLAGS="$(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)" \
		LD_PRELOAD="$(if $(SANITIZE),$(foreach library,libasan.so libstdc++.so.6,$(shell g++ -print-file-name=$(library))))" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/test_cuda_emulation.py

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

audit: $(VENV)/.dev
	$(BIN)/python tools/audit.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run_all.py

bench-table: $(VENV)/.installed
	$(BIN)/python benchmarks/readme_table.py

limits: $(VENV)/.installed
	@cmake -B build/limits $(CMAKE_OPTIONS) -DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Release >build/limits.log
	@cmake --build build/limits --target limits >>build/limits.log
	@build/limits/limits

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# Compiles the CUDA sources where there are some and nvcc is there to do it; needs no GPU.
cuda-compile: $(VENV)/.dev
	@if [ ! -d csrc/cuda ]; then echo "cuda-compile: no CUDA sources"; \
	elif ! command -v nvcc >/dev/null; then echo "cuda-compile: skipped, no nvcc"; \
	else cmake -B build/cuda $(CMAKE_OPTIONS) -DCMAKE_BUILD_TYPE=Release -DFASTQUANT_CUDA=on \
		-DFASTQUANT_CUDA_ARCHITECTURES= && \
		cmake --build build/cuda --target _cuda && \
		$(BIN)/python tools/check_cuda.py build/cuda/_cuda.so; fi

# The kernels alone, for one architecture: what continuous integration has the time for.
cuda-objects: $(VENV)/.installed
	@if ! command -v nvcc >/dev/null; then echo "cuda-objects: skipped, no nvcc"; \
	else cmake -B build/cuda-objects $(CMAKE_OPTIONS) -DCMAKE_BUILD_TYPE=Release -DFASTQUANT_CUDA=on \
		-DFASTQUANT_CUDA_ARCHITECTURES=90-real && \
		cmake --build build/cuda-objects --target cuda_objects; fi

# On a machine with a GPU: builds, tests, sanitizes and measures the kernels there. Takes the
# interpreter as it is and installs nothing: make cuda-check PYTHON=python3.12
cuda-check:
	$(PYTHON) tools/cuda_check.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.installed $(VENV)/.dev

# --- the environment: each stamp is made anew when what it stands for has changed ---

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastquant needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		{ echo "Installing torch $(TORCH) into $(VENV)"; $(BIN)/pip install torch==$(TORCH); }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@for cxx in $$CXX c++ g++ clang++; do command -v $$cxx >/dev/null && exit 0; done; \
		echo "fastquant needs a C++17 compiler and found none (c++, g++, clang++). Install one,"; \
		echo "on Debian or Ubuntu with: apt install g++, or point CXX at it."; exit 1
	@echo "Building and installing fastquant into $(VENV)"
	@$(BIN)/pip install --quiet 'scikit-build-core>=0.10' ninja $$(command -v cmake >/dev/null || echo cmake)
	@$(INSTALL) '.[demo]'
	@touch $@

# torchvision's models are tested too. Its wheel wants a torch of its own, a CUDA build: hence
# --no-deps; where it cannot be had, those tests are skipped.
$(VENV)/.dev: pyproject.toml | $(VENV)/.installed
	@$(INSTALL) '.[dev]'
	@$(BIN)/pip install --quiet --no-deps torchvision==$(TORCHVISION) pillow || true
	@touch $@
