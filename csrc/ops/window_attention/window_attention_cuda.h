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
constexpr int kWindowCudaQueries = 64;  // of a block of the forward kernel at a time

// Keys of a stage of the forward kernel: as many as leave room for two blocks of the larger sizes
// on a multiprocessor.
constexpr int window_cuda_keys(int element_bytes, int dim) {
  return element_bytes == 2 ? 64 : 2048 / dim;
}

// Stages of queries; with one, a block takes one problem.
constexpr int window_cuda_query_stages(int dim) { return dim <= 64 ? 2 : 1; }

// Bytes of a row in shared memory: padded by 16.
constexpr int64_t window_cuda_row_bytes(int element_bytes, int dim) {
  return int64_t{dim} * element_bytes + 16;
}

// Shared memory of the forward kernel without its bias table: the stages of queries, two stages of
// keys and values, and per row a length or an index.
constexpr int64_t window_cuda_forward_bytes(int element_bytes, int dim) {
  const int64_t keys = window_cuda_keys(element_bytes, dim);
  return (window_cuda_query_stages(dim) * kWindowCudaQueries + 4 * keys) *
             window_cuda_row_bytes(element_bytes, dim) +
         (kWindowCudaQueries + 2 * keys) * 4;
}

// Where rows are and how they lie in shared memory: what all kernels need of a plan.
struct WindowAttentionCudaRows {
  int dim;             // channels of a row in shared memory: 32, 64 or 128
  bool aligned;        // rows start at multiples of 16 bytes and fill whole ones
  bool table_shared;   // the head's bias table fits into shared memory
  int roll_h, roll_w;  // shifts, less than the axes that they roll
};

// A function of sizes, strides and the alignment of pointers: never of the device.
struct WindowAttentionCudaPlan : WindowAttentionCudaRows {
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

constexpr int kWindowCudaBackwardKeys = 64;  // of a block of the kernel for keys

// Queries of a stage of the kernel for keys, and keys of a stage of the kernel for queries: so few
// that the two tiles of logits, beside the sums over them, leave registers for more blocks.
constexpr int window_cuda_backward_rows(int element_bytes, int dim, int pack) {
  const int rows = dim <= (element_bytes == 2 ? 64 : 32) ? 32 : 16;
  return pack * 16 > rows ? pack * 16 : rows;
}
constexpr int window_cuda_backward_stages(int element_bytes, int dim) {
  return element_bytes * dim <= 256 ? 2 : 1;
}

// Shared memory of the two kernels without their bias tables: 64 rows that stay, the stages, and
// for the first one the gradients of the logits, sums of rows and what is known of each query.
constexpr int64_t window_cuda_backward_keys_bytes(int element_bytes, int dim, int pack) {
  const int64_t rows = window_cuda_backward_rows(element_bytes, dim, pack);
  const int64_t stages = window_cuda_backward_stages(element_bytes, dim);
  return (2 * kWindowCudaBackwardKeys + 2 * stages * rows) *
             window_cuda_row_bytes(element_bytes, dim) +
         kWindowCudaBackwardKeys * window_cuda_row_bytes(element_bytes, static_cast<int>(rows)) +
         (13 * rows + kWindowCudaBackwardKeys + 4) * 4;
}
constexpr int64_t window_cuda_backward_queries_bytes(int element_bytes, int dim) {
  const int64_t rows = window_cuda_backward_rows(element_bytes, dim, 1);
  const int64_t stages = window_cuda_backward_stages(element_bytes, dim);
  return (2 * kWindowCudaQueries + 2 * stages * rows) * window_cuda_row_bytes(element_bytes, dim) +
         (kWindowCudaQueries + 2 * rows) * 4;
}

// Sums over problems, or over queries that several blocks share, are of parts that each belong to
// one block, and are added in a fixed order: gradients are the same bits every time.
enum class WindowCudaSum : int { kBias, kScale, kPads, kQueries, kKeys };

constexpr int kWindowCudaSumLanes = 32;  // sums of a block
constexpr int kWindowCudaSumRows = 8;    // threads of a sum, each of which takes every 8th part
constexpr int kWindowCudaCollapseThreads = 128;

// Parts lie as [outer, parts, size] in the workspace, from an offset on; sums are over `parts`.
struct WindowAttentionCudaSum {
  WindowCudaSum kind;
  int64_t from, outer, parts, size;
  CudaLaunch launch;
};

// A function of the same. Offsets count floats of one workspace; -1: not needed.
struct WindowAttentionCudaBackwardPlan : WindowAttentionCudaRows {
  // A block takes `walk` times `pack` problems of one head, `pack` of them side by side; where
  // images share their queries, all of one image.
  int pack, walk;
  int64_t chunks;            // of problems
  int64_t chunks_per_image;  // where images share their queries, else of all
  // Up to 64 keys: one kernel for all gradients. Else one for dQ, which leaves its row sums for the
  // other, and that one for dK and dV.
  bool one_kernel;
  int64_t q_tiles, q_splits, q_tiles_per_split;  // of the kernel for keys
  int64_t q_blocks;                              // of the kernel for queries
  int64_t key_tiles;
  CudaLaunch queries, keys;

  int64_t row_sums;    // [problems, h, Nq, 2]: 1 / sum of P, sum of P dP
  int64_t bias;        // [parts, h, Nq, Nk]
  int64_t dense_bias;  // [h, Nq, Nk], where the table's gradient is wanted
  int64_t scale;       // [parts, h]
  int64_t pads;        // [parts, h, 2, d]: k then v
  int64_t dq;          // [B, parts, h, Nq, d], where images share their queries
  int64_t dkv;         // [B, parts, h, 2, Nk, d], where queries are split
  int64_t workspace;   // floats of all

  WindowAttentionCudaSum sums[5];
  int sum_count;
  CudaLaunch collapse;  // of the dense bias gradient to the table's; a grid of 0: none
};

constexpr int64_t kWindowCudaBackwardBlocks = 1024;

// The gradients of side inputs that are wanted are those with pointers in p.grad.
FASTBB_EXPORT WindowAttentionCudaBackwardPlan window_attention_cuda_backward_plan(
    const WindowAttentionParams& p, int64_t many_blocks = kWindowCudaBackwardBlocks);

// Results are texts of errors, or nullptr. Built where FASTBB_WITH_CUDA is defined.
FASTBB_EXPORT const char* window_attention_forward_cuda(const WindowAttentionParams& p,
                                                        const WindowAttentionCudaPlan& plan,
                                                        void* stream);
FASTBB_EXPORT const char* window_attention_backward_cuda(
    const WindowAttentionParams& p, const WindowAttentionCudaBackwardPlan& plan, float* workspace,
    void* stream);

}  // namespace fastbb
