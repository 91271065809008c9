// SPDX-License-Identifier: Apache-2.0
// dK, dV, the gradients of bias, scale and pads and, where all keys fit into a block, dQ.
//
// A block of 4 warps takes 64 keys of one head, a warp 16 of them: of one problem, or of 2 or 4
// problems side by side whose tokens fill no more than 32 or 16 rows. Queries and gradients of
// results come in tiles through two stages of asynchronous copies (one for 128 float32 channels).
// P^T and dP^T, keys by queries, stay in registers, where they are operands of dV and dK as they
// are; dS passes through shared memory once, as operand of dQ, and warps share its rows. Row sums
// cross the warps through shared memory, or come from the kernel for queries.
//
// Queries of a tile: 32, or 16 of head dim 128 and, in float32, of 64; 64 where four problems lie
// side by side.
#pragma once

#include "ops/window_attention/window_attention_cuda_backward_finish.cuh"

namespace fastbb {
namespace cuda {

// What is known of each query of a tile.
template <class Math, int kDim, int kPack, bool kAll>
__device__ __forceinline__ void describe_queries(const WindowAttentionParams& p,
                                                 const WindowAttentionCudaBackwardPlan& plan,
                                                 const Task& task, int64_t first,
                                                 int64_t first_query, const float* workspace,
                                                 BackwardKeysShared<Math, kDim, kPack>& s) {
  using Queries = Side<kBackwardRows<Math, kDim, kPack>, kPack>;
  const int row = threadIdx.x;
  if (row >= kBackwardRows<Math, kDim, kPack>) return;
  const Problem problem = problem_at(p, Queries::problem(first, row));
  const int64_t token = Queries::token(first_query, row);
  s.lse[row] = lse_of(p, plan, task, problem, token);
  s.q_term[row] = query_term(p, problem, task.inverse_w, token);
  if (!kAll) {
    const float* sums = workspace + plan.row_sums +
                        ((problem.index * p.heads + task.head) * p.nq + clamped(token, p.nq)) * 2;
    s.normaliser[row] = sums[0];
    s.delta[row] = sums[1];
  }
}

// Lanes that differ in the bit kStep share 2 * kHalf sums: each keeps kHalf of them, in x[0]
// onwards. Returns the index of the first one.
template <int kHalf, int kStep, int kCount>
__device__ __forceinline__ int share_sums(float (&x)[kCount]) {
  const bool upper = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float give = upper ? x[i] : x[i + kHalf];
    const float keep = upper ? x[i + kHalf] : x[i];
    x[i] = keep + __shfl_xor_sync(ptx::kFullWarp, give, kStep);
  }
  return upper ? kHalf : 0;
}

// Normalisers and deltas of a tile's queries, from the weights and dP of all warps.
template <class Math, int kDim, int kPack, int kTiles>
__device__ __forceinline__ void sum_rows(const float (&weights)[kTiles][4],
                                         const float (&dlogits)[kTiles][4],
                                         BackwardKeysShared<Math, kDim, kPack>& s) {
  constexpr int kEach = BackwardKeysShared<Math, kDim, kPack>::kRows / kPack;
  constexpr int kWarpsEach = kWarps / kPack;
  const int warp = threadIdx.x / 32;
  float sums[kTiles * 4];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float w0 = weights[n][e], w1 = weights[n][e + 2];
      sums[n * 4 + e * 2] = w0 + w1;
      sums[n * 4 + e * 2 + 1] = w0 * dlogits[n][e] + w1 * dlogits[n][e + 2];
    }
  }
  // Over the 8 lanes that hold a column of accumulators.
  int first = share_sums<kTiles * 2, 16>(sums);
  first += share_sums<kTiles, 8>(sums);
  first += share_sums<kTiles / 2, 4>(sums);
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    const int at = first + i;
    const int column = at / 4 * 8 + threadIdx.x % 4 * 2 + at / 2 % 2;
    s.sums[warp][column][at % 2] = sums[i];
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row < BackwardKeysShared<Math, kDim, kPack>::kRows) {
    float total = 0.0f, along = 0.0f;
    for (int i = 0; i < kWarpsEach; ++i) {
      const float* part = s.sums[row / kEach * kWarpsEach + i][row % kEach];
      total += part[0];
      along += part[1];
    }
    s.normaliser[row] = normaliser_of(total);
    s.delta[row] = along * s.normaliser[row];
  }
  __syncthreads();
}

