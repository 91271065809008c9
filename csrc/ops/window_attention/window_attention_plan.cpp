// SPDX-License-Identifier: Apache-2.0
#include "core/isa.h"
#include "ops/window_attention/window_attention.h"

namespace fastbb {

extern const WindowAttentionKernels window_attention_baseline;
#if defined(__x86_64__)
extern const WindowAttentionKernels window_attention_avx2;
extern const WindowAttentionKernels window_attention_avx512;
extern const WindowAttentionKernels window_attention_avx512_bf16;
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries of one forward task: enough to amortise packing K and V (about 1/64 of the work at 64
// rows), few enough that a one-window stage (N = 196, 8 heads) still makes 32 tasks.
constexpr int64_t kForwardRows = 64;
// Queries of one backward task; a split costs a partial copy of dK and dV, so only long ones split.
constexpr int64_t kBackwardRows = 512;
// Windows of one backward task: bounds the partial sums (table, shared queries) to 1/8 of a map.
constexpr int64_t kChunkWindows = 8;
// Up to this many keys a softmax row is finished in one pass over the keys.
constexpr int64_t kMaxKeyBlock = 2048;
constexpr int64_t kLongKeyBlock = 512;
// A dense bias costs as much as the expansion that every problem would make for itself, so a few
// problems pay it back, as long as it stays well inside the last-level cache.
constexpr int64_t kExpandProblems = 4;
constexpr int64_t kExpandFloats = 512 * 1024;

}  // namespace

WindowAttentionPlan window_attention_plan(const WindowAttentionParams& p,
                                          bool dense_bias_gradient) {
  WindowAttentionPlan plan{};
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  plan.problems = p.batch * windows;
  plan.q_blocks = ceil_div(p.nq, kForwardRows);
  plan.q_block_rows = plan.q_blocks == 0 ? 0 : ceil_div(p.nq, plan.q_blocks);
  plan.forward_tasks = plan.problems * p.heads * plan.q_blocks;
  plan.key_block = p.nk <= kMaxKeyBlock ? p.nk : kLongKeyBlock;
  plan.expand_bias = p.table != nullptr && plan.problems >= kExpandProblems &&
                     p.heads * p.nq * window_attention_bias_ld(p) <= kExpandFloats;

  plan.merge_images = dense_bias_gradient;
  plan.windows_per_chunk = dense_bias_gradient || windows < kChunkWindows ? windows : kChunkWindows;
  plan.chunks = windows == 0 ? 0 : ceil_div(windows, plan.windows_per_chunk);
  plan.q_splits = ceil_div(p.nq, kBackwardRows);
  plan.q_split_rows = plan.q_splits == 0 ? 0 : ceil_div(p.nq, plan.q_splits);
  plan.groups_per_head = (plan.merge_images ? 1 : p.batch * plan.chunks) * plan.q_splits;
  plan.backward_tasks = plan.groups_per_head * p.heads;
  plan.partial_dq =
      p.q_shared && plan.chunks > 1 ? p.batch * plan.chunks * p.heads * p.nq * p.head_dim : 0;
  plan.partial_dkv =
      plan.q_splits > 1 ? plan.problems * plan.q_splits * p.heads * 2 * p.nk * p.head_dim : 0;
  return plan;
}

// Whole vectors of any level, plus one that expanding a row may overwrite.
int64_t window_attention_bias_ld(const WindowAttentionParams& p) {
  return ceil_div(p.nk, 16) * 16 + 16;
}

const WindowAttentionKernels& window_attention_kernels() {
  static const WindowAttentionKernels* const tables[kIsaCount] = {
      &window_attention_baseline,
#if defined(__x86_64__)
      &window_attention_avx2,
      &window_attention_avx512,
      &window_attention_avx512_bf16,
#else
      nullptr,
      nullptr,
      nullptr,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
