// SPDX-License-Identifier: Apache-2.0
// Launches of the backward pass: the kernels of the element type, then the sums over their parts.
#include "ops/window_attention/window_attention_cuda_backward_launch.cuh"
#include "ops/window_attention/window_attention_cuda_reduce.cuh"

namespace fastbb {
namespace cuda {
namespace {

const char* launch_kernels(const WindowAttentionParams& p,
                           const WindowAttentionCudaBackwardPlan& plan, float* workspace,
                           void* stream) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return launch_backward<HalfMath>(p, plan, workspace, stream);
    case Dtype::kBFloat16:
      return launch_backward<Bf16Math>(p, plan, workspace, stream);
    case Dtype::kFloat32:
      return p.tf32 ? launch_backward<Tf32Math>(p, plan, workspace, stream)
                    : launch_backward<FloatMath>(p, plan, workspace, stream);
  }
  return "an element type without kernels";
}

const char* launch_sum(const WindowAttentionParams& p, const WindowAttentionCudaBackwardPlan& plan,
                       float* workspace, int which, void* stream) {
  const auto run = [&](auto kernel) {
    return launch(kernel, plan.sums[which].launch, stream, p, plan, workspace, which);
  };
  switch (p.dtype) {
    case Dtype::kFloat16:
      return run(window_attention_sum<__half>);
    case Dtype::kBFloat16:
      return run(window_attention_sum<__nv_bfloat16>);
    case Dtype::kFloat32:
      return run(window_attention_sum<float>);
  }
  return "an element type without kernels";
}

}  // namespace
}  // namespace cuda

const char* window_attention_backward_cuda(const WindowAttentionParams& p,
                                           const WindowAttentionCudaBackwardPlan& plan,
                                           float* workspace, void* stream) {
  if (const char* problem = cuda::launch_kernels(p, plan, workspace, stream)) return problem;
  for (int which = 0; which < plan.sum_count; ++which) {
    if (const char* problem = cuda::launch_sum(p, plan, workspace, which, stream)) return problem;
  }
  if (plan.collapse.grid == 0) return nullptr;
  return cuda::launch(cuda::window_attention_collapse, plan.collapse, stream, p,
                      workspace + plan.dense_bias);
}

}  // namespace fastbb
