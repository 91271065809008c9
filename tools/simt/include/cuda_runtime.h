// SPDX-License-Identifier: Apache-2.0
// What CUDA sources take from the runtime's header, for a host compiler. Every thread of a block is
// a fiber of one thread of the host (simt.h), so what they share can be thread_local.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define __syncthreads() simt::barrier(__LINE__)

struct float2 {
  float x, y;
};

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int step) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = simt::exchange(mask, bits, step);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline bool __any_sync(uint32_t mask, bool x) { return simt::any(mask, x); }
