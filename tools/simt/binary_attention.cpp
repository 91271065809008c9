// SPDX-License-Identifier: Apache-2.0
// Binary attention of one element type, FASTBB_SIMT_ELEMENT.
#include "case.h"
#include "ops/binary_attention/binary_attention_cuda_launch.cuh"

const char* simt::run(const Case& given) {
  const auto p = given.params<fastbb::BinaryAttentionParams>();
  const auto plan = fastbb::binary_attention_cuda_plan(p);
  return fastbb::cuda::launch_binary_attention<FASTBB_SIMT_ELEMENT>(p, plan, nullptr);
}
