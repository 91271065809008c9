# SPDX-License-Identifier: Apache-2.0
# Defines fastbb::torch: headers and libtorch of the Python that builds us.
#
# find_package(Torch) is not used: with a CUDA build of torch it demands a CUDA toolkit even for
# CPU code, and it overrides architecture settings.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util as u, pathlib as p; r = p.Path(u.find_spec('torch').origin).parent; ns = {}; exec((r / 'version.py').read_text(), ns); print(ns['__version__'], r, sep=';')"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET _torch 0 FASTBB_TORCH_VERSION)
list(GET _torch 1 _torch_root)
message(STATUS "torch ${FASTBB_TORCH_VERSION}: ${_torch_root}")

find_library(FASTBB_TORCH_CPU torch_cpu PATHS "${_torch_root}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(fastbb_torch INTERFACE)
add_library(fastbb::torch ALIAS fastbb_torch)
target_include_directories(fastbb_torch SYSTEM INTERFACE
  "${_torch_root}/include" "${_torch_root}/include/torch/csrc/api/include")
# The lowest torch a wheel must run on: 2.13. Headers newer than that are refused at compile time.
target_compile_definitions(fastbb_torch INTERFACE TORCH_TARGET_VERSION=0x020d000000000000)
target_link_libraries(fastbb_torch INTERFACE "${FASTBB_TORCH_CPU}")