// Adds dS to the block's part of the bias gradient; the first problem of a walk sets it.
template <int kTiles>
__device__ __forceinline__ void add_bias_gradient(const WindowAttentionParams& p, float* bias,
                                                  bool adds, int64_t first_query,
                                                  const int64_t (&key)[2],
                                                  const float (&dlogits)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t query = first_query + n * 8 + threadIdx.x % 4 * 2 + e % 2;
      if (query >= p.nq || key[e / 2] >= p.nk) continue;
      float* to = bias + query * p.nk + key[e / 2];
      *to = adds ? *to + dlogits[n][e] : dlogits[n][e];
    }
  }
}

// Sums over the warps that share rows of dQ.
template <int kSpans, int kRows>
__device__ __forceinline__ void add_spans(float (&along)[2], int span, const int (&row)[2],
                                          float (&sums)[kWarps][kRows][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x % 4 == 0) sums[span][row[i]][0] = along[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    along[i] = 0.0f;
    for (int other = 0; other < kSpans; ++other) along[i] += sums[other][row[i]][0];
  }
}

// dQ of a tile from dS in shared memory: a warp takes 16 queries and a part of their channels.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void tile_dq(const WindowAttentionParams& p,
                                        const WindowAttentionCudaBackwardPlan& plan,
                                        const Walk& walk, const Problem& problem,
                                        int64_t first_query, int stage,
                                        BackwardKeysShared<Math, kDim, kPack>& s,
                                        float* workspace) {
  using Shared = BackwardKeysShared<Math, kDim, kPack>;
  constexpr int kEach = Shared::kRows / kPack;
  constexpr int kKeys = Shared::kKeys / kPack;
  constexpr int kRowTiles = Shared::kRows / 16;
  constexpr int kSpans = kWarps / kRowTiles;
  constexpr int kSpan = kDim / kSpans;
  const int warp = threadIdx.x / 32;
  const int first_row = warp / kSpans * 16;
  const int span = warp % kSpans;
  const int first_key = warp * kPack / kWarps * kKeys;

  float dq[kSpan / 8][4] = {};
#pragma unroll
  for (int n = 0; n < kKeys; n += Math::kStep) {
    uint32_t a[4];
    Math::load_a_transposed(a, &s.dlogits[first_key + n], first_row);
#pragma unroll
    for (int c = 0; c < kSpan; c += 16) {
      uint32_t b[4];
      Math::load_summed_rows(b, &s.k[first_key + n], span * kSpan + c);
      if (p.qk_l2norm) Math::scale_rows(b, &s.k_inverse[first_key + n]);
      Math::mma(dq[c / 8], a, b[0], b[1]);
      Math::mma(dq[c / 8 + 1], a, b[2], b[3]);
    }
  }

  const int lane_row = first_row + threadIdx.x % 32 / 4;
  const int row[2] = {lane_row, lane_row + 8};
  if (p.qk_l2norm) {
    float along[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      along[i] = ptx::lanes_sum<4>(along_row<Math>(dq, i, &s.q[stage][row[i]][span * kSpan]));
    }
    if constexpr (kSpans > 1) add_spans<kSpans>(along, span, row, s.sums);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      normalise_backward<Math>(dq, i, &s.q[stage][row[i]][span * kSpan], s.q_inverse[row[i]],
                               along[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    write_dq<Math>(p, plan, walk, problem, first_query + row[i] % kEach, span * kSpan, dq, i,
                   workspace);
  }
}

// The block's share of the scale's gradient; `sums` has room for one float of each warp.
__device__ __forceinline__ void write_scale(float sum, float (&sums)[kWarps], float* to) {
  sum = ptx::lanes_sum<32>(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float all = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) all += sums[warp];
  *to = all;
}

// What the threads of a warp know of a problem.
struct KeySide {
  Problem problem;
  Matrices matrices;
  int part;        // which of the problems side by side
  int64_t key[2];  // of the thread
  int term[2];
};

__device__ __forceinline__ KeySide key_side_of(const WindowAttentionParams& p, const Task& task,
                                               int64_t problem, int part, int64_t first_key) {
  const int64_t key = first_key + threadIdx.x % 32 / 4;
  KeySide side{problem_at(p, problem), {}, part, {key, key + 8}, {}};
  side.matrices = matrices_of(p, task, side.problem);
  side.term[0] = key_term(p, side.problem, task.inverse_w, key);
  side.term[1] = key_term(p, side.problem, task.inverse_w, key + 8);
  return side;
}

// P^T and dS^T of a warp's keys and the queries of a tile. kAll: row sums are made here.
template <class Math, int kDim, int kPack, bool kAll, int kTiles>
__device__ __forceinline__ void weigh_tile(const WindowAttentionParams& p, const Task& task,
                                           const KeySide& side, int64_t first_query, int stage,
                                           BackwardKeysShared<Math, kDim, kPack>& s,
                                           float (&weights)[kTiles][4],
                                           float (&dlogits)[kTiles][4]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  constexpr int kQueries = kTiles * 8;
  const int first = side.part * kQueries;  // of the problem's rows
  const int64_t left = p.nq - first_query;
  const int queries = static_cast<int>(left < kQueries ? left : kQueries);
  multiply_rows<Math>(weights, &s.k[warp * 16], &s.q[stage][first]);
  multiply_rows<Math>(dlogits, &s.v[warp * 16], &s.grad[stage][first]);
  each_pair(weights, [&](float& x, int, int) { x *= task.scale; });
  if (p.qk_l2norm) {
    each_pair(weights, [&](float& x, int i, int column) {
      x *= s.q_inverse[first + column] * s.k_inverse[warp * 16 + lane / 4 + 8 * i];
    });
  }
  add_terms(
      p, task, side.matrices, weights,
      [&](int i, int column) { return Pair<int>{s.q_term[first + column], side.term[i]}; },
      [&](int i, int column) { return Pair<int64_t>{first_query + column, side.key[i]}; },
      [&](int i, int column) { return column < queries && side.key[i] < p.nk; });
  each_pair(weights, [&](float& x, int i, int column) {
    x = side.key[i] < p.nk ? weight_of(x, s.lse[first + column]) : 0.0f;
  });
  if constexpr (kAll) sum_rows<Math, kDim, kPack>(weights, dlogits, s);
  each_pair(weights, [&](float& x, int, int column) { x *= s.normaliser[first + column]; });
  each_pair(dlogits, [&](float& x, int, int column) { x -= s.delta[first + column]; });
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dlogits[n][e] *= weights[n][e];
  }
}

// A thread's share of the scale's gradient, the sum of dS times the products that the scale
// multiplies. These are made again: the roundings of dS in dQ would not cancel as those sums do.
template <class Math, int kDim, int kPack, int kTiles>
__device__ __forceinline__ float scale_gradient(const WindowAttentionParams& p, const KeySide& side,
                                                int stage,
                                                const BackwardKeysShared<Math, kDim, kPack>& s,
                                                const float (&dlogits)[kTiles][4]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first = side.part * kTiles * 8;
  float products[kTiles][4] = {};
  multiply_rows<Math>(products, &s.k[warp * 16], &s.q[stage][first]);
  if (p.qk_l2norm) {
    each_pair(products, [&](float& x, int i, int column) {
      x *= s.q_inverse[first + column] * s.k_inverse[warp * 16 + lane / 4 + 8 * i];
    });
  }
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += products[n][e] * dlogits[n][e];
  }
  return sum;
}

