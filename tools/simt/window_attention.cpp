// SPDX-License-Identifier: Apache-2.0
// Window attention of one element type, FASTBB_SIMT_MATH. Options: backward, many_blocks.
#include "case.h"
#include "ops/window_attention/window_attention_cuda_backward_launch.cuh"
#include "ops/window_attention/window_attention_cuda_launch.cuh"

namespace fastbb {
namespace {

using Math = cuda::FASTBB_SIMT_MATH;

const char* run_backward(const WindowAttentionParams& p, int64_t many_blocks) {
  const auto plan = window_attention_cuda_backward_plan(p, many_blocks);
  const auto floats = static_cast<size_t>(plan.workspace);
  auto* workspace = static_cast<float*>(std::malloc(floats * sizeof(float)));
  std::memset(workspace, 0xff, floats * sizeof(float));
  const char* problem = cuda::launch_backward<Math>(p, plan, workspace, nullptr);
  std::free(workspace);
  return problem;
}

}  // namespace
}  // namespace fastbb

const char* simt::run(const Case& given) {
  const auto p = given.params<fastbb::WindowAttentionParams>();
  const int64_t many_blocks = given.options.at(1);
  if (given.options.at(0) != 0) return fastbb::run_backward(p, many_blocks);
  const auto plan = fastbb::window_attention_cuda_plan(p, many_blocks);
  return fastbb::cuda::launch_forward<fastbb::Math>(p, plan, nullptr);
}
