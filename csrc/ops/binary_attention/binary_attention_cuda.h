// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of binary attention. Torch-free and free of CUDA,
// so that plans are the same in builds with and without kernels.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/binary_attention/binary_attention.h"

namespace fastbb {

constexpr int64_t kBinaryAttentionCudaMaxHeadDim = 128;
constexpr int64_t kBinaryAttentionCudaMaxRank = 64;
constexpr int kBinaryAttentionCudaWarps = 8;   // of a block, at most
constexpr int kBinaryAttentionCudaRows = 16;   // queries of a warp
constexpr int kBinaryAttentionCudaTile = 128;  // keys: a row of packed bits of each

struct BinaryAttentionCudaPlan {
  CudaLaunch launch;  // a grid of 0: nothing to do
  int64_t q_block, q_blocks;
  int64_t chunk;    // keys in shared memory at a time, a multiple of a tile
  int64_t words;    // of 32 channels that kernels have for a row: 2 or 4
  bool training;    // planes, lse or dropout
  bool even;        // rows of out start at even elements
  int64_t v_p_row;  // of v_p among the terms of keys; behind it nothing
};

// Function of the sizes and of which arguments are there. Head dims and ranks are within the limits
// above.
FASTBB_EXPORT BinaryAttentionCudaPlan binary_attention_cuda_plan(const BinaryAttentionParams& p);

// The error's text, or nullptr. Built where FASTBB_WITH_CUDA is defined. Planes are aligned to 16
// bytes, out to 8.
FASTBB_EXPORT const char* binary_attention_cuda(const BinaryAttentionParams& p,
                                                const BinaryAttentionCudaPlan& plan, void* stream);

}  // namespace fastbb
