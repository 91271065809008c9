// SPDX-License-Identifier: Apache-2.0
// Shared memory of the kernel for keys, and what becomes of its sums: dK and dV to the map, to
// pads, to parts.
#pragma once

#include "ops/window_attention/window_attention_cuda_backward.cuh"

namespace fastbb {
namespace cuda {

template <class Math, int kDim, int kPack>
struct BackwardKeysShared {
  using Element = typename Math::Element;
  static constexpr int kLd = kDim + Math::kChunk;
  static constexpr int kKeys = kWindowCudaBackwardKeys;
  static constexpr int kRows = kBackwardRows<Math, kDim, kPack>;
  static constexpr int kStages = kBackwardStages<Math, kDim>;
  alignas(16) Element k[kKeys][kLd];
  alignas(16) Element v[kKeys][kLd];
  alignas(16) Element q[kStages][kRows][kLd];
  alignas(16) Element grad[kStages][kRows][kLd];
  alignas(16) Element dlogits[kKeys][kRows + Math::kChunk];
  float sums[kWarps][kRows][2];  // of P and of P dP over a warp's keys
  float normaliser[kRows];       // 1 / sum of P over all keys
  float delta[kRows];            // sum of P dP, normalised
  float lse[kRows];
  float q_inverse[kRows];
  int q_term[kRows];
  float k_inverse[kKeys];
  float scale[kWarps];
};

// A warp's dK and dV of padded tokens to its part of the sums; the first problem of a walk sets it.
template <int kDim>
__device__ __forceinline__ void add_pad_gradients(const WindowAttentionParams& p, float* pads,
                                                  bool adds, const bool (&padded)[2],
                                                  const float (&dk)[kDim / 8][4],
                                                  const float (&dv)[kDim / 8][4]) {
  if (adds && !__any_sync(ptx::kFullWarp, padded[0] || padded[1])) return;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sums[2] = {(padded[0] ? dk[n][e] : 0.0f) + (padded[1] ? dk[n][e + 2] : 0.0f),
                       (padded[0] ? dv[n][e] : 0.0f) + (padded[1] ? dv[n][e + 2] : 0.0f)};
      const int c = n * 8 + threadIdx.x % 4 * 2 + e;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          sums[which] += __shfl_xor_sync(ptx::kFullWarp, sums[which], step);
        }
        if (threadIdx.x % 32 >= 4 || c >= p.head_dim) continue;
        float* to = pads + which * p.head_dim + c;
        *to = adds ? *to + sums[which] : sums[which];
      }
    }
  }
}

// A row of dK or dV.
template <class Math, int kDim>
__device__ __forceinline__ void write_key(const WindowAttentionParams& p, bool aligned,
                                          typename Math::Element* to, float* part,
                                          const float (&grad)[kDim / 8][4], int i) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const int c = n * 8 + threadIdx.x % 4 * 2;
    if (part == nullptr) {
      write_pair<Math>(to, c, p.head_dim, aligned, grad[n][2 * i], grad[n][2 * i + 1]);
    } else {
      if (c < p.head_dim) part[c] = grad[n][2 * i];
      if (c + 1 < p.head_dim) part[c + 1] = grad[n][2 * i + 1];
    }
  }
}

// dK and dV of a thread's two keys: to the map, to the pads, or to this split's part of the sum.
template <class Math, int kDim, int kPack>
__device__ __forceinline__ void finish_keys(const WindowAttentionParams& p,
                                            const WindowAttentionCudaBackwardPlan& plan,
                                            const Walk& walk, const Problem& problem, int64_t split,
                                            const int64_t (&key)[2],
                                            BackwardKeysShared<Math, kDim, kPack>& s,
                                            float (&dk)[kDim / 8][4], float (&dv)[kDim / 8][4],
                                            float* pads, bool adds, float* workspace) {
  using Element = typename Math::Element;
  const Task& task = walk.task;
  const int warp = threadIdx.x / 32;
  bool padded[2];
  Place place[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + threadIdx.x % 32 / 4 + 8 * i;
    if (p.qk_l2norm) {
      const float along = ptx::lanes_sum<4>(along_row<Math>(dk, i, s.k[row]));
      normalise_backward<Math>(dk, i, s.k[row], s.k_inverse[row], along);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      dk[n][2 * i] *= task.scale;
      dk[n][2 * i + 1] *= task.scale;
    }
    const bool exists = problem.index < task.behind && key[i] < p.nk;
    place[i] = exists ? place_of(p, plan, problem, task.inverse_w, static_cast<int>(key[i]))
                      : Place{-1, 0};
    padded[i] = exists && place[i].y < 0;
  }
  if (pads != nullptr) add_pad_gradients<kDim>(p, pads, adds, padded, dk, dv);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (place[i].y < 0) continue;
    Element* to_k = row_at<Element>(p.grad.dk, problem.image, task.head, place[i]);
    Element* to_v = row_at<Element>(p.grad.dv, problem.image, task.head, place[i]);
    float* part_k = nullptr;
    float* part_v = nullptr;
    if (plan.q_splits > 1) {
      const int64_t part = (problem.index * plan.q_splits + split) * p.heads + task.head;
      part_k = workspace + plan.dkv + (part * 2 * p.nk + key[i]) * p.head_dim;
      part_v = part_k + p.nk * p.head_dim;
    }
    write_key<Math, kDim>(p, plan.aligned, to_k, part_k, dk, i);
    write_key<Math, kDim>(p, plan.aligned, to_v, part_v, dv, i);
  }
}

}  // namespace cuda
}  // namespace fastbb
