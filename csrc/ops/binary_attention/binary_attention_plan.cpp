// SPDX-License-Identifier: Apache-2.0
// How binary attention is cut into tasks, its workspace, and the choice of the level: baseline
// code.
#include <algorithm>

#include "core/isa.h"
#include "ops/binary_attention/binary_attention.h"

namespace fastbb {

extern const BinaryAttentionKernels binary_attention_baseline;
#if defined(__x86_64__)
extern const BinaryAttentionKernels binary_attention_avx2;
extern const BinaryAttentionKernels binary_attention_avx512;
extern const BinaryAttentionKernels binary_attention_avx512_bf16;
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

// Scores of a task, some 100 microseconds, within bounds on its queries.
constexpr int64_t kScores = 64 * 1024;
constexpr int64_t kMostQueries = 64;
constexpr int64_t kLeastQueries = 4;
constexpr int64_t kKeyBlock = 512;  // a multiple of 32

}  // namespace

BinaryAttentionPlan binary_attention_plan(const BinaryAttentionParams& p) {
  BinaryAttentionPlan plan{};
  const int64_t heads = p.batch * p.heads;
  const int64_t rows = std::clamp(kScores / p.nk, kLeastQueries, kMostQueries);
  plan.q_blocks = ceil_div(p.nq, rows);
  plan.q_block = plan.q_blocks == 0 ? 0 : ceil_div(p.nq, plan.q_blocks);
  plan.tasks = heads * plan.q_blocks;
  plan.key_block = kKeyBlock;
  plan.key_blocks = ceil_div(p.nk, kKeyBlock);
  plan.pack_tasks = heads * plan.key_blocks;
  plan.padded_keys = round_up(p.nk, 32);
  plan.padded_dim = round_up(p.head_dim, 16);
  // Two planes of 32-bit words of either operand, and two flags of each block of keys.
  const int64_t k_words = ceil_div(p.head_dim, 32) * plan.padded_keys;
  const int64_t v_words = plan.padded_keys / 32 * plan.padded_dim;
  plan.head_bytes = round_up(8 * (k_words + v_words) + 2 * plan.key_blocks, 64);
  plan.est_offset = heads * plan.head_bytes;
  const int64_t est_floats = p.est_k == nullptr ? 0 : p.batch * p.rank * plan.padded_keys;
  plan.workspace_bytes = plan.est_offset + 4 * est_floats;
  return plan;
}

const BinaryAttentionKernels& binary_attention_kernels() {
  static const BinaryAttentionKernels* const tables[kIsaCount] = {
      &binary_attention_baseline,
#if defined(__x86_64__)
      &binary_attention_avx2,
      &binary_attention_avx512,
      &binary_attention_avx512_bf16,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
