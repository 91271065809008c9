# SPDX-License-Identifier: Apache-2.0
# What FASTBB_CUDA asks for. Runs inside the build, and alone: cmake -DFASTBB_CUDA=on -P Cuda.cmake
if(NOT FASTBB_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "FASTBB_CUDA: must be auto, on or off, got '${FASTBB_CUDA}'")
endif()
if(FASTBB_CUDA STREQUAL "on")
  message(FATAL_ERROR "FASTBB_CUDA: must be auto or off, since no family has CUDA kernels yet, got 'on'")
endif()
