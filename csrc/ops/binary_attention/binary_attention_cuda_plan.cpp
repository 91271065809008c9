// SPDX-License-Identifier: Apache-2.0
// Launch plan of the CUDA kernels.
#include <algorithm>

#include "ops/binary_attention/binary_attention_cuda.h"

namespace fastbb {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BinaryAttentionCudaPlan binary_attention_cuda_plan(const BinaryAttentionParams& p) {
  // A third of what a multiprocessor of an RTX has, a fifth of an A100's.
  constexpr int64_t kBudget = 32 * 1024;
  constexpr int64_t kRows = kBinaryAttentionCudaRows, kTile = kBinaryAttentionCudaTile;
  BinaryAttentionCudaPlan plan{};
  const int64_t warps = std::clamp<int64_t>(divide_up(p.nq, kRows), 1, kBinaryAttentionCudaWarps);
  plan.q_block = warps * kRows;
  plan.q_blocks = divide_up(p.nq, plan.q_block);
  // The first block of a head saves planes of keys and values.
  if (p.k_planes != nullptr) plan.q_blocks = std::max<int64_t>(plan.q_blocks, 1);
  plan.words = p.head_dim <= 64 ? 2 : 4;
  plan.training = p.dropout > 0 || p.lse != nullptr || p.q_planes != nullptr;
  plan.even = p.head_dim % 2 == 0;
  plan.v_p_row = 1 + p.rank;
  // Two planes of K and of V, and a float per term.
  const int64_t terms = plan.v_p_row + (p.v_p != nullptr ? 1 : 0);
  const int64_t of_key = 4 * plan.words * 4 + 4 * terms;
  const int64_t of_query = 2 * plan.words * 4 + 4 * p.rank;
  const int64_t room = std::max<int64_t>(kBudget - plan.q_block * of_query, 0);
  plan.chunk = kTile * std::clamp<int64_t>(room / of_key / kTile, 1,
                                           std::max<int64_t>(divide_up(p.nk, kTile), 1));
  plan.launch = {p.batch * p.heads * plan.q_blocks, 32 * warps,
                 plan.chunk * of_key + plan.q_block * of_query};
  return plan;
}

}  // namespace fastbb
