// SPDX-License-Identifier: Apache-2.0
// What the two kernels of the backward pass share: weights from the forward's log-sum-exp, the way
// back through L2-normalisation, and where gradients of queries go.
//
//   P = exp(scale Q K^T + terms - lse)      recomputed, in registers
//   dV = P^T dO                             dP = dO V^T
//   dS = P (dP - rowsum(P dP))              dQ = scale dS K        dK = scale dS^T Q
//
// P is divided by its row sums, since exp(x - lse) carries the rounding of lse, which would not
// cancel in dP - rowsum(P dP); the results of the forward pass are not needed. No atomics: see
// WindowAttentionCudaBackwardPlan.
//
// Windows of up to 64 tokens take one kernel and five products. Larger ones take nine: the kernel
// for queries goes twice over the keys, for the row sums and for dQ, and the kernel for keys makes
// P and dS again. Bound, by arithmetic and not yet by measurement, of float16 with d = 32: a window
// of 49 tokens moves 22 KB and needs 1.3 Mflop of padded products, 14 ns and 4.2 ns of an A100
// (1.55 TB/s, 312 TFLOP/s), 6.6 ns and 1.3 ns of an H100 (3.35 TB/s, 989 TFLOP/s): memory. One of
// 196 tokens moves 138 KB and needs 33 Mflop, 89 ns and 106 ns, 41 ns and 33 ns: both. Registers,
// shared memory and blocks per multiprocessor: docs/verification.md.
#pragma once

#include "ops/window_attention/window_attention_cuda.cuh"

namespace fastbb {
namespace cuda {

constexpr int kWarps = kThreads / 32;

template <class Math, int kDim, int kPack>
constexpr int kBackwardRows =
    window_cuda_backward_rows(sizeof(typename Math::Element), kDim, kPack);
template <class Math, int kDim>
constexpr int kBackwardStages = window_cuda_backward_stages(sizeof(typename Math::Element), kDim);

// The problems [first, task.behind) of a block.
struct Walk {
  int64_t chunk, first;
  Task task;
};

__device__ __forceinline__ Walk walk_of(const WindowAttentionParams& p,
                                        const WindowAttentionCudaBackwardPlan& plan, int64_t chunk,
                                        int64_t head, float* table) {
  const int64_t windows = p.full ? 1 : p.windows_y * p.windows_x;
  const int64_t step = plan.walk * plan.pack;
  int64_t first = chunk * step, end = p.batch * windows;
  if (p.q_shared) {
    const int64_t image = chunk / plan.chunks_per_image;
    first = image * windows + (chunk - image * plan.chunks_per_image) * step;
    end = (image + 1) * windows;
  }
  const int64_t behind = first + step < end ? first + step : end;
  return {chunk, first, task_of(p, plan, head, behind, table)};
}

// The log-sum-exp of a query. Infinite, which makes all weights zero, where there is no such
// problem or token, and for padded ones, whose results are thrown away.
__device__ __forceinline__ float lse_of(const WindowAttentionParams& p,
                                        const WindowAttentionCudaRows& plan, const Task& task,
                                        const Problem& problem, int64_t token) {
  if (problem.index >= task.behind || token >= p.nq) return INFINITY;
  const Place place = place_of(p, plan, problem, task.inverse_w, static_cast<int>(token));
  if (place.y < 0) return INFINITY;
  return p.lse[(problem.index * p.heads + task.head) * p.nq + token];
}

// The weight of a logit before its row is normalised.
__device__ __forceinline__ float weight_of(float logit, float lse) {
  return lse == INFINITY ? 0.0f : ptx::exp2_approx((logit - lse) * kLog2E);
}

// 1 / the sum of a row's weights, or 0 for a row without any.
__device__ __forceinline__ float normaliser_of(float sum) {
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

// A thread's share of the product of a gradient's row i (0 or 1 of the thread's two) with `row`,
// the row in shared memory, both from the same channel on.
template <class Math, int kTiles>
__device__ __forceinline__ float along_row(const float (&grad)[kTiles][4], int i,
                                           const typename Math::Element* row) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int c = n * 8 + threadIdx.x % 4 * 2;
    sum += grad[n][2 * i] * Math::widen(row[c]) + grad[n][2 * i + 1] * Math::widen(row[c + 1]);
  }
  return sum;
}

// Gradient through y = row * inverse, the normalised row, with `along` = row . gradient:
// g <- (g - y (y . g)) * inverse. Below eps the length is a constant.
template <class Math, int kTiles>
__device__ __forceinline__ void normalise_backward(float (&grad)[kTiles][4], int i,
                                                   const typename Math::Element* row, float inverse,
                                                   float along) {
  const float share = inverse >= 1.0f / kL2NormEps ? 0.0f : along * inverse * inverse;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float x = Math::widen(row[n * 8 + threadIdx.x % 4 * 2 + e]);
      grad[n][2 * i + e] = (grad[n][2 * i + e] - x * share) * inverse;
    }
  }
}

// dQ of one token, channels from `c` on: to the map, or added to the block's part of the sum over
// an image's windows.
template <class Math, int kTiles>
__device__ __forceinline__ void write_dq(const WindowAttentionParams& p,
                                         const WindowAttentionCudaBackwardPlan& plan,
                                         const Walk& walk, const Problem& problem, int64_t token,
                                         int c, const float (&dq)[kTiles][4], int i,
                                         float* workspace) {
  using Element = typename Math::Element;
  const Task& task = walk.task;
  if (token >= p.nq || problem.index >= task.behind) return;
  c += threadIdx.x % 4 * 2;
  if (p.q_shared) {
    float* to =
        workspace + plan.dq + ((walk.chunk * p.heads + task.head) * p.nq + token) * p.head_dim;
    const bool adds = problem.index != walk.first;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = c + n * 8 + e;
        const float x = dq[n][2 * i + e] * task.scale;
        if (at < p.head_dim) to[at] = adds ? to[at] + x : x;
      }
    }
    return;
  }
  const Place place = place_of(p, plan, problem, task.inverse_w, static_cast<int>(token));
  if (place.y < 0) return;
  Element* to = row_at<Element>(p.grad.dq, problem.image, task.head, place);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    write_pair<Math>(to, c + n * 8, p.head_dim, plan.aligned, dq[n][2 * i] * task.scale,
                     dq[n][2 * i + 1] * task.scale);
  }
}

}  // namespace cuda
}  // namespace fastbb
