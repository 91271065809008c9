// SPDX-License-Identifier: Apache-2.0
// Sums of the parts that blocks of the backward pass leave, in a fixed order. Bound by memory: each
// float is read once, consecutive lanes read consecutive floats.
#pragma once

#include "ops/window_attention/window_attention_cuda.cuh"

namespace fastbb {
namespace cuda {

template <class Math>
__device__ __forceinline__ void write_sum(const WindowAttentionParams& p,
                                          const WindowAttentionCudaBackwardPlan& plan,
                                          WindowCudaSum kind, int64_t outer, int64_t i, float sum,
                                          float* workspace) {
  using Element = typename Math::Element;
  const int64_t d = p.head_dim;
  const int64_t c = i % d;
  switch (kind) {
    case WindowCudaSum::kBias:
      (plan.dense_bias >= 0 ? workspace + plan.dense_bias : p.grad.dbias)[i] = sum;
      return;
    case WindowCudaSum::kScale:
      p.grad.dscale[i] = sum;
      return;
    case WindowCudaSum::kPads: {  // [h, 2, d]
      float* to = i / d % 2 == 0 ? p.grad.dk_pad : p.grad.dv_pad;
      if (to != nullptr) to[i / d / 2 * d + c] = sum;
      return;
    }
    case WindowCudaSum::kQueries: {  // [h, Nq, d] of an image
      const Place place{0, static_cast<int>(i / d % p.nq)};
      row_at<Element>(p.grad.dq, outer, i / d / p.nq, place)[c] = Math::narrow(sum);
      return;
    }
    case WindowCudaSum::kKeys: {  // [h, 2, Nk, d] of an image
      const Place place{0, static_cast<int>(i / d % p.nk)};
      const TokenMap& map = i / d / p.nk % 2 == 0 ? p.grad.dk : p.grad.dv;
      row_at<Element>(map, outer, i / d / p.nk / 2, place)[c] = Math::narrow(sum);
      return;
    }
  }
}

template <class Math>
__global__ void __launch_bounds__(kWindowCudaSumLanes* kWindowCudaSumRows)
    window_attention_sum(const __grid_constant__ WindowAttentionParams p,
                         const __grid_constant__ WindowAttentionCudaBackwardPlan plan,
                         float* workspace, int which) {
  constexpr int kLanes = kWindowCudaSumLanes, kRows = kWindowCudaSumRows;
  __shared__ float sums[kRows][kLanes];
  const WindowAttentionCudaSum& task = plan.sums[which];
  const int64_t tiles = (task.size + kLanes - 1) / kLanes;
  const int64_t outer = blockIdx.x / tiles;
  const int64_t i = blockIdx.x % tiles * kLanes + threadIdx.x % kLanes;
  const int row = threadIdx.x / kLanes;
  float sum = 0.0f;
  if (i < task.size) {
    const float* from = workspace + task.from + outer * task.parts * task.size + i;
#pragma unroll 4
    for (int64_t part = row; part < task.parts; part += kRows) sum += from[part * task.size];
  }
  sums[row][threadIdx.x % kLanes] = sum;
  __syncthreads();
  if (row != 0 || i >= task.size) return;
  for (int other = 1; other < kRows; ++other) sum += sums[other][threadIdx.x];
  write_sum<Math>(p, plan, task.kind, outer, i, sum, workspace);
}

// Gradient of the table from that of the dense bias [h, Nq, Nk]: a thread adds the pairs of one
// entry.
template <int kCollapseThreads>
__global__ void __launch_bounds__(kCollapseThreads)
    window_attention_collapse(const __grid_constant__ WindowAttentionParams p, const float* dense) {
  const int wh = p.window_h, ww = p.window_w;
  const int64_t entry = int64_t{blockIdx.x} * kCollapseThreads + threadIdx.x;
  const int64_t rows = int64_t{2 * wh - 1} * (2 * ww - 1);
  if (entry >= rows * p.heads) return;
  const int row = static_cast<int>(entry / p.heads);
  const int dy = row / (2 * ww - 1) - (wh - 1);  // of the query from the key
  const int dx = row % (2 * ww - 1) - (ww - 1);
  const float* from = dense + entry % p.heads * p.nq * p.nk;
  float sum = 0.0f;
  for (int y = dy < 0 ? -dy : 0; y < wh && y + dy < wh; ++y) {
    for (int x = dx < 0 ? -dx : 0; x < ww && x + dx < ww; ++x) {
      sum += from[(int64_t{y + dy} * ww + x + dx) * p.nk + y * ww + x];
    }
  }
  p.grad.dtable[entry] = sum;
}

}  // namespace cuda
}  // namespace fastbb
