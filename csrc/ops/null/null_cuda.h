// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of the null operator. Torch-free and free of
// CUDA, so that plans are the same in builds with and without kernels.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/null/null.h"

namespace fastbb {

constexpr int kNullCudaThreads = 128;       // of a block
constexpr int kNullCudaUnitsPerThread = 4;  // all loaded before the first is stored

// A thread moves units: the widest words that all rows are aligned to.
struct NullCudaPlan {
  CudaLaunch launch;   // a grid of 0: nothing to do
  int64_t unit_bytes;  // 2, 4, 8 or 16
  int64_t units;       // of a row
  int64_t lanes;       // threads side by side in a row, a power of two; the block has more rows
  int64_t chunks;      // blocks side by side in a row
};

// Function of the sizes, the strides and the alignment of the pointers.
FASTBB_EXPORT NullCudaPlan null_cuda_plan(const NullParams& p);

// The error's text, or nullptr. Built where FASTBB_WITH_CUDA is defined.
FASTBB_EXPORT const char* null_cuda(const NullParams& p, const NullCudaPlan& plan, void* stream);

}  // namespace fastbb
