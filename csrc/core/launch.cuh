// SPDX-License-Identifier: Apache-2.0
// Launches a kernel. Errors come back as text, or nullptr, since exceptions would have to agree on
// a C++ library across the border of fastbb_cuda.
//
// The runtime is linked statically, so what it remembers as its last error is ours. It works in
// the context that is current in the calling thread, which torch's device guard has set.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/cuda_launch.h"

namespace fastbb {
namespace cuda {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;  // along x
constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kMaxShared = 228 * 1024;   // of any device; each allows less
constexpr int64_t kPlainShared = 48 * 1024;  // what a kernel gets without asking

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Before sizes are narrowed to what a launch takes.
inline const char* launch_problem(const CudaLaunch& launch) {
  if (launch.grid < 1 || launch.grid > kMaxGrid) return "the grid is not of 1 to 2^31-1 blocks";
  if (launch.block < 1 || launch.block > kMaxBlock) return "a block is not of 1 to 1024 threads";
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxShared) {
    return "a block's shared memory is not 0 to 228 KB";
  }
  return nullptr;
}

// Puts the kernel on the stream (a cudaStream_t) and does not wait for it.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const CudaLaunch& sizes, void* stream,
                   const std::type_identity_t<Parameters>&... arguments) {
  if (const char* problem = launch_problem(sizes)) return problem;
  const auto shared = static_cast<int>(sizes.shared_bytes);
  if (shared > kPlainShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return error_text(error);
    }
  }
  kernel<<<static_cast<unsigned>(sizes.grid), static_cast<unsigned>(sizes.block), shared,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return error_text(cudaGetLastError());
}

}  // namespace cuda
}  // namespace fastbb
