// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of products of packed bits. Torch-free and free
// of CUDA, so that plans are the same in builds with and without kernels.
//
// The parameters are those of the CPU kernels. a, b and the bytes between their rows and batches
// must be multiples of 16.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/binary_linear/binary_linear.h"

namespace fastbb {

// A block makes a tile of 128 columns and of 128 or 32 rows of one product.
constexpr int kBinaryCudaColumns = 128;
constexpr int kBinaryCudaManyRows = 128;
constexpr int kBinaryCudaFewRows = 32;
// A warp makes 32 columns and half of 128 rows, or all of 32.
constexpr int binary_cuda_threads(int rows) { return rows == kBinaryCudaManyRows ? 256 : 128; }

constexpr int kBinaryCudaChunkBytes = 64;  // of each row at a time
constexpr int kBinaryCudaStages = 3;       // chunks under way, with the one in use

// Shared memory: the stages, and of each row and column its ones.
constexpr int64_t binary_cuda_shared_bytes(int rows, int planes) {
  const int64_t stage = int64_t{planes * rows + kBinaryCudaColumns} * kBinaryCudaChunkBytes;
  return kBinaryCudaStages * stage + int64_t{rows + kBinaryCudaColumns} * 4;
}

// A function of sizes and of the alignment of the result: never of the device.
struct BinaryLinearCudaPlan {
  CudaLaunch launch;  // a grid of 0: nothing to do
  uint32_t row_tiles, column_tiles;
  int rows;      // of a tile
  bool aligned;  // four columns of the result are one word, and rows are whole ones
};

// Large tiles read less, small ones make more blocks: the former from where they give each
// multiprocessor of the larger devices about two.
constexpr int64_t kBinaryCudaManyTiles = 256;

FASTBB_EXPORT BinaryLinearCudaPlan
binary_linear_cuda_plan(const BinaryLinearParams& p, int64_t many_tiles = kBinaryCudaManyTiles);

// The error's text, or nullptr. Built where FASTBB_WITH_CUDA is defined.
FASTBB_EXPORT const char* binary_linear_cuda(const BinaryLinearParams& p,
                                             const BinaryLinearCudaPlan& plan, void* stream);

}  // namespace fastbb
