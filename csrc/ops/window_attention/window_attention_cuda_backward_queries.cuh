// SPDX-License-Identifier: Apache-2.0
// dQ where keys need several blocks, and the row sums that the kernel for keys reads.
//
// A block of 4 warps takes 64 queries of one problem and head, a warp 16 of them, and goes twice
// over the keys, which come in tiles through two stages of asynchronous copies (one for 128 float32
// channels): once for the sums of P and P dP, once for dQ. P and dS stay in registers, where dS is
// an operand of dQ as it is.
//
// Keys of a tile: 32, or 16 of head dim 128 and, in float32, of 64.
#pragma once

#include "ops/window_attention/window_attention_cuda_backward.cuh"

namespace fastbb {
namespace cuda {

template <class Math, int kDim>
struct BackwardQueriesShared {
  using Element = typename Math::Element;
  static constexpr int kLd = kDim + Math::kChunk;
  static constexpr int kKeys = kBackwardRows<Math, kDim, 1>;
  static constexpr int kStages = kBackwardStages<Math, kDim>;
  alignas(16) Element q[kQueries][kLd];
  alignas(16) Element grad[kQueries][kLd];
  alignas(16) Element k[kStages][kKeys][kLd];
  alignas(16) Element v[kStages][kKeys][kLd];
  float q_inverse[kQueries];
  float k_inverse[kKeys];
  int key_term[kKeys];
};

// A thread's two rows: their queries and sums over keys.
struct QueryRows {
  int64_t token[2];
  int term[2];
  float lse[2];
  float total[2], along[2];       // of P and of P dP, this thread's keys
  float normaliser[2], delta[2];  // of whole rows, after the first pass
};

__device__ __forceinline__ QueryRows query_rows_of(const WindowAttentionParams& p,
                                                   const WindowAttentionCudaRows& plan,
                                                   const Task& task, const Problem& problem,
                                                   int64_t first_query) {
  QueryRows rows{};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = first_query + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
    rows.token[i] = token;
    rows.lse[i] = lse_of(p, plan, task, problem, token);
    rows.term[i] = query_term(p, problem, task.inverse_w, token);
  }
  return rows;
}

// The sums of whole rows, for this kernel and the one for keys.
__device__ __forceinline__ void finish_sums(const WindowAttentionParams& p, const Task& task,
                                            const Problem& problem, QueryRows& rows,
                                            float* row_sums) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.normaliser[i] = normaliser_of(ptx::lanes_sum<4>(rows.total[i]));
    rows.delta[i] = ptx::lanes_sum<4>(rows.along[i]) * rows.normaliser[i];
    if (threadIdx.x % 4 != 0 || rows.token[i] >= p.nq) continue;
    float* to = row_sums + ((problem.index * p.heads + task.head) * p.nq + rows.token[i]) * 2;
    to[0] = rows.normaliser[i];
    to[1] = rows.delta[i];
  }
}

// Weights, not yet normalised, and dP of a warp's queries and a stage's keys.
template <class Math, int kDim>
__device__ __forceinline__ void weigh_stage(const WindowAttentionParams& p, const Task& task,
                                            const Matrices& matrices, const QueryRows& rows,
                                            int64_t first_key, int stage,
                                            const BackwardQueriesShared<Math, kDim>& s,
                                            float (&weights)[kBackwardRows<Math, kDim, 1> / 8][4],
                                            float (&dlogits)[kBackwardRows<Math, kDim, 1> / 8][4]) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  constexpr int kKeys = kBackwardRows<Math, kDim, 1>;
  const int keys = static_cast<int>(p.nk - first_key < kKeys ? p.nk - first_key : kKeys);
  multiply_rows<Math>(weights, &s.q[warp * 16], &s.k[stage][0]);
  multiply_rows<Math>(dlogits, &s.grad[warp * 16], &s.v[stage][0]);
  each_pair(weights, [&](float& x, int, int) { x *= task.scale; });
  if (p.qk_l2norm) {
    each_pair(weights, [&](float& x, int i, int column) {
      x *= s.q_inverse[warp * 16 + lane / 4 + 8 * i] * s.k_inverse[column];
    });
  }
  add_terms(
      p, task, matrices, weights,
      [&](int i, int column) { return Pair<int>{rows.term[i], s.key_term[column]}; },
      [&](int i, int column) {
        return Pair<int64_t>{clamped(rows.token[i], p.nq), first_key + column};
      },
      [&](int, int column) { return column < keys; });
  each_pair(weights, [&](float& x, int i, int column) {
    x = column < keys ? weight_of(x, rows.lse[i]) : 0.0f;
  });
}

