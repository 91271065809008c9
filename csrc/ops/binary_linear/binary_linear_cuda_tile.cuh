// SPDX-License-Identifier: Apache-2.0
// Tiles of a and b: where they lie in shared memory, and how they get there.
#pragma once

#include <cuda_runtime.h>

#include "core/ptx.cuh"
#include "ops/binary_linear/binary_linear_cuda.h"

namespace fastbb {
namespace cuda {

constexpr int kChunk = kBinaryCudaChunkBytes;
constexpr int kUnit = 16;  // bytes of an asynchronous copy, and of a row of a matrix
constexpr int kUnits = kChunk / kUnit;
constexpr int kStages = kBinaryCudaStages;
constexpr int kColumns = kBinaryCudaColumns;
constexpr int kWarpColumns = 4;  // warps side by side
constexpr int kColumnTiles = 4;  // of a warp, of 8 columns each

// Of a tile of kRows rows.
template <int kRows>
struct Warps {
  static constexpr int kThreads = binary_cuda_threads(kRows);
  static constexpr int kWarpRows = kThreads / 32 / kWarpColumns;  // warps one below the other
  static constexpr int kRowTiles = kRows / kWarpRows / 16;        // of a warp, of 16 rows each
  static_assert(kRowTiles <= kWarpColumns && kColumnTiles % kWarpRows == 0);
};

template <int kRows, int kPlanes>
struct BinaryStage {
  unsigned char a[kPlanes][kRows][kChunk];
  unsigned char b[kColumns][kChunk];
};

template <int kRows, int kPlanes>
struct BinaryShared {
  BinaryStage<kRows, kPlanes> stages[kStages];
  int32_t row_ones[kRows];  // ternary: of the first plane less those of the second
  int32_t column_ones[kColumns];
};

// Units of a row are stored in an order that depends on the row, modulo 16, so that the eight rows
// of a matrix meet all banks. Matrices of a have rows that follow each other; those of b see below.
__device__ __forceinline__ int unit_of_a(int row, int unit) { return unit ^ (row >> 1 & 3); }
__device__ __forceinline__ int unit_of_b(int column, int unit) { return unit ^ (column >> 2 & 3); }

// Which of the warp's 32 columns is column `c` of its tile `tile`: a thread's columns of two tiles,
// 2 * (lane % 4) and the next, are then four that follow each other, and stores are of whole
// sectors.
__device__ __forceinline__ int column_of(int tile, int c) {
  return tile / 2 * 16 + c / 2 * 4 + tile % 2 * 2 + c % 2;
}

// What a block makes, and which part of it this warp.
// In 32 bits, as long as it lives in registers: a grid has less than 2^31 blocks.
struct Tile {
  uint32_t batch, row_tile, column_tile;
  int warp_row, warp_column;
};

// Copies of a thread: its unit of every (kThreads / 4)-th row.
struct Source {
  const uint8_t* from;  // its first row, its unit
  int64_t stride;       // bytes between rows
  int rows;             // from its first one on, at most those of a tile
};

__device__ __forceinline__ Source source_of(const uint8_t* matrix, int64_t stride, int64_t first,
                                            int64_t rows) {
  const int row = threadIdx.x / kUnits;
  const int64_t left = rows - first - row;
  return {matrix + (first + row) * stride + threadIdx.x % kUnits * kUnit, stride,
          static_cast<int>(left < kColumns ? left : kColumns)};
}

// Starts the copies of a chunk; zeros where it has no row or no more bytes.
template <int kRows, int kThreads, bool kOfA>
__device__ __forceinline__ void load_rows(const Source& source, int at, bool bytes,
                                          unsigned char (*to)[kChunk]) {
  static_assert(kThreads / kUnits % 16 == 0);
  const int first = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
  const int place = kOfA ? unit_of_a(first, unit) : unit_of_b(first, unit);
#pragma unroll
  for (int i = 0; i < kRows; i += kThreads / kUnits) {
    const bool valid = bytes && i < source.rows;
    ptx::cp_async16(ptx::shared_address(&to[first + i][place * kUnit]),
                    source.from + i * source.stride + at, valid);
  }
}

}  // namespace cuda
}  // namespace fastbb
