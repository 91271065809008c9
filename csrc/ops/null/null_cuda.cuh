// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of the null operator.
//
// A block takes kNullCudaThreads / lanes rows, or a chunk of one long row. Neighbouring threads
// move neighbouring units, and each has all its loads under way before it stores. Bound: memory, 2
// * itemsize bytes per element.
#pragma once

#include "ops/null/null_cuda.h"

namespace fastbb {
namespace cuda {

template <class Unit>
__global__ void __launch_bounds__(kNullCudaThreads) null_copy(NullParams p, NullCudaPlan plan) {
  const int64_t block = blockIdx.x;
  const int lanes = static_cast<int>(plan.lanes);
  const int rows = kNullCudaThreads / lanes;
  const int64_t row = block / plan.chunks * rows + threadIdx.x / lanes;
  if (row >= p.rows) return;

  const int64_t element_bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto* from =
      reinterpret_cast<const Unit*>(static_cast<const char*>(p.x) + row * p.x_row * element_bytes);
  auto* to = static_cast<Unit*>(p.out) + row * plan.units;
  const int64_t first = block % plan.chunks * lanes * kNullCudaUnitsPerThread + threadIdx.x % lanes;
  Unit held[kNullCudaUnitsPerThread];
#pragma unroll
  for (int i = 0; i < kNullCudaUnitsPerThread; ++i) {
    if (first + i * lanes < plan.units) held[i] = from[first + i * lanes];
  }
#pragma unroll
  for (int i = 0; i < kNullCudaUnitsPerThread; ++i) {
    if (first + i * lanes < plan.units) to[first + i * lanes] = held[i];
  }
}

}  // namespace cuda
}  // namespace fastbb
