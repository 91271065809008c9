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
#define blockDim (simt::block_size())
#define __syncthreads() simt::barrier(__LINE__)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
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

inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

inline void __syncwarp(uint32_t mask = 0xffffffffu) { simt::warp_barrier(mask); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int step) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &x, sizeof x);
  for (uint32_t& word : words) word = simt::exchange(mask, word, step);
  std::memcpy(&x, words, sizeof x);
  return x;
}

template <class T>
T __shfl_sync(uint32_t mask, T x, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = simt::take(mask, bits, lane);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __ballot_sync(uint32_t mask, bool x) { return simt::ballot(mask, x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }

inline bool __any_sync(uint32_t mask, bool x) { return simt::any(mask, x); }
