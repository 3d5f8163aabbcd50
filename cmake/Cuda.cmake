# The target _cuda: kernels for NVIDIA GPUs, in a library of their own that only a CUDA build of
# torch loads. FASTQUANT_CUDA says whether to build it; cuda_objects are its kernels, for which
# compiling is all that can be done without a GPU.
#
# Without them CUDA tensors take the fallback in plain torch ops. They have been emulated on the host
# (tests/native/cuda_emulation) and have not run on a GPU yet.
set(FASTQUANT_CUDA "auto" CACHE STRING
  "Build CUDA kernels: auto (where nvcc and a CUDA build of torch are found), on, off")
set_property(CACHE FASTQUANT_CUDA PROPERTY STRINGS auto on off)
string(TOLOWER "${FASTQUANT_CUDA}" _cuda)
if(NOT _cuda MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "FASTQUANT_CUDA must be auto, on or off, and is ${FASTQUANT_CUDA}.")
endif()

if(_cuda STREQUAL "off")
  message(STATUS "CUDA kernels: not built, FASTQUANT_CUDA is off")
  return()
endif()
if(_cuda STREQUAL "auto" AND NOT EXISTS "${_torch_dir}/lib/libtorch_cuda.so")
  message(STATUS "CUDA kernels: not built, torch is not a CUDA build (FASTQUANT_CUDA=on builds them anyway)")
  return()
endif()

include(CheckLanguage)
# Architectures are those of the target below; a compiler that CMake tries needs none.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(_cuda STREQUAL "on")
    message(FATAL_ERROR
      "FASTQUANT_CUDA is on, but no CUDA compiler was found: install a CUDA toolkit, or name its "
      "compiler with CMAKE_CUDA_COMPILER or the environment variable CUDACXX.")
  endif()
  message(STATUS "CUDA kernels: not built, no CUDA compiler was found (CUDACXX names one)")
  return()
endif()
enable_language(CUDA)
if(_cuda STREQUAL "on")
  find_package(CUDAToolkit REQUIRED)
else()
  find_package(CUDAToolkit)
  if(NOT TARGET CUDA::cudart_static)
    message(STATUS "CUDA kernels: not built, ${CMAKE_CUDA_COMPILER} comes without a CUDA toolkit's libraries")
    return()
  endif()
endif()

# A driver that runs torch may be too old for kernels of a later CUDA.
file(STRINGS "${_torch_dir}/version.py" _torch_cuda REGEX "^cuda.*= *'")
string(REGEX MATCH "[0-9]+" _torch_cuda "${_torch_cuda}")
if(_torch_cuda AND CUDAToolkit_VERSION_MAJOR GREATER _torch_cuda)
  if(_cuda STREQUAL "auto")
    message(STATUS
      "CUDA kernels: not built, torch is for CUDA ${_torch_cuda} and the toolkit is ${CUDAToolkit_VERSION} "
      "(FASTQUANT_CUDA=on builds them anyway)")
    return()
  endif()
  message(WARNING
    "torch is for CUDA ${_torch_cuda} and the toolkit is ${CUDAToolkit_VERSION}: a driver that runs torch "
    "may be too old for fastquant's kernels.")
endif()

# Machine code for each of these, and what later GPUs compile their own from.
set(FASTQUANT_CUDA_ARCHITECTURES "" CACHE STRING "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES; empty for all")
set(_architectures ${FASTQUANT_CUDA_ARCHITECTURES})
if(NOT _architectures)
  set(_architectures 75-real 80-real 86-real 89-real 90)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(_architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)
  endif()
endif()

message(STATUS "CUDA kernels: built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${_architectures}")

add_library(cuda_objects OBJECT
  csrc/cuda/batch_norm.cu
  csrc/cuda/clamped_sum.cu
  csrc/cuda/fake_quantize.cu
  csrc/cuda/folded_weight.cu
  csrc/cuda/histogram.cu
  csrc/cuda/learnable.cu
  csrc/cuda/observe.cu
  csrc/cuda/tickets.cu)
set_target_properties(cuda_objects PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_EXTENSIONS OFF
  CUDA_ARCHITECTURES "${_architectures}"
  POSITION_INDEPENDENT_CODE ON)
target_compile_options(cuda_objects PRIVATE
  # The CPU's bits: a multiply and an add stay two roundings.
  -fmad=false
  -Xfatbin=-compress-all
  -Xcompiler=-Wall,-Wextra,-fvisibility=hidden,-ffp-contract=off
  $<$<BOOL:${FASTQUANT_WERROR}>:-Werror=all-warnings>
  $<$<BOOL:${FASTQUANT_WERROR}>:-Xcompiler=-Werror>)

add_library(_cuda MODULE
  csrc/cuda/ops.cpp
  csrc/cuda/stream.cpp
  csrc/cuda/workspace.cpp
  $<TARGET_OBJECTS:cuda_objects>)
target_link_libraries(_cuda PRIVATE
  fastquant_options fastquant::torch CUDA::cudart_static ${CMAKE_DL_LIBS})
# Nothing of the runtime that is linked in shows: torch brings one of its own.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_cuda PROPERTIES
  PREFIX ""
  SUFFIX ".so"
  LINKER_LANGUAGE CXX
  CUDA_RUNTIME_LIBRARY None
  CXX_VISIBILITY_PRESET hidden
  VISIBILITY_INLINES_HIDDEN ON)
install(TARGETS _cuda LIBRARY DESTINATION fastquant)
