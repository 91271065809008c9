// SPDX-License-Identifier: Apache-2.0
// Contract of attention between binarized queries, keys, values and probabilities. Torch-free; the
// layout of bits is in core/bits.h.
//
// Of one head, with Qb, Kb, Vb the signs (0 at 0) of q, k, v and a_q, a_k, a_v, a_p the alphas:
//
//   S = scale * (a_q a_k Qb Kb^T + est_q est_k^T) + mask
//   P = dropout(softmax(S)), bit = P > a_p / 2          or, with bool_probs, bit = dropout(S) > 0
//   out = a_p a_v bit Vb + a_p (bit v_p)                and a_p = 1 here
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

// Address of channel 0 of token t of image b and head g: data + b*image + t*token + g*head.
struct HeadMap {
  const void* data;
  int64_t image, token, head;  // elements
};

struct BinaryAttentionParams {
  Dtype dtype;
  int64_t batch, heads, nq, nk, head_dim;
  HeadMap q, k, v;
  void* out;            // [B, Nq, h, d], contiguous, of dtype
  const float* alphas;  // [4]: of q, k, v and the probabilities, raised to kLeastAlpha; or null: 1
  const float* mask;    // element (b, i, j) at b*mask_image + i*mask_query + j, or null
  int64_t mask_image, mask_query;  // mask_query may be 0
  const float* est_q;              // [B, Nq, rank] or null
  const float* est_k;              // [B, Nk, rank]
  int64_t rank;
  const float* v_p;  // [B, Nk] or null
  float scale;
  bool bool_probs;
  Ste ste;        // of q, k and v; not kBiReal
  float dropout;  // probability of dropping, below 1
  uint64_t seed;  // element (b, g, i, j) is number ((b*h + g)*Nq + i)*Nk + j of the stream

  // For the backward pass; all null in inference. Planes: value > 0, value < 0, gradient passes.
  uint8_t* q_planes;  // [B, Nq, h, 3, bit_row_bytes(d)]
  uint8_t* k_planes;  // [B, Nk, h, 3, bit_row_bytes(d)]
  uint8_t* v_planes;  // [B, Nk, h, 3, bit_row_bytes(d)]
  uint8_t* p_planes;  // [B, h, Nq, 1 or 2, bit_row_bytes(Nk)]: the bit; with dropout, kept by it
  float* lse;         // [B, h, Nq]; softmax alone
};

// CPU: packing tasks, of a block of keys of one head, fill the workspace; then tasks of a block of
// queries of one head read it.
struct BinaryAttentionPlan {
  int64_t q_block, q_blocks, tasks;
  int64_t key_block, key_blocks, pack_tasks;
  int64_t padded_keys, padded_dim;  // whole words of 32 keys, whole vectors of 16 channels
  int64_t head_bytes;               // packed keys and values of a head
  int64_t est_offset;               // bytes; behind it est_k as [B, rank, padded_keys]
  int64_t workspace_bytes;
};
FASTBB_EXPORT BinaryAttentionPlan binary_attention_plan(const BinaryAttentionParams& p);

struct BinaryAttentionKernels {
  void (*pack)(const BinaryAttentionParams&, const BinaryAttentionPlan&, uint8_t* workspace,
               int64_t begin, int64_t end);
  void (*forward)(const BinaryAttentionParams&, const BinaryAttentionPlan&,
                  const uint8_t* workspace, int64_t begin, int64_t end);
};
FASTBB_EXPORT const BinaryAttentionKernels& binary_attention_kernels();

}  // namespace fastbb
