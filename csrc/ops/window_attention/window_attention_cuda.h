// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of window attention. Torch-free and free of CUDA,
// so that plans are the same in builds with and without kernels.
//
// The parameters are those of the CPU kernels, but for the bias table, which CUDA kernels read as
// it is given: [table rows, h].
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/window_attention/window_attention.h"

namespace fastbb {

constexpr int kWindowCudaThreads = 128;
constexpr int kWindowCudaQueries = 64;  // of a block at a time

// Keys of a stage: as many as leave room for two blocks of the larger sizes on a multiprocessor.
constexpr int window_cuda_keys(int element_bytes, int dim) {
  return element_bytes == 2 ? 64 : 2048 / dim;
}

// Stages of queries; with one, a block takes one problem.
constexpr int window_cuda_query_stages(int dim) { return dim <= 64 ? 2 : 1; }

// Shared memory of the forward kernel without its bias table: the stages of queries, two stages of
// keys and values, rows padded by 16 bytes, and per row a length or an index.
constexpr int64_t window_cuda_forward_bytes(int element_bytes, int dim) {
  const int64_t keys = window_cuda_keys(element_bytes, dim);
  const int64_t row = int64_t{dim} * element_bytes + 16;
  return (window_cuda_query_stages(dim) * kWindowCudaQueries + 4 * keys) * row +
         (kWindowCudaQueries + 2 * keys) * 4;
}

// A function of sizes, strides and the alignment of pointers: never of the device.
struct WindowAttentionCudaPlan {
  int dim;             // channels of a row in shared memory: 32, 64 or 128
  bool aligned;        // rows start at multiples of 16 bytes and fill whole ones
  bool table_shared;   // the head's bias table fits into shared memory
  int roll_h, roll_w;  // shifts, less than the axes that they roll
  // A block takes `walk` times `pack` problems of one head and up to 64 queries of each, `pack` of
  // them side by side.
  int pack, walk;
  int64_t q_blocks;
  CudaLaunch forward;  // a grid of 0: nothing to do
};

// Blocks that fill the largest devices several times over. Beyond, blocks take several problems:
// one is loaded while another is computed, and the bias table is read once for all.
constexpr int64_t kWindowCudaManyBlocks = 2048;

FASTBB_EXPORT WindowAttentionCudaPlan window_attention_cuda_plan(
    const WindowAttentionParams& p, int64_t many_blocks = kWindowCudaManyBlocks);

// The error's text, or nullptr. Built where FASTBB_WITH_CUDA is defined.
FASTBB_EXPORT const char* window_attention_forward_cuda(const WindowAttentionParams& p,
                                                        const WindowAttentionCudaPlan& plan,
                                                        void* stream);

}  // namespace fastbb
