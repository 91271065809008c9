// SPDX-License-Identifier: Apache-2.0
// Contract of packing: floats to bits and back. Torch-free; the layout of bits is in core/bits.h.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

// x' = x + shift[column] - center[row], in float32; NaN gives 0 in every plane.
struct BinaryPackParams {
  Dtype dtype;
  BitKind kind;
  const void* x;        // [rows, k], columns contiguous
  int64_t x_row;        // elements
  const float* shift;   // [k] or null
  const float* center;  // one, or one per row, or null
  int64_t center_row;   // 0 or 1
  const float* alpha;   // one; kUnsigned alone, raised to kLeastAlpha
  uint8_t* bits;        // [rows, planes, bit_row_bytes(k)], contiguous
  int64_t rows, k;
};

// Sums of each row of a weight matrix, in float64.
struct BinaryStatsParams {
  Dtype dtype;
  const void* x;  // [rows, k], columns contiguous
  int64_t x_row;
  double* sums;  // [rows, 2]: of x, of |x|
  int64_t rows, k;
};

// Values of bits, times a scale of their row of bits; row r of the result is row index[r] of bits.
struct BinaryUnpackParams {
  Dtype dtype;
  BitKind kind;
  const uint8_t* bits;  // [bit_rows, planes, bit_row_bytes(k)]
  int64_t bits_row;     // bytes between rows of bits: planes beyond those of the kind are skipped
  int64_t bit_rows;
  const int64_t* index;  // [rows] or null: row r itself
  const float* scale;    // one, or one per row of bits, or null: 1
  int64_t scale_row;     // 0 or 1
  void* out;             // [rows, k], contiguous
  int64_t rows, k;
};

// Tasks are groups of rows.
struct BinaryPackPlan {
  int64_t rows_per_task, tasks;
};
FASTBB_EXPORT BinaryPackPlan binary_pack_plan(int64_t rows, int64_t k);

struct BinaryPackKernels {
  void (*pack)(const BinaryPackParams&, const BinaryPackPlan&, int64_t begin, int64_t end);
  void (*stats)(const BinaryStatsParams&, const BinaryPackPlan&, int64_t begin, int64_t end);
  // The first of its rows whose index is not of a row of bits, or -1. That row is not written.
  int64_t (*unpack)(const BinaryUnpackParams&, const BinaryPackPlan&, int64_t begin, int64_t end);
};
FASTBB_EXPORT const BinaryPackKernels& binary_pack_kernels();

}  // namespace fastbb
