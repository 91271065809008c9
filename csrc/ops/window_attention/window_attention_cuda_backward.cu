// SPDX-License-Identifier: Apache-2.0
// Launches of the backward pass by element type.
#include "ops/window_attention/window_attention_cuda_backward_launch.cuh"

namespace fastbb {

const char* window_attention_backward_cuda(const WindowAttentionParams& p,
                                           const WindowAttentionCudaBackwardPlan& plan,
                                           float* workspace, void* stream) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return cuda::launch_backward<cuda::HalfMath>(p, plan, workspace, stream);
    case Dtype::kBFloat16:
      return cuda::launch_backward<cuda::Bf16Math>(p, plan, workspace, stream);
    case Dtype::kFloat32:
      return p.tf32 ? cuda::launch_backward<cuda::Tf32Math>(p, plan, workspace, stream)
                    : cuda::launch_backward<cuda::FloatMath>(p, plan, workspace, stream);
  }
  return "an element type without kernels";
}

}  // namespace fastbb
