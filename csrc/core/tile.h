// SPDX-License-Identifier: Apache-2.0
// Small matrix products on packed, cache-resident operands: C (+)= A B.
//
// A register tile of up to 6 rows x kTileVecs vectors: per step of the inner dimension it loads
// kTileVecs vectors of B and broadcasts 6 elements of A for 6 * kTileVecs multiply-adds. With
// 32 vector registers (AVX-512, NEON) that is 24 accumulators, 4 of B and 1 broadcast; with 16
// (AVX2, SSE2) 12, 2 and 1. 12 or more independent accumulators cover the latency of 2 FMA
// units x 4 cycles.
//
// A is addressed by two strides, so the same code multiplies by a transposed A (dV = P^T dO).
// B and C rows are padded to whole vectors by the caller; C may be uninitialised when
// accumulate is false.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace fastbb {
namespace {

constexpr int kTileRows = 6;

// acc + a * b, element by element.
struct DotF32 {
  static FASTBB_INLINE VecF apply(VecF acc, VecF a, VecF b) { return acc + a * b; }
};

#if defined(FASTBB_ISA_AVX512_BF16)
// Each 32-bit lane holds two bfloat16: acc + a0*b0 + a1*b1.
struct DotBf16Pairs {
  static FASTBB_INLINE VecF apply(VecF acc, VecF a, VecF b) {
    return bit_cast<VecF>(
        _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
};
#endif

struct TileOperands {
  int64_t inner;
  const float* a;
  int64_t a_row, a_inner;  // strides of A
  const float* b;
  int64_t b_inner;  // stride between rows of B
  float* c;
  int64_t c_row;
  bool accumulate;
};

template <class Dot, int kRows, int kVecs>
void tile(const TileOperands& t) {
  VecF acc[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) {
      acc[r][n] = t.accumulate ? load(t.c + r * t.c_row + n * kLanes) : VecF{};
    }
  }
  const float* a = t.a;
  const float* b = t.b;
  for (int64_t i = 0; i < t.inner; ++i, a += t.a_inner, b += t.b_inner) {
    VecF bv[kVecs];
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) bv[n] = load(b + n * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF av = broadcast(a[r * t.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) acc[r][n] = Dot::apply(acc[r][n], av, bv[n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) store(t.c + r * t.c_row + n * kLanes, acc[r][n]);
  }
}

template <class Dot, int kRows>
FASTBB_INLINE void tile_of_rows(const TileOperands& t, int vecs) {
  switch (vecs) {
    case 1:
      return tile<Dot, kRows, 1>(t);
    case 2:
      return tile<Dot, kRows, 2>(t);
#if !defined(FASTBB_ISA_AVX2)
    case 3:
      if constexpr (kTileVecs >= 3) return tile<Dot, kRows, 3>(t);
      break;
    case 4:
      if constexpr (kTileVecs >= 4) return tile<Dot, kRows, 4>(t);
      break;
#endif
    default:
      break;
  }
}

// C [rows, vecs * kLanes] (+)= A [rows, inner] B [inner, vecs * kLanes]. Panels are cut evenly:
// 13 vectors run as 4+3+3+3 rather than 4+4+4+1.
template <class Dot>
void multiply(int64_t rows, int64_t vecs, const TileOperands& whole) {
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t vec_tiles = (vecs + kTileVecs - 1) / kTileVecs;
  for (int64_t vt = 0, v = 0; vt < vec_tiles; ++vt) {
    const int64_t nv = (vecs - v) / (vec_tiles - vt) + ((vecs - v) % (vec_tiles - vt) != 0);
    for (int64_t rt = 0, r = 0; rt < row_tiles; ++rt) {
      const int64_t nr = (rows - r) / (row_tiles - rt) + ((rows - r) % (row_tiles - rt) != 0);
      TileOperands t = whole;
      t.a += r * whole.a_row;
      t.b += v * kLanes;
      t.c += r * whole.c_row + v * kLanes;
      const int n = static_cast<int>(nv);
      switch (nr) {
        case 1:
          tile_of_rows<Dot, 1>(t, n);
          break;
        case 2:
          tile_of_rows<Dot, 2>(t, n);
          break;
        case 3:
          tile_of_rows<Dot, 3>(t, n);
          break;
        case 4:
          tile_of_rows<Dot, 4>(t, n);
          break;
        case 5:
          tile_of_rows<Dot, 5>(t, n);
          break;
        default:
          tile_of_rows<Dot, 6>(t, n);
          break;
      }
      r += nr;
    }
    v += nv;
  }
}

// Transposes rows [n, cols] of 32-bit elements (row stride `ld`) to out [cols, n] (row stride
// `out_ld`). n and cols are multiples of kLanes.
inline void transpose_rows(const float* rows, int64_t n, int64_t cols, int64_t ld, float* out,
                           int64_t out_ld) {
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      VecF block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(rows + (j + i) * ld + c);
      transpose_block(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * out_ld + j, block[i]);
    }
  }
}

}  // namespace
}  // namespace fastbb
