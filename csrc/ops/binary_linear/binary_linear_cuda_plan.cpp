// SPDX-License-Identifier: Apache-2.0
// Launch plan of the CUDA kernels.
#include "ops/binary_linear/binary_linear_cuda.h"

namespace fastbb {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(const BinaryLinearParams& p) {
  return p.out_kind == BinaryOut::kInt32 || p.out_dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace

BinaryLinearCudaPlan binary_linear_cuda_plan(const BinaryLinearParams& p, int64_t many_tiles) {
  BinaryLinearCudaPlan plan{};
  if (p.batch == 0 || p.m == 0 || p.n == 0) return plan;
  const int64_t column_tiles = divide_up(p.n, kBinaryCudaColumns);
  const int64_t many = p.batch * divide_up(p.m, kBinaryCudaManyRows) * column_tiles;
  plan.rows = many >= many_tiles ? kBinaryCudaManyRows : kBinaryCudaFewRows;
  const int64_t row_tiles = divide_up(p.m, plan.rows);
  // Where these do not fit, the grid is refused.
  plan.row_tiles = static_cast<uint32_t>(row_tiles);
  plan.column_tiles = static_cast<uint32_t>(column_tiles);
  plan.aligned = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % (4 * element_bytes(p)) == 0;
  plan.launch = {p.batch * row_tiles * column_tiles, binary_cuda_threads(plan.rows),
                 binary_cuda_shared_bytes(plan.rows, bit_planes(p.a_kind))};
  return plan;
}

}  // namespace fastbb
