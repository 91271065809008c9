// SPDX-License-Identifier: Apache-2.0
// Launches of window attention by element type.
#include "ops/window_attention/window_attention_cuda_launch.cuh"

namespace fastbb {

const char* window_attention_forward_cuda(const WindowAttentionParams& p,
                                          const WindowAttentionCudaPlan& plan, void* stream) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return cuda::launch_forward<cuda::HalfMath>(p, plan, stream);
    case Dtype::kBFloat16:
      return cuda::launch_forward<cuda::Bf16Math>(p, plan, stream);
    case Dtype::kFloat32:
      return p.tf32 ? cuda::launch_forward<cuda::Tf32Math>(p, plan, stream)
                    : cuda::launch_forward<cuda::FloatMath>(p, plan, stream);
  }
  return "an element type without kernels";
}

}  // namespace fastbb
