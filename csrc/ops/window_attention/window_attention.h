// SPDX-License-Identifier: Apache-2.0
// Contract between the host code and the kernels of window attention. Torch-free.
//
// A *problem* is one window of one image (window domain) or one image (full domain); it has Nq
// queries and Nk keys for each of h heads. Token t of a problem maps to a place (y, x) of the
// image's map, or to padding; partition, roll and padding exist only in that mapping.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

// Epsilon of torch.nn.functional.normalize.
constexpr float kL2NormEps = 1e-12f;

enum class PadMode : int { kNone = 0, kPadThenRoll = 1, kRollThenPad = 2 };

// Address of token (y, x) of image b and head g: data + b*image + y*row + x*column + g*head, in
// elements; the d channels are contiguous. Full domain: y = 0, x = token.
struct TokenMap {
  void* data;
  int64_t image, row, column, head;
};

// Gradients and what they need; all null in the forward pass. Pointers in the second group are
// null when that gradient is not asked for.
struct WindowAttentionGradients {
  TokenMap grad_out;
  TokenMap dq, dk, dv;
  float* partial_table;  // [groups per head, h, table rows], in the flipped order of `table`
  float* dbias;          // [h, Nq, Nk]
  float* partial_scale;  // [groups per head, h]
  float* partial_pads;   // [groups per head, h, 2, d]: k then v
  float* partial_dq;     // [B * chunks, h, Nq, d] when several chunks share an image's queries
  float* partial_dkv;    // [problems, query splits, h, 2, Nk, d] when queries are split
  float* dtable;         // [table rows, h], results of the reductions
  float* dscale;         // [h]
  float* dk_pad;         // [h, d]
  float* dv_pad;         // [h, d]
};

struct WindowAttentionParams {
  Dtype dtype;
  int64_t batch;
  int heads, head_dim;
  bool full;       // one problem per image
  bool q_shared;   // q [B, Nq, h, d] serves all windows of its image
  int64_t nq, nk;  // queries and keys of a problem
  int map_h, map_w;
  int window_h, window_w;
  int shift_h, shift_w;
  int windows_y, windows_x;  // windows per image on each axis
  PadMode pad_mode;

  TokenMap q, k, v, out;
  float* lse;          // [B, nW, h, Nq]
  const float* k_pad;  // [h, d] or null (zeros)
  const float* v_pad;  // [h, d] or null (zeros)
  const float* table;  // [h, (2wh-1), (2ww-1)], both axes flipped, or null
  const float* bias;   // [h, Nq, bias_ld >= Nk] or null; replaces the table
  int64_t bias_ld;
  const float* mask;   // [mask_count, Nq, Nk] or null
  int64_t mask_count;  // problem i of an image (full domain: image i) uses mask i mod mask_count
  bool swin_mask;
  float swin_mask_value;
  const float* scale_per_head;  // [h] or null
  float scale;
  bool qk_l2norm;
  bool tf32;  // CUDA, float32: products rounded to tf32

  WindowAttentionGradients grad;
};

// How the work is cut, from sizes alone: never from the number of threads, so that gradients are
// the same on any machine.
struct WindowAttentionPlan {
  int64_t problems;
  // Forward: tasks = problems * heads * q_blocks; a task does q_block_rows queries of one head.
  int64_t q_block_rows, q_blocks, forward_tasks;
  // Backward: a group walks windows_per_chunk windows of one image (dense bias gradient: all
  // windows of all images) for one head and q_split_rows queries.
  int64_t windows_per_chunk, chunks, q_split_rows, q_splits, groups_per_head, backward_tasks;
  bool merge_images;
  // Floats of the partial sums; 0 where the result is written directly.
  int64_t partial_dq, partial_dkv;
  // Keys are processed in blocks of this many.
  int64_t key_block;
  // Whether the bias table is expanded to a dense bias once per call.
  bool expand_bias;
};

FASTBB_EXPORT WindowAttentionPlan window_attention_plan(const WindowAttentionParams& p,
                                                        bool dense_bias_gradient);

// Row stride of the expanded bias.
FASTBB_EXPORT int64_t window_attention_bias_ld(const WindowAttentionParams& p);

// Kernels of one instruction-set level. Tasks of a call are independent and may run in any order;
// `expand_bias` runs before and `reduce` after them.
struct WindowAttentionKernels {
  // Table -> dense [h, Nq, bias_ld]; tasks: heads.
  void (*expand_bias)(const WindowAttentionParams&, float* dense, int64_t bias_ld, int64_t begin,
                      int64_t end);
  void (*forward)(const WindowAttentionParams&, const WindowAttentionPlan&, int64_t begin,
                  int64_t end);
  void (*backward)(const WindowAttentionParams&, const WindowAttentionPlan&, int64_t begin,
                   int64_t end);
  // Sums the partial results; tasks: batch * heads.
  void (*reduce)(const WindowAttentionParams&, const WindowAttentionPlan&, int64_t begin,
                 int64_t end);
};

FASTBB_EXPORT const WindowAttentionKernels& window_attention_kernels();

}  // namespace fastbb
