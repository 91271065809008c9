// SPDX-License-Identifier: Apache-2.0
// Launch plans of the CUDA kernels.
#include <algorithm>

#include "ops/window_attention/window_attention_cuda.h"

namespace fastbb {
namespace {

// What a block may have on every device from sm_80 on.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
constexpr int64_t kMaxWalk = 4;
// Floats of all parts of the bias gradient: beyond, blocks take more problems.
constexpr int64_t kMaxBiasParts = int64_t{1} << 24;
// Tiles of queries worth a copy of dK and dV.
constexpr int64_t kTilesOfSplit = 2;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int element_bytes_of(const WindowAttentionParams& p) { return p.dtype == Dtype::kFloat32 ? 4 : 2; }

int dim_of(const WindowAttentionParams& p) {
  return p.head_dim <= 32 ? 32 : p.head_dim <= 64 ? 64 : 128;
}

bool is_aligned(const TokenMap& map, int64_t element_bytes) {
  const int64_t all = map.image | map.row | map.column | map.head;
  const auto address = reinterpret_cast<uintptr_t>(map.data);
  return (all * element_bytes) % 16 == 0 && address % 16 == 0;
}

int64_t windows_of(const WindowAttentionParams& p) {
  return p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
}

// Problems that share a block: their queries, and their keys, fill 64 rows.
int pack_of(const WindowAttentionParams& p, int element_bytes, int dim) {
  if (element_bytes != 2 || dim > 64) return 1;
  const int64_t tokens = std::max(p.nq, p.nk);
  return tokens <= 16 ? 4 : tokens <= 32 ? 2 : 1;
}

int64_t table_bytes(const WindowAttentionParams& p) {
  if (p.table == nullptr) return 0;
  return 4 * int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1);
}

// For kernels whose shared memory is `shared` bytes without a table.
WindowAttentionCudaRows rows_of(const WindowAttentionParams& p, int64_t shared) {
  WindowAttentionCudaRows rows{};
  const int element_bytes = element_bytes_of(p);
  rows.dim = dim_of(p);
  rows.aligned = p.head_dim * element_bytes % 16 == 0;
  for (const TokenMap* map :
       {&p.q, &p.k, &p.v, &p.out, &p.grad.grad_out, &p.grad.dq, &p.grad.dk, &p.grad.dv}) {
    rows.aligned = rows.aligned && is_aligned(*map, element_bytes);
  }
  rows.table_shared = p.table != nullptr && shared + table_bytes(p) <= kMaxSharedBytes;
  if (!p.full) {
    const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
    rows.roll_h = p.shift_h % (roll_first ? p.map_h : p.windows_y * p.window_h);
    rows.roll_w = p.shift_w % (roll_first ? p.map_w : p.windows_x * p.window_w);
  }
  return rows;
}

bool wants_bias(const WindowAttentionGradients& g) {
  return g.dtable != nullptr || g.dbias != nullptr;
}

bool wants_pads(const WindowAttentionGradients& g) {
  return g.dk_pad != nullptr || g.dv_pad != nullptr;
}

// Floats of the workspace, from a multiple of 128 bytes on.
int64_t take(WindowAttentionCudaBackwardPlan& plan, bool needed, int64_t floats) {
  if (!needed) return -1;
  const int64_t at = plan.workspace;
  plan.workspace += divide_up(floats, 32) * 32;
  return at;
}

// The same for parts of a sum.
int64_t take_parts(WindowAttentionCudaBackwardPlan& plan, bool needed, WindowCudaSum kind,
                   int64_t outer, int64_t parts, int64_t size) {
  const int64_t from = take(plan, needed, outer * parts * size);
  if (needed) {
    const CudaLaunch launch{outer * divide_up(size, kWindowCudaSumLanes),
                            kWindowCudaSumLanes * kWindowCudaSumRows, 0};
    plan.sums[plan.sum_count++] = {kind, from, outer, parts, size, launch};
  }
  return from;
}

void plan_sums(const WindowAttentionParams& p, WindowAttentionCudaBackwardPlan& plan) {
  const WindowAttentionGradients& g = p.grad;
  const int64_t h = p.heads, d = p.head_dim;
  const int64_t scale_parts = plan.chunks * plan.key_tiles * plan.q_splits;
  const int64_t pad_parts = plan.chunks * plan.key_tiles * (kWindowCudaThreads / 32);
  plan.row_sums = take(plan, !plan.one_kernel, p.batch * windows_of(p) * h * p.nq * 2);
  plan.dense_bias = take(plan, g.dtable != nullptr, h * p.nq * p.nk);
  plan.bias = take_parts(plan, wants_bias(g), WindowCudaSum::kBias, 1, plan.chunks * plan.pack,
                         h * p.nq * p.nk);
  plan.scale = take_parts(plan, g.dscale != nullptr, WindowCudaSum::kScale, 1, scale_parts, h);
  plan.pads = take_parts(plan, wants_pads(g), WindowCudaSum::kPads, 1, pad_parts, h * 2 * d);
  plan.dq = take_parts(plan, p.q_shared, WindowCudaSum::kQueries, p.batch, plan.chunks_per_image,
                       h * p.nq * d);
  plan.dkv = take_parts(plan, plan.q_splits > 1, WindowCudaSum::kKeys, p.batch, plan.q_splits,
                        h * 2 * p.nk * d);
  if (g.dtable != nullptr) {
    const int64_t entries = int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1) * h;
    plan.collapse = {divide_up(entries, kWindowCudaCollapseThreads), kWindowCudaCollapseThreads, 0};
  }
}

}  // namespace

