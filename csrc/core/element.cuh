// SPDX-License-Identifier: Apache-2.0
// Elements of tensors in CUDA kernels, one at a time, in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastbb {
namespace cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <class Element>
__device__ __forceinline__ Element narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace cuda
}  // namespace fastbb
