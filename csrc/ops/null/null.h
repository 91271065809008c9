// SPDX-License-Identifier: Apache-2.0
// Contract of the null operator: out = x. The worked example of a family; copy this folder to start
// another one. Torch-free: a kernel that included torch would take ten times as long to compile,
// and its inline functions, compiled for AVX-512, could be linked into code that must run anywhere.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

// Plain data only. Strides are in elements.
struct NullParams {
  Dtype dtype;
  const void* x;  // [rows, columns], columns contiguous
  int64_t x_row;
  void* out;  // [rows, columns], contiguous
  int64_t rows, columns;
};

// Pure function of the sizes, so that Python can show it and tests can reach its corners.
struct NullPlan {
  int64_t tasks;           // one row each
  int64_t tasks_per_call;  // smallest share worth another thread
};
FASTBB_EXPORT NullPlan null_plan(const NullParams& p);

struct NullKernels {
  void (*forward)(const NullParams&, int64_t begin, int64_t end);
};
FASTBB_EXPORT const NullKernels& null_kernels();

}  // namespace fastbb
