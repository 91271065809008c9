// SPDX-License-Identifier: Apache-2.0
// Small matrix products on packed, cache-resident operands: C (+)= A B.
//
// A register tile of up to tile_rows(n) rows x n vectors, n <= kTileVecs: per step of the inner
// dimension it loads n vectors of B and broadcasts one element of A per row. With 32 vector
// registers (AVX-512, NEON) that is at most 24 accumulators, 4 of B and 1 broadcast; with 16
// (AVX2, SSE2) 12, 2 and 1. 8 or more independent accumulators cover the latency of 2 FMA
// units x 4 cycles. 49 rows (a window of 7 x 7) run as 7 tiles of 7 rows where n <= 3.
//
// A is addressed by two strides, so the same code multiplies by a transposed A (dV = P^T dO).
// B and C rows are padded to whole vectors by the caller; C may be uninitialised when
// accumulate is false.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace fastbb {
namespace {

// Rows of a tile of `vecs` vectors.
constexpr int tile_rows(int vecs) {
  constexpr int kAccumulators = 6 * kTileVecs;
  return kAccumulators / vecs < 8 ? kAccumulators / vecs : 8;
}
constexpr int kTileRows = tile_rows(1);  // of any tile, at most

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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF av = broadcast(a[r * t.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) acc[r][n] = Dot::apply(acc[r][n], av, bv[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) store(t.c + r * t.c_row + n * kLanes, acc[r][n]);
  }
}

// The tile of exactly `rows` rows, at most kRows.
template <class Dot, int kVecs, int kRows = tile_rows(kVecs)>
FASTBB_INLINE void tile_of_rows(int64_t rows, const TileOperands& t) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of_rows<Dot, kVecs, kRows - 1>(rows, t);
  }
  tile<Dot, kRows, kVecs>(t);
}

// C [rows, kVecs * kLanes] (+)= A B in tiles of rows, cut evenly: 9 rows run as 5 + 4, not 8 + 1.
template <class Dot, int kVecs>
void panel(int64_t rows, TileOperands t) {
  const int64_t tiles = (rows + tile_rows(kVecs) - 1) / tile_rows(kVecs);
  for (int64_t i = 0, r = 0; i < tiles; ++i) {
    const int64_t n = (rows - r + tiles - i - 1) / (tiles - i);
    tile_of_rows<Dot, kVecs>(n, t);
    t.a += n * t.a_row;
    t.c += n * t.c_row;
    r += n;
  }
}

template <class Dot, int kVecs = kTileVecs>
FASTBB_INLINE void panel_of_vecs(int64_t vecs, int64_t rows, const TileOperands& t) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) return panel_of_vecs<Dot, kVecs - 1>(vecs, rows, t);
  }
  panel<Dot, kVecs>(rows, t);
}

// C [rows, vecs * kLanes] (+)= A [rows, inner] B [inner, vecs * kLanes]. Panels are cut evenly:
// 13 vectors run as 4+3+3+3 rather than 4+4+4+1.
template <class Dot>
void multiply(int64_t rows, int64_t vecs, TileOperands t) {
  const int64_t panels = (vecs + kTileVecs - 1) / kTileVecs;
  for (int64_t i = 0, v = 0; i < panels; ++i) {
    const int64_t n = (vecs - v + panels - i - 1) / (panels - i);
    panel_of_vecs<Dot>(n, rows, t);
    t.b += n * kLanes;
    t.c += n * kLanes;
    v += n;
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
