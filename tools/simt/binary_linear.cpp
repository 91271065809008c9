// SPDX-License-Identifier: Apache-2.0
// Products of packed bits. Option: tiles from which on they are large.
#include "case.h"
#include "ops/binary_linear/binary_linear_cuda.h"

const char* simt::run(const Case& given) {
  const auto p = given.params<fastbb::BinaryLinearParams>();
  const auto plan = fastbb::binary_linear_cuda_plan(p, given.options.at(0));
  return fastbb::binary_linear_cuda(p, plan, nullptr);
}
