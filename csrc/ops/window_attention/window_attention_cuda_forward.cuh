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
  int key_term[kKeys];  // the key's share of the table index; its region from bit 24 on
};

// What the threads of a block agree on.
struct ForwardTask {
  int64_t head, first_query;
  int64_t problems;
  float inverse_w;  // 1 / window_w
};

// Queries of the problems from `first` on.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void load_queries(const WindowAttentionParams& p,
                                             const WindowAttentionCudaPlan& plan,
                                             const ForwardTask& task, int64_t first,
                                             ForwardShared<Math, kDim>& s, int stage) {
  using Element = typename Math::Element;
  constexpr int kChunks = kDim / Math::kChunk;
  constexpr int kRows = kQueries / kPack;
#pragma unroll 2
  for (int i = threadIdx.x; i < kQueries * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int c = i % kChunks * Math::kChunk;
    const int64_t index = first + (kPack == 1 ? 0 : row / kRows);
    const int64_t token = task.first_query + (kPack == 1 ? row : row % kRows);
    const Element* from = nullptr;
    if (index < task.problems && token < p.nq) {
      const Problem problem = problem_at(p, index);
      const int at = static_cast<int>(token);
      const Place place =
          p.q_shared ? Place{0, at} : place_of(p, plan, problem, task.inverse_w, at);
      if (place.y >= 0) from = row_at<const Element>(p.q, problem.image, task.head, place);
    }
    load_chunk<Math>(from, nullptr, c, p.head_dim, plan.aligned, &s.q[stage][row][c]);
  }
}

// A stage of keys and values of the problems from `first` on.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void load_keys(const WindowAttentionParams& p,
                                          const WindowAttentionCudaPlan& plan,
                                          const ForwardTask& task, int64_t first, int64_t first_key,
                                          ForwardShared<Math, kDim>& s, int stage) {
  using Element = typename Math::Element;
  constexpr int kChunks = kDim / Math::kChunk;
  constexpr int kKeys = ForwardShared<Math, kDim>::kKeys;
  constexpr int kRows = kKeys / kPack;
#pragma unroll 2
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int c = i % kChunks * Math::kChunk;
    const int64_t index = first + (kPack == 1 ? 0 : row / kRows);
    const int64_t token = first_key + (kPack == 1 ? row : row % kRows);
    const Element* k = nullptr;
    const Element* v = nullptr;
    const float* k_pad = nullptr;
    const float* v_pad = nullptr;
    if (index < task.problems && token < p.nk) {
      const Problem problem = problem_at(p, index);
      const Place place = place_of(p, plan, problem, task.inverse_w, static_cast<int>(token));
      if (place.y >= 0) {
        k = row_at<const Element>(p.k, problem.image, task.head, place);
        v = row_at<const Element>(p.v, problem.image, task.head, place);
      } else {
        if (p.k_pad != nullptr) k_pad = p.k_pad + task.head * p.head_dim;
        if (p.v_pad != nullptr) v_pad = p.v_pad + task.head * p.head_dim;
      }
    }
    load_chunk<Math>(k, k_pad, c, p.head_dim, plan.aligned, &s.k[stage][row][c]);
    load_chunk<Math>(v, v_pad, c, p.head_dim, plan.aligned, &s.v[stage][row][c]);
  }
}

// Index terms and regions of a stage's keys.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void describe_keys(const WindowAttentionParams& p,
                                              const ForwardTask& task, int64_t first,
                                              int64_t first_key, ForwardShared<Math, kDim>& s) {
  constexpr int kKeys = ForwardShared<Math, kDim>::kKeys;
  constexpr int kRows = kKeys / kPack;
  if (p.full || threadIdx.x >= kKeys) return;
  const int row = threadIdx.x;
  const int64_t index = first + (kPack == 1 ? 0 : row / kRows);
  const Slot slot =
      slot_of(p, task.inverse_w, static_cast<int>(first_key) + (kPack == 1 ? row : row % kRows));
  const int region = region_of(p, problem_at(p, index), slot);
  s.key_term[row] = slot.row * (2 * p.window_w - 1) + slot.column + (region << 24);
}

// The bias table of a head, flipped on both axes, so that a query and a key add their terms.
__device__ __forceinline__ void load_table(const WindowAttentionParams& p, int64_t head,
                                           float* table) {
  const int size = (2 * p.window_h - 1) * (2 * p.window_w - 1);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    table[i] = p.table[int64_t{size - 1 - i} * p.heads + head];
  }
}

// One of a thread's two queries of a problem.
struct Query {
  int64_t token;
  int term, region;
  const float* bias;  // rows of these matrices, or null
  const float* mask;
};

__device__ __forceinline__ Query query_of(const WindowAttentionParams& p, const ForwardTask& task,
                                          const Problem& problem, int64_t token) {
  Query query{token, 0, 0, nullptr, nullptr};
  const int64_t row = token < p.nq ? token : p.nq - 1;
  if (!p.full) {
    const Slot slot = slot_of(p, task.inverse_w, static_cast<int>(row));
    query.term = (p.window_h - 1 - slot.row) * (2 * p.window_w - 1) + p.window_w - 1 - slot.column;
    query.region = region_of(p, problem, slot);
  }
  if (p.bias != nullptr) query.bias = p.bias + (task.head * p.nq + row) * p.bias_ld;
  if (p.mask != nullptr) {
    const int64_t mask = (p.full ? problem.image : problem.window) % p.mask_count;
    query.mask = p.mask + (mask * p.nq + row) * p.nk;
  }
  return query;
}

