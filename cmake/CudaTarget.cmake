# SPDX-License-Identifier: Apache-2.0
# Defines the library fastbb_cuda, where Cuda.cmake found a compiler that works.
if(NOT FASTBB_NVCC)
  return()
endif()

# A build tree remembers its first compiler; another one now, or none there any more, starts anew.
if(DEFINED CACHE{CMAKE_CUDA_COMPILER} AND NOT CMAKE_CUDA_COMPILER STREQUAL FASTBB_NVCC)
  unset(CMAKE_CUDA_COMPILER CACHE)
  unset(CMAKE_CUDA_HOST_COMPILER CACHE)
  file(REMOVE "${CMAKE_BINARY_DIR}/CMakeFiles/${CMAKE_VERSION}/CMakeCUDACompiler.cmake")
endif()
set(ENV{CUDACXX} "${FASTBB_NVCC}")

# Real code for each architecture, and PTX of the newest for those to come.
set(CMAKE_CUDA_ARCHITECTURES ${FASTBB_CUDA_SM})
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND "-real")
list(APPEND CMAKE_CUDA_ARCHITECTURES "${FASTBB_CUDA_PTX}-virtual")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# The runtime in the library itself: it loads where there is no CUDA, and meets no other version.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# A toolkit that cannot compile (no host compiler that it accepts, say) stops the build only where
# CUDA was asked for.
if(FASTBB_CUDA STREQUAL "auto")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "CUDA kernels: none, since ${FASTBB_NVCC} does not compile")
    set(FASTBB_NVCC "")
    return()
  endif()
endif()
enable_language(CUDA)

add_library(fastbb_cuda SHARED)
target_include_directories(fastbb_cuda PUBLIC csrc)
# Line numbers for profilers and sanitizers cost nothing at run time, and compressed a fifth of the
# size. Spills are reported here and are errors in the tests.
target_compile_options(fastbb_cuda PRIVATE
  -lineinfo -Xfatbin=-compress-all --threads 2 -Xptxas=-warn-spills -Xcompiler=-Wall,-Wextra
  $<$<BOOL:${FASTBB_WERROR}>:-Werror=all-warnings>)
