// SPDX-License-Identifier: Apache-2.0
// Products of each element type on tensor cores: what the CUDA kernels of window attention read
// from rows in shared memory, and how they turn accumulators into operands.
//
// Rows in shared memory are padded by 16 bytes: eight of them start in eight different groups of
// four banks, as ldmatrix wants.
#pragma once

#include "core/ptx.cuh"
#include "ops/window_attention/window_attention_cuda.h"

namespace fastbb {
namespace cuda {

constexpr int kThreads = kWindowCudaThreads;
constexpr int kQueries = kWindowCudaQueries;
constexpr float kLog2E = 1.44269504088896341f;

// Products of one element type. kStep: how far one mma reaches along the summed dimension. Both
// operands may take that dimension in any order as long as it is the same, which saves float32 a
// transposition: its accumulators hold columns 2t and 2t + 1 where its operands want t and t + 4.
template <class Math, class T>
struct HalfFragments {
  using Element = T;
  static constexpr int kStep = 16;
  static constexpr int kChunk = 8;  // elements of 16 bytes

  // Rows [0, 16) of a row-major tile, channels [c, c + 16), as B: rows are summed over. Registers
  // 0 and 1 are of the first 8 channels.
  template <int kLd>
  static __device__ void load_summed_rows(uint32_t (&b)[4], const T (*rows)[kLd], int c) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(b, ptx::shared_address(&rows[lane % 16][c + lane / 16 * 8]));
  }
  // Rows [0, 16), columns [c, c + 16) as A of the transposed matrix: rows are summed over.
  template <int kLd>
  static __device__ void load_a_transposed(uint32_t (&a)[4], const T (*rows)[kLd], int c) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 16 * 8 + lane % 8;
    ptx::ldmatrix_x4_trans(a, ptx::shared_address(&rows[row][c + lane / 8 % 2 * 8]));
  }
  // Accumulators of 16 rows and, from tile n on, 16 columns -> A.
  template <int kTiles>
  static __device__ void pack(uint32_t (&a)[4], const float (&c)[kTiles][4], int n) {
    a[0] = Math::pair(c[n][0], c[n][1]);
    a[1] = Math::pair(c[n][2], c[n][3]);
    a[2] = Math::pair(c[n + 1][0], c[n + 1][1]);
    a[3] = Math::pair(c[n + 1][2], c[n + 1][3]);
  }
  // Multiplies the rows that load_summed_rows has read by factors of their own.
  static __device__ void scale_rows(uint32_t (&b)[4], const float* factors) {
    const int row = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* factor = factors + row + i % 2 * 8;
      const float2 x = Math::unpair(b[i]);
      b[i] = Math::pair(x.x * factor[0], x.y * factor[1]);
    }
  }
  static __device__ void store_pair(T* to, float low, float high) {
    *reinterpret_cast<uint32_t*>(to) = Math::pair(low, high);
  }
};

struct HalfMath : HalfFragments<HalfMath, __half> {
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
  static __device__ uint32_t pair(float low, float high) { return ptx::pack_f16x2(low, high); }
  static __device__ float2 unpair(uint32_t x) { return ptx::unpack_f16x2(x); }
  static __device__ Element narrow(float x) { return __float2half_rn(x); }
  static __device__ float widen(Element x) { return __half2float(x); }
};

struct Bf16Math : HalfFragments<Bf16Math, __nv_bfloat16> {
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  }
  static __device__ uint32_t pair(float low, float high) { return ptx::pack_bf16x2(low, high); }
  static __device__ float2 unpair(uint32_t x) { return ptx::unpack_bf16x2(x); }
  static __device__ Element narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ float widen(Element x) { return __bfloat162float(x); }
};

struct FloatFragments {
  using Element = float;
  static constexpr int kStep = 8;
  static constexpr int kChunk = 4;

  // Rows [0, 8), channels [c, c + 16). Row 2t stands where the instruction has t, 2t + 1 where it
  // has t + 4.
  template <int kLd>
  static __device__ void load_summed_rows(uint32_t (&b)[4], const float (*rows)[kLd], int c) {
    const int lane = threadIdx.x % 32;
    const float* at = &rows[lane % 4 * 2][c + lane / 4];
    b[0] = __float_as_uint(at[0]);
    b[1] = __float_as_uint(at[kLd]);
    b[2] = __float_as_uint(at[8]);
    b[3] = __float_as_uint(at[kLd + 8]);
  }
  // Rows [0, 8) in the same order.
  template <int kLd>
  static __device__ void load_a_transposed(uint32_t (&a)[4], const float (*rows)[kLd], int c) {
    const int lane = threadIdx.x % 32;
    const float* at = &rows[lane % 4 * 2][c + lane / 4];
    a[0] = __float_as_uint(at[0]);
    a[1] = __float_as_uint(at[8]);
    a[2] = __float_as_uint(at[kLd]);
    a[3] = __float_as_uint(at[kLd + 8]);
  }
  static __device__ void scale_rows(uint32_t (&b)[4], const float* factors) {
    const float* factor = factors + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = __float_as_uint(__uint_as_float(b[i]) * factor[i % 2]);
  }
  static __device__ void store_pair(float* to, float low, float high) {
    *reinterpret_cast<float2*>(to) = {low, high};
  }
  template <int kTiles>
  static __device__ void pack(uint32_t (&a)[4], const float (&c)[kTiles][4], int n) {
    a[0] = __float_as_uint(c[n][0]);
    a[1] = __float_as_uint(c[n][2]);
    a[2] = __float_as_uint(c[n][1]);
    a[3] = __float_as_uint(c[n][3]);
  }
  static __device__ float narrow(float x) { return x; }
  static __device__ float widen(float x) { return x; }
};