// All that is added to a logit of the windowed domain, from the key's term on.
__device__ __forceinline__ float window_terms(const WindowAttentionParams& p,
                                              const WindowAttentionCudaPlan& plan,
                                              const float* table, int64_t head, const Query& query,
                                              int key_term) {
  float sum = 0.0f;
  if (p.table != nullptr) {
    const int at = query.term + (key_term & 0xffffff);
    if (plan.table_shared) {
      sum = table[at];
    } else {
      const int64_t last = int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1) - 1;
      sum = p.table[(last - at) * p.heads + head];
    }
  }
  if (p.swin_mask && key_term >> 24 != query.region) sum += p.swin_mask_value;
  return sum;
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
                                          const WindowAttentionCudaPlan& plan,
                                          const ForwardTask& task, const Problem& problem,
                                          int64_t query, int i, float top, float sum,
                                          const float (&out)[kDim / 8][4]) {
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
    const int c = n * 8 + lane * 2;
    if (c < p.head_dim) to[c] = Math::narrow(out[n][2 * i] * inverse);
    if (c + 1 < p.head_dim) to[c + 1] = Math::narrow(out[n][2 * i + 1] * inverse);
  }
}

template <class Math, int kDim, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    window_attention_forward(const __grid_constant__ WindowAttentionParams p,
                             const __grid_constant__ WindowAttentionCudaPlan plan) {
  using Shared = ForwardShared<Math, kDim>;
  constexpr int kKeys = Shared::kKeys / kPack;  // of a problem
  constexpr int kRows = kQueries / kPack;       // likewise
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  float* table = reinterpret_cast<float*>(memory + sizeof(Shared));

  const int64_t block = blockIdx.x;
  ForwardTask task;
  task.first_query = block % plan.q_blocks * kQueries;
  task.head = block / plan.q_blocks % p.heads;
  task.problems = p.batch * (p.full ? 1 : p.windows_y * p.windows_x);
  task.inverse_w = p.full ? 0.0f : 1.0f / static_cast<float>(p.window_w);
  int64_t first = block / plan.q_blocks / p.heads * plan.walk * kPack;
  const int64_t behind = first + plan.walk * kPack;
  const int64_t last = behind < task.problems ? behind : task.problems;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int part = warp * kPack / 4;  // which of the problems side by side
  if (plan.table_shared) load_table(p, task.head, table);
  const float scale = p.scale_per_head != nullptr ? p.scale_per_head[task.head] : p.scale;

  load_queries<Math, kDim, kPack>(p, plan, task, first, s, 0);
  load_keys<Math, kDim, kPack>(p, plan, task, first, 0, s, 0);
  ptx::cp_async_commit();
  int stage = 0, query_stage = 0;
  for (; first < last; first += kPack) {
    const Problem problem = problem_at(p, first + part);
    Query query[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (warp * 16 + lane / 4 + 8 * i) % kRows;
      query[i] = query_of(p, task, problem, task.first_query + row);
    }
    float out[kDim / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
    for (int64_t first_key = 0; first_key < p.nk; first_key += kKeys) {
      if (first_key + kKeys < p.nk) {
        load_keys<Math, kDim, kPack>(p, plan, task, first, first_key + kKeys, s, 1 - stage);
      } else if (Shared::kQueryStages == 2 && first + kPack < last) {
        load_queries<Math, kDim, kPack>(p, plan, task, first + kPack, s, 1 - query_stage);
        load_keys<Math, kDim, kPack>(p, plan, task, first + kPack, 0, s, 1 - stage);
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

      float logits[kKeys / 8][4] = {};
#pragma unroll
      for (int c = 0; c < kDim; c += Math::kStep) {
        uint32_t a[4];
        load_a<Math>(a, &s.q[query_stage][warp * 16], c);
#pragma unroll
        for (int n = 0; n < kKeys; n += 16) {
          uint32_t b[4];
          load_b<Math>(b, &s.k[stage][part * kKeys + n], c);
          Math::mma(logits[n / 8], a, b[0], b[1]);
          Math::mma(logits[n / 8 + 1], a, b[2], b[3]);
        }
      }

#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Query& row = query[e / 2];
          const int column = n * 8 + lane % 4 * 2 + e % 2;
          const int64_t key = first_key + column;
          float x = logits[n][e] * scale;
          if (p.qk_l2norm) {
            x *= s.q_inverse[warp * 16 + lane / 4 + e / 2 * 8] * s.k_inverse[part * kKeys + column];
          }
          if (key < p.nk) {
            if (!p.full) {
              x += window_terms(p, plan, table, task.head, row, s.key_term[part * kKeys + column]);
            }
            if (row.bias != nullptr) x += row.bias[key];
            if (row.mask != nullptr) x += row.mask[key];
          } else {
            x = -INFINITY;
          }
          logits[n][e] = x;
        }
      }
      softmax_step(logits, top, sum, out);

#pragma unroll
      for (int n = 0; n < kKeys; n += Math::kStep) {
        uint32_t a[4];
        Math::pack(a, logits, n / 8);
#pragma unroll
        for (int c = 0; c < kDim; c += 16) {
          uint32_t b[4];
          Math::load_summed_rows(b, &s.v[stage][part * kKeys + n], c);
          Math::mma(out[c / 8], a, b[0], b[1]);
          Math::mma(out[c / 8 + 1], a, b[2], b[3]);
        }
      }
      __syncthreads();
      stage = 1 - stage;
    }
    query_stage = Shared::kQueryStages - 1 - query_stage;

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = ptx::lanes_sum<4>(sum[i]);
      if (query[i].token < p.nq && problem.index < task.problems) {
        write_row<Math, kDim>(p, plan, task, problem, query[i].token, i, top[i], total, out);
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastbb
