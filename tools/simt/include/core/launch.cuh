// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/core/launch.cuh: the same function, which runs the kernel at once.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda_launch.h"

namespace fastbb {
namespace cuda {

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const CudaLaunch& sizes, void*,
                   const std::type_identity_t<Parameters>&... arguments) {
  if (sizes.grid < 1 || sizes.block < 1) return "an empty launch";
  simt::run(sizes.grid, sizes.block, sizes.shared_bytes, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace cuda
}  // namespace fastbb
