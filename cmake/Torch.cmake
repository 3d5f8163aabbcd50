# fastquant::torch, the little of libtorch that the Stable ABI needs: headers and
# libtorch_cpu.so. find_package(Torch) would pull in every dependency of a torch build and
# fails where torch is a CUDA build and no toolkit is installed.
set(FASTQUANT_TORCH_DIR "" CACHE PATH
  "The package torch to build against, if not that of the Python that builds: to cross-compile")
set(_torch_dir "${FASTQUANT_TORCH_DIR}")
if(NOT _torch_dir)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE _torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT _torch_dir)
  message(FATAL_ERROR
    "fastquant builds against the torch (2.10 or newer) that it will run with, and the Python of "
    "this build, ${Python_EXECUTABLE}, finds none. If torch is installed, pip's build isolation "
    "hides it: pip install scikit-build-core, then pip install --no-build-isolation . "
    "Otherwise install torch first.")
endif()

file(STRINGS "${_torch_dir}/version.py" _version_line REGEX "^__version__ = ")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" _torch_version "${_version_line}")
if(_torch_version VERSION_LESS 2.10)
  message(FATAL_ERROR "fastquant needs torch >= 2.10; ${_torch_dir} holds ${_torch_version}.")
endif()
if(NOT EXISTS "${_torch_dir}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "No libtorch_cpu.so under ${_torch_dir}/lib: fastquant builds on Linux only.")
endif()
message(STATUS "Building against torch ${_torch_version} in ${_torch_dir}")

add_library(fastquant::torch INTERFACE IMPORTED)
target_include_directories(fastquant::torch SYSTEM INTERFACE "${_torch_dir}/include")
# Calls nothing newer than 2.10, and makes any unstable header an #error.
target_compile_definitions(fastquant::torch INTERFACE
  TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(fastquant::torch INTERFACE "${_torch_dir}/lib/libtorch_cpu.so")
# At run time torch is loaded already, wherever it is installed: no path may be recorded.
set(CMAKE_SKIP_RPATH ON)