// kAll: all keys of a problem are in the block, which makes dQ too.
template <class Math, int kDim, int kPack, bool kAll>
__global__ void __launch_bounds__(kThreads,
                                  kAll&& kDim == 32 && sizeof(typename Math::Element) == 2 ? 3 : 2)
    window_attention_backward_keys(const __grid_constant__ WindowAttentionParams p,
                                   const __grid_constant__ WindowAttentionCudaBackwardPlan plan,
                                   float* workspace) {
  using Shared = BackwardKeysShared<Math, kDim, kPack>;
  constexpr int kStages = Shared::kStages;
  constexpr int kKeys = Shared::kKeys / kPack;  // of a problem
  constexpr int kRows = Shared::kRows / kPack;  // likewise, queries
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);

  int64_t block = blockIdx.x;
  const int64_t split = block % plan.q_splits;
  block /= plan.q_splits;
  const int64_t key_tile = block % plan.key_tiles;
  block /= plan.key_tiles;
  const Walk walk = walk_of(p, plan, block / p.heads, block % p.heads,
                            reinterpret_cast<float*>(memory + sizeof(Shared)));
  const Task& task = walk.task;
  const int64_t first_tile = split * plan.q_tiles_per_split;
  const int64_t behind_tile = first_tile + plan.q_tiles_per_split;
  const int64_t last_tile = behind_tile < plan.q_tiles ? behind_tile : plan.q_tiles;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int part = warp * kPack / kWarps;
  const int64_t first_key = key_tile * kKeys;
  float scale_sum = 0.0f;
  for (int64_t first = walk.first; first < task.behind; first += kPack) {
    const bool adds = first != walk.first;
    const KeySide side = key_side_of(p, task, first + part, part, first_key + warp * 16 % kKeys);
    load_keys<Math, kDim, Shared::kKeys, kPack>(p, plan, task, first, first_key, s.k, s.v);
    load_queries<Math, kDim, Shared::kRows, kPack, true>(p, plan, task, first, first_tile * kRows,
                                                         s.q[0], s.grad[0]);
    ptx::cp_async_commit();
    float dk[kDim / 8][4] = {};
    float dv[kDim / 8][4] = {};
    int stage = 0;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first_query = tile * kRows;
      if (kStages == 2 ? tile + 1 < last_tile : tile > first_tile) {
        const int next = (kStages - 1) * (1 - stage);
        load_queries<Math, kDim, Shared::kRows, kPack, true>(
            p, plan, task, first, first_query + (kStages - 1) * kRows, s.q[next], s.grad[next]);
      }
      ptx::cp_async_commit();
      describe_queries<Math, kDim, kPack, kAll>(p, plan, task, first, first_query, workspace, s);
      ptx::cp_async_wait<kStages - 1>();
      __syncthreads();
      if (p.qk_l2norm) {
        inverse_lengths<Math, Shared::kRows>(s.q[stage], s.q_inverse);
        if (tile == first_tile) inverse_lengths<Math, Shared::kKeys>(s.k, s.k_inverse);
        __syncthreads();
      }

      float weights[kRows / 8][4] = {};
      float dlogits[kRows / 8][4] = {};
      weigh_tile<Math, kDim, kPack, kAll>(p, task, side, first_query, stage, s, weights, dlogits);
      multiply_summed_rows<Math>(dv, weights, &s.grad[stage][part * kRows]);
      multiply_summed_rows<Math>(dk, dlogits, &s.q[stage][part * kRows],
                                 p.qk_l2norm ? &s.q_inverse[part * kRows] : nullptr);
      if (plan.bias >= 0) {
        const int64_t bias_part = (walk.chunk * kPack + part) * p.heads + task.head;
        add_bias_gradient(p, workspace + plan.bias + bias_part * p.nq * p.nk, adds, first_query,
                          side.key, dlogits);
      }
      if (plan.scale >= 0) {
        scale_sum += scale_gradient<Math, kDim, kPack>(p, side, stage, s, dlogits);
      }
      if constexpr (kAll) {
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            Math::store_pair(
                &s.dlogits[warp * 16 + lane / 4 + 8 * i][part * kRows + n * 8 + lane % 4 * 2],
                dlogits[n][2 * i], dlogits[n][2 * i + 1]);
          }
        }
        __syncthreads();
        tile_dq<Math, kDim, kPack>(p, plan, walk, side.problem, first_query, stage, s, workspace);
      }
      __syncthreads();
      stage = kStages - 1 - stage;
    }
    float* pads = nullptr;
    if (plan.pads >= 0) {
      const int64_t pad_part = (walk.chunk * plan.key_tiles + key_tile) * kWarps + warp;
      pads = workspace + plan.pads + (pad_part * p.heads + task.head) * 2 * p.head_dim;
    }
    finish_keys<Math, kDim, kPack>(p, plan, walk, side.problem, split, side.key, s, dk, dv, pads,
                                   adds, workspace);
    __syncthreads();
  }
  if (plan.scale >= 0) {
    const int64_t scale_part = (walk.chunk * plan.key_tiles + key_tile) * plan.q_splits + split;
    write_scale(scale_sum, s.scale, workspace + plan.scale + scale_part * p.heads + task.head);
  }
}

}  // namespace cuda
}  // namespace fastbb
