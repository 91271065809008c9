// SPDX-License-Identifier: Apache-2.0
// Forward pass on tensor cores (sm_80 and later).
//
// A block of 4 warps takes 64 queries of one head, a warp 16 of them: of one problem, or of 2 or 4
// problems side by side whose tokens fill no more than 32 or 16 rows. Keys and values come in
// blocks through two stages of asynchronous copies, straight from the strided map: roll, padding
// and windows exist in the row addresses only. Where there are many blocks, each takes up to four
// problems in turn and loads one while it computes another. Logits stay in registers, with a
// running maximum and sum (one pass where the keys fit in a stage); the bias table of the head,
// flipped, lies in shared memory. L2-normalisation multiplies logits by 1 / |q| and 1 / |k|, so
// that nothing is rounded before the product.
//
// Keys of a stage: 64 in 16-bit types; 64, 32, 16 of head dims 32, 64, 128 in float32. Registers,
// shared memory and blocks per multiprocessor: docs/verification.md. Bound, by arithmetic and not
// yet by measurement: memory. A window of 49 tokens with d = 32 moves 12.5 KB in float16 and needs
// 0.5 Mflop of padded products: 8 ns and 1.7 ns of an A100 (1.55 TB/s, 312 TFLOP/s), 4 ns and
// 0.5 ns of an H100 (3.35 TB/s, 989 TFLOP/s). float32 moves twice that; its products take 3.4 ns
// of an A100 in tf32 (156 TFLOP/s), three times that without.
#pragma once

#include "ops/window_attention/window_attention_cuda.cuh"

namespace fastbb {
namespace cuda {

template <class Math, int kDim>
struct ForwardShared {
  using Element = typename Math::Element;
  static constexpr int kLd = kDim + Math::kChunk;
  static constexpr int kKeys = window_cuda_keys(sizeof(Element), kDim);
  static constexpr int kQueryStages = window_cuda_query_stages(kDim);
  alignas(16) Element q[kQueryStages][kQueries][kLd];
  alignas(16) Element k[2][kKeys][kLd];
  alignas(16) Element v[2][kKeys][kLd];
  float q_inverse[kQueries];
  float k_inverse[kKeys];
  int key_term[kKeys];
};

// Terms of a stage's keys.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void describe_keys(const WindowAttentionParams& p, const Task& task,
                                              int64_t first, int64_t first_key,
                                              ForwardShared<Math, kDim>& s) {
  using Keys = Side<ForwardShared<Math, kDim>::kKeys, kPack>;
  const int row = threadIdx.x;
  if (row >= ForwardShared<Math, kDim>::kKeys) return;
  const Problem problem = problem_at(p, Keys::problem(first, row));
  s.key_term[row] = key_term(p, problem, task.inverse_w, Keys::token(first_key, row));
}

// Running softmax of a thread's two rows. Returns with logits replaced by weights.
template <int kTiles, int kOutTiles>
__device__ __forceinline__ void softmax_step(float (&logits)[kTiles][4], float (&top)[2],
                                             float (&sum)[2], float (&out)[kOutTiles][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float new_top = top[i];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      new_top = fmaxf(new_top, fmaxf(logits[n][2 * i], logits[n][2 * i + 1]));
    }
    new_top = ptx::lanes_max<4>(new_top);
    // All keys masked with -inf so far: subtract 0, so that later blocks still count.
    const float shift = new_top == -INFINITY ? 0.0f : new_top * kLog2E;
    const float shrink = ptx::exp2_approx(top[i] * kLog2E - shift);
    top[i] = new_top;
    sum[i] *= shrink;
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
      out[n][2 * i] *= shrink;
      out[n][2 * i + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        logits[n][e] = ptx::exp2_approx(logits[n][e] * kLog2E - shift);
        sum[i] += logits[n][e];
      }
    }
  }
}

// A finished row: out / sum to the map, log-sum-exp.
template <class Math, int kDim>
__device__ __forceinline__ void write_row(const WindowAttentionParams& p,
                                          const WindowAttentionCudaPlan& plan, const Task& task,
                                          const Problem& problem, int64_t query, int i, float top,
                                          float sum, const float (&out)[kDim / 8][4]) {
  using Element = typename Math::Element;
  const Place place = place_of(p, plan, problem, task.inverse_w, static_cast<int>(query));
  const int lane = threadIdx.x % 4;
  if (lane == 0) {
    p.lse[(problem.index * p.heads + task.head) * p.nq + query] =
        place.y < 0 ? 0.0f : top + logf(sum);
  }
  if (place.y < 0) return;
  Element* to = row_at<Element>(p.out, problem.image, task.head, place);
  const float inverse = 1.0f / sum;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    write_pair<Math>(to, n * 8 + lane * 2, p.head_dim, plan.aligned, out[n][2 * i] * inverse,
                     out[n][2 * i + 1] * inverse);
  }
}

