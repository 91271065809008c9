// SPDX-License-Identifier: Apache-2.0
// Launches of the backward pass in one element type: kernels, then the sums over their parts. See
// window_attention_cuda_launch.cuh.
#pragma once

#include "core/launch.cuh"
#include "ops/window_attention/window_attention_cuda_backward_keys.cuh"
#include "ops/window_attention/window_attention_cuda_backward_queries.cuh"
#include "ops/window_attention/window_attention_cuda_reduce.cuh"

namespace fastbb {
namespace cuda {

// What the plan asks for is what the kernels carve up.
template <class Math, int kDim, int kPack>
constexpr bool kPlannedKeys =
    sizeof(BackwardKeysShared<Math, kDim, kPack>) ==
    window_cuda_backward_keys_bytes(sizeof(typename Math::Element), kDim, kPack);
template <class Math, int kDim>
constexpr bool kPlannedQueries =
    sizeof(BackwardQueriesShared<Math, kDim>) ==
    window_cuda_backward_queries_bytes(sizeof(typename Math::Element), kDim);

template <class Math, int kDim>
const char* launch_gradients(const WindowAttentionParams& p,
                             const WindowAttentionCudaBackwardPlan& plan, float* workspace,
                             void* stream) {
  static_assert(kPlannedKeys<Math, kDim, 1> && kPlannedKeys<Math, kDim, 2> &&
                kPlannedKeys<Math, kDim, 4> && kPlannedQueries<Math, kDim>);
  const auto keys = [&](auto kernel) {
    return launch(kernel, plan.keys, stream, p, plan, workspace);
  };
  if (!plan.one_kernel) {
    if (const char* problem = launch(window_attention_backward_queries<Math, kDim>, plan.queries,
                                     stream, p, plan, workspace)) {
      return problem;
    }
    return keys(window_attention_backward_keys<Math, kDim, 1, false>);
  }
  if constexpr (sizeof(typename Math::Element) == 2 && kDim <= 64) {
    if (plan.pack == 2) return keys(window_attention_backward_keys<Math, kDim, 2, true>);
    if (plan.pack == 4) return keys(window_attention_backward_keys<Math, kDim, 4, true>);
  }
  return keys(window_attention_backward_keys<Math, kDim, 1, true>);
}

template <class Math>
const char* launch_backward(const WindowAttentionParams& p,
                            const WindowAttentionCudaBackwardPlan& plan, float* workspace,
                            void* stream) {
  const auto gradients = plan.dim == 32   ? launch_gradients<Math, 32>
                         : plan.dim == 64 ? launch_gradients<Math, 64>
                                          : launch_gradients<Math, 128>;
  if (const char* problem = gradients(p, plan, workspace, stream)) return problem;
  for (int which = 0; which < plan.sum_count; ++which) {
    if (const char* problem = launch(window_attention_sum<Math>, plan.sums[which].launch, stream, p,
                                     plan, workspace, which)) {
      return problem;
    }
  }
  if (plan.collapse.grid == 0) return nullptr;
  return launch(window_attention_collapse<kWindowCudaCollapseThreads>, plan.collapse, stream, p,
                workspace + plan.dense_bias);
}

extern template const char* launch_backward<HalfMath>(const WindowAttentionParams&,
                                                      const WindowAttentionCudaBackwardPlan&,
                                                      float*, void*);
extern template const char* launch_backward<Bf16Math>(const WindowAttentionParams&,
                                                      const WindowAttentionCudaBackwardPlan&,
                                                      float*, void*);
extern template const char* launch_backward<FloatMath>(const WindowAttentionParams&,
                                                       const WindowAttentionCudaBackwardPlan&,
                                                       float*, void*);
extern template const char* launch_backward<Tf32Math>(const WindowAttentionParams&,
                                                      const WindowAttentionCudaBackwardPlan&,
                                                      float*, void*);

}  // namespace cuda
}  // namespace fastbb
