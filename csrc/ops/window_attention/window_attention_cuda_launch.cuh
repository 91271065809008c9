// SPDX-License-Identifier: Apache-2.0
// Launches of one element type; each is instantiated in a file of its own, so that they compile
// side by side.
#pragma once

#include "core/launch.cuh"
#include "ops/window_attention/window_attention_cuda_forward.cuh"

namespace fastbb {
namespace cuda {

// What the plan asks for is what the kernel carves up.
template <class Math, int kDim>
constexpr bool kPlannedBytes = sizeof(ForwardShared<Math, kDim>) ==
                               window_cuda_forward_bytes(sizeof(typename Math::Element), kDim);

template <class Math>
const char* launch_forward(const WindowAttentionParams& p, const WindowAttentionCudaPlan& plan,
                           void* stream) {
  static_assert(kPlannedBytes<Math, 32> && kPlannedBytes<Math, 64> && kPlannedBytes<Math, 128>);
  const auto run = [&](auto kernel) { return launch(kernel, plan.forward, stream, p, plan); };
  if (plan.dim == 128) return run(window_attention_forward<Math, 128, 1>);
  if constexpr (sizeof(typename Math::Element) == 2) {
    if (plan.pack == 2) {
      return plan.dim == 32 ? run(window_attention_forward<Math, 32, 2>)
                            : run(window_attention_forward<Math, 64, 2>);
    }
    if (plan.pack == 4) {
      return plan.dim == 32 ? run(window_attention_forward<Math, 32, 4>)
                            : run(window_attention_forward<Math, 64, 4>);
    }
  }
  return plan.dim == 32 ? run(window_attention_forward<Math, 32, 1>)
                        : run(window_attention_forward<Math, 64, 1>);
}

extern template const char* launch_forward<HalfMath>(const WindowAttentionParams&,
                                                     const WindowAttentionCudaPlan&, void*);
extern template const char* launch_forward<Bf16Math>(const WindowAttentionParams&,
                                                     const WindowAttentionCudaPlan&, void*);
extern template const char* launch_forward<FloatMath>(const WindowAttentionParams&,
                                                      const WindowAttentionCudaPlan&, void*);
extern template const char* launch_forward<Tf32Math>(const WindowAttentionParams&,
                                                     const WindowAttentionCudaPlan&, void*);

}  // namespace cuda
}  // namespace fastbb
