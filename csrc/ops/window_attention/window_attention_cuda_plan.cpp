// SPDX-License-Identifier: Apache-2.0
// Launch plan of the CUDA kernels.
#include <algorithm>

#include "ops/window_attention/window_attention_cuda.h"

namespace fastbb {
namespace {

// What a block may have on every device from sm_80 on.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
constexpr int64_t kMaxWalk = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const TokenMap& map, int64_t element_bytes) {
  const int64_t all = map.image | map.row | map.column | map.head;
  const auto address = reinterpret_cast<uintptr_t>(map.data);
  return (all * element_bytes) % 16 == 0 && address % 16 == 0;
}

// Problems that share a block: their queries, and their keys, fill 64 rows.
int pack_of(const WindowAttentionParams& p, int64_t element_bytes, int dim) {
  if (element_bytes != 2 || dim > 64) return 1;
  const int64_t tokens = std::max(p.nq, p.nk);
  return tokens <= 16 ? 4 : tokens <= 32 ? 2 : 1;
}

}  // namespace

WindowAttentionCudaPlan window_attention_cuda_plan(const WindowAttentionParams& p,
                                                   int64_t many_blocks) {
  WindowAttentionCudaPlan plan{};
  const int64_t element_bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  plan.dim = p.head_dim <= 32 ? 32 : p.head_dim <= 64 ? 64 : 128;
  plan.aligned = p.head_dim * element_bytes % 16 == 0 && is_aligned(p.q, element_bytes) &&
                 is_aligned(p.k, element_bytes) && is_aligned(p.v, element_bytes);
  if (!p.full) {
    const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
    plan.roll_h = p.shift_h % (roll_first ? p.map_h : p.windows_y * p.window_h);
    plan.roll_w = p.shift_w % (roll_first ? p.map_w : p.windows_x * p.window_w);
  }
  int64_t shared = window_cuda_forward_bytes(static_cast<int>(element_bytes), plan.dim);
  if (p.table != nullptr) {
    const int64_t bytes = 4 * int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1);
    plan.table_shared = shared + bytes <= kMaxSharedBytes;
    if (plan.table_shared) shared += bytes;
  }

  const int64_t problems = p.batch * (p.full ? 1 : int64_t{p.windows_y} * p.windows_x);
  plan.pack = pack_of(p, element_bytes, plan.dim);
  plan.q_blocks = divide_up(p.nq, kWindowCudaQueries);
  const int64_t groups = divide_up(problems, plan.pack);
  const int64_t blocks = groups * p.heads * plan.q_blocks;
  const int64_t most = window_cuda_query_stages(plan.dim) == 1 ? 1 : kMaxWalk;
  plan.walk = static_cast<int>(std::clamp<int64_t>(blocks / many_blocks, 1, most));
  plan.forward = {divide_up(groups, plan.walk) * p.heads * plan.q_blocks, kWindowCudaThreads,
                  shared};
  return plan;
}

}  // namespace fastbb
