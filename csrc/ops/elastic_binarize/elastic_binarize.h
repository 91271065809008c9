// SPDX-License-Identifier: Apache-2.0
// Contract of elastic binarization and its straight-through gradients. Torch-free; the layout of
// bits is in core/bits.h.
//
// Planes of a row: those of its kind (core/bits.h) and, for kClip and kClipOpen of a signed kind,
// one more that tells where the gradient passes. Unsigned kinds and kBiReal need x itself in the
// backward pass.
//
// Gradients are products, factor * grad and phi * grad, even where a factor is 0: a grad of
// infinity or NaN becomes NaN and is not lost. kUnsigned has one gradient, whatever ste is.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

constexpr bool has_inside_plane(BitKind kind, Ste ste) {
  return is_signed(kind) && (ste == Ste::kClip || ste == Ste::kClipOpen);
}
constexpr bool needs_x(BitKind kind, Ste ste) { return !is_signed(kind) || ste == Ste::kBiReal; }
constexpr int elastic_planes(BitKind kind, Ste ste) {
  return bit_planes(kind) + (has_inside_plane(kind, ste) ? 1 : 0);
}

struct ElasticBinarizeParams {
  Dtype dtype;
  BitKind kind;
  Ste ste;
  const void* x;       // [rows, k], columns contiguous; in the backward pass null unless needs_x
  int64_t x_row;       // elements
  const float* shift;  // [k] or null
  const float* alpha;  // one, or null: 1. Raised to kLeastAlpha
  uint8_t* planes;     // [rows, elastic_planes, bit_row_bytes(k)]; forward: or null. Unread where
                       // the backward pass needs_x
  void* out;           // forward: alpha * value [rows, k], contiguous, or null
  int64_t rows, k;

  // Backward.
  const void* grad;  // [rows, k], columns contiguous
  int64_t grad_row;
  void* dx;               // [rows, k], contiguous
  float* partial_shift;   // [tasks, k], sums of dx before rounding over a task's rows, or null
  double* partial_alpha;  // [tasks], sums of phi * grad, or null
  float* dshift;          // [k], sums of partial_shift in the order of tasks
};

// Tasks are groups of rows; sizes alone decide, so that sums are the same at any number of threads.
struct ElasticBinarizePlan {
  int64_t rows_per_task, tasks;
};
FASTBB_EXPORT ElasticBinarizePlan elastic_binarize_plan(const ElasticBinarizeParams& p);

struct ElasticBinarizeKernels {
  void (*forward)(const ElasticBinarizeParams&, const ElasticBinarizePlan&, int64_t begin,
                  int64_t end);
  void (*backward)(const ElasticBinarizeParams&, const ElasticBinarizePlan&, int64_t begin,
                   int64_t end);
  // Sums partial_shift to dshift; tasks: blocks of kElasticColumns columns.
  void (*reduce)(const ElasticBinarizeParams&, const ElasticBinarizePlan&, int64_t begin,
                 int64_t end);
};
constexpr int64_t kElasticColumns = 256;
FASTBB_EXPORT const ElasticBinarizeKernels& elastic_binarize_kernels();

}  // namespace fastbb