template <class Math, int kDim, int kPack>
__global__ void __launch_bounds__(kThreads, kDim == 32 ? 3 : 2)
    window_attention_forward(const __grid_constant__ WindowAttentionParams p,
                             const __grid_constant__ WindowAttentionCudaPlan plan) {
  using Shared = ForwardShared<Math, kDim>;
  constexpr int kKeys = Shared::kKeys / kPack;  // of a problem
  constexpr int kRows = kQueries / kPack;       // likewise
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  float* table = reinterpret_cast<float*>(memory + sizeof(Shared));

  const int64_t block = blockIdx.x;
  const int64_t first_query = block % plan.q_blocks * kQueries;
  int64_t first = block / plan.q_blocks / p.heads * plan.walk * kPack;
  const int64_t problems = p.batch * (p.full ? 1 : p.windows_y * p.windows_x);
  const int64_t behind = first + plan.walk * kPack;
  const Task task = task_of(p, plan, block / plan.q_blocks % p.heads,
                            behind < problems ? behind : problems, table);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int part = warp * kPack / 4;  // which of the problems side by side

  load_queries<Math, kDim, kQueries, kPack, false>(p, plan, task, first, first_query, s.q[0],
                                                   nullptr);
  load_keys<Math, kDim, Shared::kKeys, kPack>(p, plan, task, first, 0, s.k[0], s.v[0]);
  ptx::cp_async_commit();
  int stage = 0, query_stage = 0;
  for (; first < task.behind; first += kPack) {
    const Problem problem = problem_at(p, first + part);
    const Matrices matrices = matrices_of(p, task, problem);
    int64_t query[2];
    int query_terms[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      query[i] = first_query + (warp * 16 + lane / 4 + 8 * i) % kRows;
      query_terms[i] = query_term(p, problem, task.inverse_w, query[i]);
    }
    float out[kDim / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
    for (int64_t first_key = 0; first_key < p.nk; first_key += kKeys) {
      if (first_key + kKeys < p.nk) {
        load_keys<Math, kDim, Shared::kKeys, kPack>(p, plan, task, first, first_key + kKeys,
                                                    s.k[1 - stage], s.v[1 - stage]);
      } else if (Shared::kQueryStages == 2 && first + kPack < task.behind) {
        load_queries<Math, kDim, kQueries, kPack, false>(p, plan, task, first + kPack, first_query,
                                                         s.q[1 - query_stage], nullptr);
        load_keys<Math, kDim, Shared::kKeys, kPack>(p, plan, task, first + kPack, 0, s.k[1 - stage],
                                                    s.v[1 - stage]);
      }
      ptx::cp_async_commit();
      describe_keys<Math, kDim, kPack>(p, task, first, first_key, s);
      ptx::cp_async_wait<1>();
      __syncthreads();
      if (p.qk_l2norm) {
        if (first_key == 0) inverse_lengths<Math, kQueries>(s.q[query_stage], s.q_inverse);
        inverse_lengths<Math, Shared::kKeys>(s.k[stage], s.k_inverse);
        __syncthreads();
      }

      const int keys = static_cast<int>(p.nk - first_key < kKeys ? p.nk - first_key : kKeys);
      float logits[kKeys / 8][4] = {};
      multiply_rows<Math>(logits, &s.q[query_stage][warp * 16], &s.k[stage][part * kKeys]);
      each_pair(logits, [&](float& x, int, int) { x *= task.scale; });
      if (p.qk_l2norm) {
        each_pair(logits, [&](float& x, int i, int column) {
          x *= s.q_inverse[warp * 16 + lane / 4 + 8 * i] * s.k_inverse[part * kKeys + column];
        });
      }
      add_terms(
          p, task, matrices, logits,
          [&](int i, int column) {
            return Pair<int>{query_terms[i], s.key_term[part * kKeys + column]};
          },
          [&](int i, int column) {
            return Pair<int64_t>{clamped(query[i], p.nq), first_key + column};
          },
          [&](int, int column) { return column < keys; });
      each_pair(logits, [&](float& x, int, int column) {
        if (column >= keys) x = -INFINITY;
      });
      softmax_step(logits, top, sum, out);

      multiply_summed_rows<Math>(out, logits, &s.v[stage][part * kKeys]);
      __syncthreads();
      stage = 1 - stage;
    }
    query_stage = Shared::kQueryStages - 1 - query_stage;

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = ptx::lanes_sum<4>(sum[i]);
      if (query[i] < p.nq && problem.index < task.behind) {
        write_row<Math, kDim>(p, plan, task, problem, query[i], i, top[i], total, out);
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastbb
