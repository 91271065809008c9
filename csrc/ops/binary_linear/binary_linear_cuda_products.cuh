// SPDX-License-Identifier: Apache-2.0
// Products of the tiles in shared memory, and the ones of their rows.
#pragma once

#include "ops/binary_linear/binary_linear_cuda_tile.cuh"

namespace fastbb {
namespace cuda {

// Whether the architecture multiplies bits; where it does not, ptxas would spread them for every
// product anew.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kBitProducts = false;
#else
constexpr bool kBitProducts = true;
#endif

// What the sums of a ternary row have too much: the ones of b, from the complemented plane.
template <int kPlanes>
constexpr bool kComplemented = kBitProducts && kPlanes == 2;

// Ones that this thread has counted: of rows lane / 4 and 8 further of a tile of a, and of column
// lane / 4 of tiles of b.
template <int kRows>
struct Ones {
  int32_t row[2];
  int32_t column[kColumnTiles / Warps<kRows>::kWarpRows];
};

template <int kRows>
__device__ __forceinline__ void count_rows(Ones<kRows>& ones, const Tile& tile, int row_tile,
                                           int plane, const uint32_t (&a)[4]) {
  if (row_tile != tile.warp_column) return;
  const int sign = plane == 0 ? 1 : -1;
  ones.row[0] += sign * (__popc(a[0]) + __popc(a[2]));
  ones.row[1] += sign * (__popc(a[1]) + __popc(a[3]));
}

// Bits `step`, 8, 16 and 24 further, as four numbers 0 or 1.
__device__ __forceinline__ uint32_t spread(uint32_t word, int step) {
  return word >> step & 0x01010101u;
}

// The difference of the bits of two planes, as four of int8. The high bit of each byte stops what
// it would borrow from the next.
__device__ __forceinline__ uint32_t spread_difference(uint32_t positive, uint32_t negative,
                                                      int step) {
  return ((spread(positive, step) | 0x80808080u) - spread(negative, step)) ^ 0x80808080u;
}

// 256 bits of K by products of int8: eight of them, of 32 numbers each.
template <int kRowTiles, int kPlanes>
__device__ __forceinline__ void multiply_int8(const uint32_t (&a)[kPlanes][kRowTiles][4],
                                              const uint32_t (&b)[kColumnTiles][2],
                                              int32_t (&sums)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t right[kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      right[j][0] = spread(b[j][0], step);
      right[j][1] = spread(b[j][1], step);
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t left[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        left[r] = kPlanes == 1 ? spread(a[0][i][r], step)
                               : spread_difference(a[0][i][r], a[kPlanes - 1][i][r], step);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        ptx::mma_m16n8k32_s8(sums[i][j], left, right[j][0], right[j][1]);
      }
    }
  }
}

// Adds the products of a chunk, 256 bits at a time.
template <int kRows, int kPlanes>
__device__ __forceinline__ void multiply(const BinaryStage<kRows, kPlanes>& stage, const Tile& tile,
                                         int32_t (&sums)[Warps<kRows>::kRowTiles][kColumnTiles][4],
                                         Ones<kRows>& ones) {
  constexpr int kRowTiles = Warps<kRows>::kRowTiles;
  constexpr int kWarpRows = Warps<kRows>::kWarpRows;
  const int lane = threadIdx.x % 32;
  const int row = tile.warp_row * kRowTiles * 16 + lane % 16;
  const int row_unit = unit_of_a(row, lane / 16);
  const int column = tile.warp_column * kColumnTiles * 8 + column_of(lane / 16, lane % 8);
  const int column_unit = unit_of_b(column, lane / 8 % 2);
#pragma unroll(kBitProducts&& kPlanes == 1 ? kUnits / 2 : 1)
  for (int unit = 0; unit < kUnits; unit += 2) {
    uint32_t b[kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t both[4];
      ptx::ldmatrix_x4(
          both, ptx::shared_address(&stage.b[column + j / 2 * 16][(column_unit ^ unit) * kUnit]));
      b[j][0] = both[0];
      b[j][1] = both[1];
      b[j + 1][0] = both[2];
      b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      if (j % kWarpRows == tile.warp_row) {
        ones.column[j / kWarpRows] += __popc(b[j][0]) + __popc(b[j][1]);
      }
    }
    uint32_t a[kPlanes][kRowTiles][4];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t (&words)[4] = a[plane][i];
        ptx::ldmatrix_x4(
            words, ptx::shared_address(&stage.a[plane][row + i * 16][(row_unit ^ unit) * kUnit]));
        count_rows(ones, tile, i, plane, words);
        if constexpr (kBitProducts) {
#pragma unroll
          for (int r = 0; r < 4; ++r) words[r] = plane == 0 ? words[r] : ~words[r];
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
            ptx::mma_m16n8k256_b1(sums[i][j], words, b[j][0], b[j][1]);
          }
        }
      }
    }
    if constexpr (!kBitProducts) multiply_int8<kRowTiles, kPlanes>(a, b, sums);
  }
}

// Ones of all rows and columns to shared memory.
template <int kRows>
__device__ __forceinline__ void publish(const Ones<kRows>& ones, const Tile& tile,
                                        int32_t* row_ones, int32_t* column_ones) {
  constexpr int kRowTiles = Warps<kRows>::kRowTiles;
  constexpr int kWarpRows = Warps<kRows>::kWarpRows;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t count = ptx::lanes_sum<4>(ones.row[half]);
    const int row = (tile.warp_row * kRowTiles + tile.warp_column) * 16 + half * 8 + lane / 4;
    if (lane % 4 == 0 && tile.warp_column < kRowTiles) row_ones[row] = count;
  }
#pragma unroll
  for (int j = 0; j < kColumnTiles / kWarpRows; ++j) {
    const int32_t count = ptx::lanes_sum<4>(ones.column[j]);
    const int column = column_of(j * kWarpRows + tile.warp_row, lane / 4);
    if (lane % 4 == 0) column_ones[tile.warp_column * kColumnTiles * 8 + column] = count;
  }
}

}  // namespace cuda
}  // namespace fastbb
