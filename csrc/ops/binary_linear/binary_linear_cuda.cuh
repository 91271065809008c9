// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of products of packed bits.
//
// A block makes 128 columns and 128 (or, where that makes few blocks, 32) rows of one product. It
// walks along K by chunks of 512 bits: three of them in shared memory, two of which are copied
// while the third is multiplied. A warp makes 64 (32) rows and 32 columns, so that 32 bytes of K
// cost it 6 (4) ldmatrix.x4 for 16 (8) products m16n8k256.
//
// Ones of rows are counted from the same fragments, each by the one warp that is given its tile,
// and exchanged through shared memory at the end. A ternary row times b is what both of its planes
// make: the second one enters complemented, since
//
//   |positive & b| - |negative & b| = |positive & b| + |~negative & b| - |b|
//
// so that one set of sums serves both. Bits of b from K on are zero, which masks the complement.
//
// For sm_100 and later, which have no products of bits, each word is spread to eight registers of
// int8 (the order along K is the same for a and b, hence free), and a ternary element is 1, 0 or -1
// there.
//
// Bounds: for sm_80 to sm_90, at K of several thousands, products of bits: 16384 bit pairs per
// clock and multiprocessor, of which shared memory could feed 1.3 times as many. At K of hundreds
// the result, 2 to 4 bytes per element, is more than all else: global memory.
#pragma once

#include "ops/binary_linear/binary_linear_cuda_epilogue.cuh"
#include "ops/binary_linear/binary_linear_cuda_products.cuh"

namespace fastbb {
namespace cuda {

// Blocks of a multiprocessor, which limit registers: both planes at once, as int8 takes them, need
// more.
template <int kRows, int kPlanes>
constexpr int kBlocks = kRows == kBinaryCudaFewRows    ? 4
                        : kBitProducts || kPlanes == 1 ? 2
                                                       : 1;

template <int kRows, int kPlanes>
__global__ void __launch_bounds__(Warps<kRows>::kThreads, kBlocks<kRows, kPlanes>)
    binary_linear(const __grid_constant__ BinaryLinearParams p,
                  const __grid_constant__ BinaryLinearCudaPlan plan) {
  using Shared = BinaryShared<kRows, kPlanes>;
  constexpr int kThreads = Warps<kRows>::kThreads;
  constexpr int kRowTiles = Warps<kRows>::kRowTiles;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);

  Tile tile;
  tile.batch = blockIdx.x / plan.column_tiles / plan.row_tiles;
  tile.row_tile = blockIdx.x / plan.column_tiles % plan.row_tiles;
  tile.column_tile = blockIdx.x % plan.column_tiles;
  tile.warp_row = threadIdx.x / 32 / kWarpColumns;
  tile.warp_column = threadIdx.x / 32 % kWarpColumns;

  const int row_bytes = static_cast<int>(bit_row_bytes(p.k));  // sums of int32 count K
  const uint8_t* a = p.a + tile.batch * p.a_batch;
  const uint8_t* b = p.b + tile.batch * p.b_batch;
  const Source a_rows = source_of(a, p.a_row, int64_t{tile.row_tile} * kRows, p.m);
  const Source b_rows = source_of(b, row_bytes, int64_t{tile.column_tile} * kColumns, p.n);
  const auto load = [&](int chunk, int stage) {
    const int at = chunk * kChunk;
    const bool bytes = at + static_cast<int>(threadIdx.x) % kUnits * kUnit < row_bytes;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      load_rows<kRows, kThreads, true>(a_rows, at + plane * row_bytes, bytes,
                                       s.stages[stage].a[plane]);
    }
    load_rows<kColumns, kThreads, false>(b_rows, at, bytes, s.stages[stage].b);
  };

  const int chunks = (row_bytes + kChunk - 1) / kChunk;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < chunks) load(i, i);
    ptx::cp_async_commit();
  }
  int32_t sums[kRowTiles][kColumnTiles][4] = {};
  Ones<kRows> ones{};
  int stage = 0, next = kStages - 1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    if (chunk + kStages - 1 < chunks) load(chunk + kStages - 1, next);
    ptx::cp_async_commit();
    multiply<kRows, kPlanes>(s.stages[stage], tile, sums, ones);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }

  publish<kRows>(ones, tile, s.row_ones, s.column_ones);
  __syncthreads();
  write_tile<kRows, kPlanes>(p, plan, tile, sums, s);
}

}  // namespace cuda
}  // namespace fastbb