WindowAttentionCudaPlan window_attention_cuda_plan(const WindowAttentionParams& p,
                                                   int64_t many_blocks) {
  const int element_bytes = element_bytes_of(p);
  const int64_t shared = window_cuda_forward_bytes(element_bytes, dim_of(p));
  WindowAttentionCudaPlan plan{};
  static_cast<WindowAttentionCudaRows&>(plan) = rows_of(p, shared);
  plan.pack = pack_of(p, element_bytes, plan.dim);
  plan.q_blocks = divide_up(p.nq, kWindowCudaQueries);
  const int64_t groups = divide_up(p.batch * windows_of(p), plan.pack);
  const int64_t blocks = groups * p.heads * plan.q_blocks;
  const int64_t most = window_cuda_query_stages(plan.dim) == 1 ? 1 : kMaxWalk;
  plan.walk = static_cast<int>(std::clamp<int64_t>(blocks / many_blocks, 1, most));
  plan.forward = {divide_up(groups, plan.walk) * p.heads * plan.q_blocks, kWindowCudaThreads,
                  shared + (plan.table_shared ? table_bytes(p) : 0)};
  return plan;
}

WindowAttentionCudaBackwardPlan window_attention_cuda_backward_plan(const WindowAttentionParams& p,
                                                                    int64_t many_blocks) {
  const WindowAttentionGradients& g = p.grad;
  const int element_bytes = element_bytes_of(p);
  const int pack = p.q_shared ? 1 : pack_of(p, element_bytes, dim_of(p));
  const int64_t keys_bytes = window_cuda_backward_keys_bytes(element_bytes, dim_of(p), pack);
  const int64_t queries_bytes = window_cuda_backward_queries_bytes(element_bytes, dim_of(p));
  WindowAttentionCudaBackwardPlan plan{};
  static_cast<WindowAttentionCudaRows&>(plan) = rows_of(p, std::max(keys_bytes, queries_bytes));
  if (p.nq == 0 || p.batch == 0) return plan;

  plan.one_kernel = p.nk <= kWindowCudaBackwardKeys;
  plan.pack = pack;
  plan.key_tiles = divide_up(p.nk, kWindowCudaBackwardKeys);
  plan.q_tiles = divide_up(p.nq, window_cuda_backward_rows(element_bytes, plan.dim, pack) / pack);
  plan.q_blocks = divide_up(p.nq, kWindowCudaQueries);

  const bool sums = wants_bias(g) || g.dscale != nullptr || wants_pads(g) || p.q_shared;
  const int64_t problems = p.batch * windows_of(p);
  const int64_t images = p.q_shared ? p.batch : 1;  // that blocks keep apart
  const int64_t groups = divide_up(problems / images, pack);
  int64_t walk = sums ? divide_up(images * groups * p.heads * plan.key_tiles, many_blocks) : 1;
  if (wants_bias(g)) {
    const int64_t parts = images * groups * pack * p.heads * p.nq * p.nk;
    walk = std::max(walk, divide_up(parts, kMaxBiasParts));
  }
  plan.walk = static_cast<int>(std::min(walk, groups));
  plan.chunks_per_image = divide_up(groups, plan.walk);
  plan.chunks = images * plan.chunks_per_image;

  const int64_t blocks = plan.chunks * p.heads * plan.key_tiles;
  const int64_t splits = p.full ? std::max<int64_t>(many_blocks / 2 / blocks, 1) : 1;
  plan.q_tiles_per_split =
      splits == 1 ? plan.q_tiles : std::max(divide_up(plan.q_tiles, splits), kTilesOfSplit);
  plan.q_splits = divide_up(plan.q_tiles, plan.q_tiles_per_split);

  const int64_t table = plan.table_shared ? table_bytes(p) : 0;
  plan.keys = {blocks * plan.q_splits, kWindowCudaThreads, keys_bytes + table};
  if (!plan.one_kernel) {
    plan.queries = {plan.chunks * p.heads * plan.q_blocks, kWindowCudaThreads,
                    queries_bytes + table};
  }
  plan_sums(p, plan);
  return plan;
}

}  // namespace fastbb