// float32 rounded to 11 bits, as torch's own products under allow_tf32.
struct Tf32Math : FloatFragments {
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t rounded[4] = {ptx::round_tf32(a[0]), ptx::round_tf32(a[1]),
                                 ptx::round_tf32(a[2]), ptx::round_tf32(a[3])};
    ptx::mma_m16n8k8_tf32(c, rounded, ptx::round_tf32(b0), ptx::round_tf32(b1));
  }
};

// float32 as a sum of two 11-bit numbers, and three of their four products: a relative error of
// about 2^-21 per product, at a third of the tf32 rate, which is still above that of FMA units.
struct FloatMath : FloatFragments {
  static __device__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    // Infinities, NaN, and what would round to infinity stay whole.
    const bool whole = (bits & 0x7fffffffu) >= 0x7f7ff000u;
    high = whole ? bits : (bits + 0x1000u) & 0xffffe000u;
    low = whole ? 0u : __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
  }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t high[4], low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
    split(b0, b_high[0], b_low[0]);
    split(b1, b_high[1], b_low[1]);
    ptx::mma_m16n8k8_tf32(c, low, b_high[0], b_high[1]);
    ptx::mma_m16n8k8_tf32(c, high, b_low[0], b_low[1]);
    ptx::mma_m16n8k8_tf32(c, high, b_high[0], b_high[1]);
  }
};

// Rows [0, 16), channels [c, c + kStep) as A: channels are summed over.
template <class Math, int kLd>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const typename Math::Element (*rows)[kLd],
                                       int c) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, ptx::shared_address(&rows[lane % 16][c + lane / 16 * Math::kChunk]));
}

// Rows [0, 16), channels [c, c + kStep) as B of two tiles: channels are summed over, registers 0
// and 1 are of the first 8 rows.
template <class Math, int kLd>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const typename Math::Element (*rows)[kLd],
                                       int c) {
  const int lane = threadIdx.x % 32;
  const int row = lane / 16 * 8 + lane % 8;
  ptx::ldmatrix_x4(b, ptx::shared_address(&rows[row][c + lane / 8 % 2 * Math::kChunk]));
}

// c += A B^T over all channels, for 16 rows of A and 8 kTiles rows of B.
template <class Math, int kTiles, int kLd>
__device__ __forceinline__ void multiply_rows(float (&c)[kTiles][4],
                                              const typename Math::Element (*a_rows)[kLd],
                                              const typename Math::Element (*b_rows)[kLd]) {
#pragma unroll
  for (int channel = 0; channel < kLd - Math::kChunk; channel += Math::kStep) {
    uint32_t a[4];
    load_a<Math>(a, a_rows, channel);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_b<Math>(b, b_rows + n * 8, channel);
      Math::mma(c[n], a, b[0], b[1]);
      Math::mma(c[n + 1], a, b[2], b[3]);
    }
  }
}

// out += x B for accumulators x of 16 rows and 8 kTiles columns, and as many rows of B, each of
// them multiplied by its factor where there are factors. Columns are channels [0, 8 kOutTiles).
template <class Math, int kTiles, int kOutTiles, int kLd>
__device__ __forceinline__ void multiply_summed_rows(float (&out)[kOutTiles][4],
                                                     const float (&x)[kTiles][4],
                                                     const typename Math::Element (*b_rows)[kLd],
                                                     const float* factors = nullptr) {
#pragma unroll
  for (int n = 0; n < kTiles * 8; n += Math::kStep) {
    uint32_t a[4];
    Math::pack(a, x, n / 8);
#pragma unroll
    for (int c = 0; c < kOutTiles; c += 2) {
      uint32_t b[4];
      Math::load_summed_rows(b, b_rows + n, c * 8);
      if (factors != nullptr) Math::scale_rows(b, factors + n);
      Math::mma(out[c], a, b[0], b[1]);
      Math::mma(out[c + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace cuda
}  // namespace fastbb
