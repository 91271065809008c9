// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of window attention share: fragments of each element type, the way from
// tokens to rows of the strided map, asynchronous loads of rows.
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
template <class T>
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
};

struct HalfMath : HalfFragments<__half> {
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
  // Accumulators of 16 rows and, from tile n on, 16 columns -> A.
  template <int kTiles>
  static __device__ void pack(uint32_t (&a)[4], const float (&c)[kTiles][4], int n) {
    a[0] = ptx::pack_f16x2(c[n][0], c[n][1]);
    a[1] = ptx::pack_f16x2(c[n][2], c[n][3]);
    a[2] = ptx::pack_f16x2(c[n + 1][0], c[n + 1][1]);
    a[3] = ptx::pack_f16x2(c[n + 1][2], c[n + 1][3]);
  }
  static __device__ Element narrow(float x) { return __float2half_rn(x); }
  static __device__ float widen(Element x) { return __half2float(x); }
};

struct Bf16Math : HalfFragments<__nv_bfloat16> {
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  }
  template <int kTiles>
  static __device__ void pack(uint32_t (&a)[4], const float (&c)[kTiles][4], int n) {
    a[0] = ptx::pack_bf16x2(c[n][0], c[n][1]);
    a[1] = ptx::pack_bf16x2(c[n][2], c[n][3]);
    a[2] = ptx::pack_bf16x2(c[n + 1][0], c[n + 1][1]);
    a[3] = ptx::pack_bf16x2(c[n + 1][2], c[n + 1][3]);
  }
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

// A window of an image, or an image.
struct Problem {
  int64_t index, image;
  int window;     // of its image
  int top, left;  // first row and column on the rolled, padded map
  bool last_row, last_column;
};

__device__ __forceinline__ Problem problem_at(const WindowAttentionParams& p, int64_t index) {
  Problem problem{index, index, 0, 0, 0, false, false};
  if (p.full) return problem;
  const int windows = p.windows_y * p.windows_x;
  problem.image = index / windows;
  problem.window = static_cast<int>(index - problem.image * windows);
  const int y = problem.window / p.windows_x;
  const int x = problem.window - y * p.windows_x;
  problem.top = y * p.window_h;
  problem.left = x * p.window_w;
  problem.last_row = y == p.windows_y - 1;
  problem.last_column = x == p.windows_x - 1;
  return problem;
}

// Row and column of a token in its window. The quotient is exact: of up to 65536 + 63 tokens, the
// nearest to a border is half a token away, 1 / (2 window_w), and the product errs by 2^-23 of it.
struct Slot {
  int row, column;
};

__device__ __forceinline__ Slot slot_of(const WindowAttentionParams& p, float inverse_w,
                                        int token) {
  const int row = static_cast<int>((static_cast<float>(token) + 0.5f) * inverse_w);
  return {row, token - row * p.window_w};
}

// Side of the shift boundary on both axes.
__device__ __forceinline__ int region_of(const WindowAttentionParams& p, const Problem& problem,
                                         Slot slot) {
  const bool below = problem.last_row && slot.row >= p.window_h - p.shift_h;
  const bool right = problem.last_column && slot.column >= p.window_w - p.shift_w;
  return 2 * below + right;
}

// Where a token lies on the map; y < 0 for padding. A list of tokens is a map of one row.
struct Place {
  int y, x;
};

// One axis: coordinate after the roll -> coordinate on the map, or -1.
__device__ __forceinline__ int place_on_axis(bool roll_first, int rolled, int roll, int map,
                                             int padded) {
  if (roll_first && rolled >= map) return -1;
  const int length = roll_first ? map : padded;
  int at = rolled + roll;
  if (at >= length) at -= length;
  return at < map ? at : -1;
}

__device__ __forceinline__ Place place_of(const WindowAttentionParams& p,
                                          const WindowAttentionCudaPlan& plan,
                                          const Problem& problem, float inverse_w, int token) {
  if (p.full) return {0, token};
  const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
  const Slot slot = slot_of(p, inverse_w, token);
  const int y = place_on_axis(roll_first, problem.top + slot.row, plan.roll_h, p.map_h,
                              p.windows_y * p.window_h);
  const int x = place_on_axis(roll_first, problem.left + slot.column, plan.roll_w, p.map_w,
                              p.windows_x * p.window_w);
  return x < 0 ? Place{-1, 0} : Place{y, x};
}

// The first channel of a token's head; the place must be real.
template <class T>
__device__ __forceinline__ T* row_at(const TokenMap& map, int64_t image, int64_t head,
                                     Place place) {
  return static_cast<T*>(map.data) + image * map.image + head * map.head + place.y * map.row +
         place.x * map.column;
}

// Asks for one chunk of 16 bytes of a row: `from` is the row, or null for zeros, or for `pad`,
// which are the float32 channels of a padded token. Channels from `count` on become zeros.
template <class Math>
__device__ __forceinline__ void load_chunk(const typename Math::Element* from, const float* pad,
                                           int c, int count, bool aligned,
                                           typename Math::Element* to) {
  using Element = typename Math::Element;
  if (aligned && (from != nullptr || pad == nullptr || c >= count)) {
    const bool valid = from != nullptr && c < count;
    ptx::cp_async16(ptx::shared_address(to), valid ? from + c : nullptr, valid);
    return;
  }
#pragma unroll
  for (int e = 0; e < Math::kChunk; ++e) {
    Element value = Math::narrow(0.0f);
    if (c + e < count) {
      if (from != nullptr) {
        value = from[c + e];
      } else if (pad != nullptr) {
        value = Math::narrow(pad[c + e]);
      }
    }
    to[e] = value;
  }
}

// 1 / max(|row|, eps) of kRows rows in shared memory, a power of two of threads for each.
template <class Math, int kRows, int kLd>
__device__ __forceinline__ void inverse_lengths(const typename Math::Element (*rows)[kLd],
                                                float* inverse) {
  constexpr int kPerRow = kThreads / kRows;
  const int row = threadIdx.x / kPerRow;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = threadIdx.x % kPerRow; c < kLd - Math::kChunk; c += kPerRow) {
    const float x = Math::widen(rows[row][c]);
    sum += x * x;
  }
  sum = ptx::lanes_sum<kPerRow>(sum);
  if (threadIdx.x % kPerRow == 0) inverse[row] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
}

}  // namespace cuda
}  // namespace fastbb