template <class Math, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    window_attention_backward_queries(const __grid_constant__ WindowAttentionParams p,
                                      const __grid_constant__ WindowAttentionCudaBackwardPlan plan,
                                      float* workspace) {
  using Shared = BackwardQueriesShared<Math, kDim>;
  constexpr int kStages = Shared::kStages;
  constexpr int kKeys = Shared::kKeys;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);

  const int64_t block = blockIdx.x;
  const int64_t first_query = block % plan.q_blocks * kQueries;
  const Walk walk =
      walk_of(p, plan, block / plan.q_blocks / p.heads, block / plan.q_blocks % p.heads,
              reinterpret_cast<float*>(memory + sizeof(Shared)));
  const Task& task = walk.task;
  const int64_t tiles = (p.nk + kKeys - 1) / kKeys;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  for (int64_t index = walk.first; index < task.behind; ++index) {
    const Problem problem = problem_at(p, index);
    const Matrices matrices = matrices_of(p, task, problem);
    QueryRows rows = query_rows_of(p, plan, task, problem, first_query);
    load_queries<Math, kDim, kQueries, 1, true>(p, plan, task, index, first_query, s.q, s.grad);
    load_keys<Math, kDim, kKeys, 1>(p, plan, task, index, 0, s.k[0], s.v[0]);
    ptx::cp_async_commit();
    float dq[kDim / 8][4] = {};
    int stage = 0;
    for (int64_t step = 0; step < 2 * tiles; ++step) {
      const int64_t first_key = step % tiles * kKeys;
      if (kStages == 2 && step + 1 < 2 * tiles) {
        load_keys<Math, kDim, kKeys, 1>(p, plan, task, index, (step + 1) % tiles * kKeys,
                                        s.k[1 - stage], s.v[1 - stage]);
      } else if (kStages == 1 && step > 0) {
        load_keys<Math, kDim, kKeys, 1>(p, plan, task, index, first_key, s.k[0], s.v[0]);
      }
      ptx::cp_async_commit();
      if (threadIdx.x < kKeys) {
        s.key_term[threadIdx.x] = key_term(p, problem, task.inverse_w, first_key + threadIdx.x);
      }
      ptx::cp_async_wait<kStages - 1>();
      __syncthreads();
      if (p.qk_l2norm) {
        inverse_lengths<Math, kKeys>(s.k[stage], s.k_inverse);
        if (step == 0) inverse_lengths<Math, kQueries>(s.q, s.q_inverse);
        __syncthreads();
      }

      float weights[kKeys / 8][4] = {};
      float dlogits[kKeys / 8][4] = {};
      weigh_stage<Math, kDim>(p, task, matrices, rows, first_key, stage, s, weights, dlogits);
      if (step < tiles) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            rows.total[e / 2] += weights[n][e];
            rows.along[e / 2] += weights[n][e] * dlogits[n][e];
          }
        }
        if (step + 1 == tiles) finish_sums(p, task, problem, rows, workspace + plan.row_sums);
      } else {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = e / 2;
            dlogits[n][e] = weights[n][e] * rows.normaliser[i] * (dlogits[n][e] - rows.delta[i]);
          }
        }
        multiply_summed_rows<Math>(dq, dlogits, &s.k[stage][0],
                                   p.qk_l2norm ? s.k_inverse : nullptr);
      }
      __syncthreads();
      stage = kStages - 1 - stage;
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp * 16 + lane / 4 + 8 * i;
      if (p.qk_l2norm) {
        const float along = ptx::lanes_sum<4>(along_row<Math>(dq, i, s.q[row]));
        normalise_backward<Math>(dq, i, s.q[row], s.q_inverse[row], along);
      }
      write_dq<Math>(p, plan, walk, problem, rows.token[i], 0, dq, i, workspace);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace fastbb
