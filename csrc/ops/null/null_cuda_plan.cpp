// SPDX-License-Identifier: Apache-2.0
// Launch plan of the CUDA kernel.
#include <algorithm>
#include <bit>

#include "ops/null/null_cuda.h"

namespace fastbb {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lowest set bit of all that must be a multiple of a unit, up to 16 bytes.
int64_t unit_bytes(const NullParams& p, int64_t element_bytes) {
  uint64_t bits = 16;
  bits |= reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out);
  bits |= static_cast<uint64_t>(p.columns * element_bytes);
  if (p.rows > 1) bits |= static_cast<uint64_t>(p.x_row * element_bytes);
  return int64_t{1} << std::countr_zero(bits);
}

}  // namespace

NullCudaPlan null_cuda_plan(const NullParams& p) {
  if (p.rows == 0 || p.columns == 0) return {};
  const int64_t element_bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  NullCudaPlan plan{};
  plan.unit_bytes = unit_bytes(p, element_bytes);
  plan.units = p.columns * element_bytes / plan.unit_bytes;
  // Short rows share a block; a row of up to 4 units per thread needs one chunk.
  const int64_t wanted = divide_up(plan.units, kNullCudaUnitsPerThread);
  const auto lanes = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(wanted)));
  plan.lanes = std::min<int64_t>(lanes, kNullCudaThreads);
  plan.chunks = divide_up(plan.units, plan.lanes * kNullCudaUnitsPerThread);
  const int64_t rows_of_block = kNullCudaThreads / plan.lanes;
  plan.launch = {divide_up(p.rows, rows_of_block) * plan.chunks, kNullCudaThreads, 0};
  return plan;
}

}  // namespace fastbb
