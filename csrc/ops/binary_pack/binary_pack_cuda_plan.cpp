// SPDX-License-Identifier: Apache-2.0
// Launch plans of the CUDA kernels.
#include "ops/binary_pack/binary_pack_cuda.h"

namespace fastbb {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

BinaryPackCudaPlan plan_of(int64_t rows, int64_t parts) {
  const int64_t grid = divide_up(rows * parts, kPackCudaThreads / 32);
  return {{grid, kPackCudaThreads, 0}, parts};
}

}  // namespace

BinaryPackCudaPlan binary_pack_cuda_plan(int64_t rows, int64_t k) {
  return plan_of(rows, divide_up(bit_row_bytes(k), 4 * kPackCudaWords));
}

BinaryPackCudaPlan binary_stats_cuda_plan(int64_t rows) { return plan_of(rows, 1); }

CudaLaunch binary_means_cuda_launch() { return {1, kPackCudaMeansThreads, 0}; }

}  // namespace fastbb
