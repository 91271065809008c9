// SPDX-License-Identifier: Apache-2.0
// Contract of products of packed bits. Torch-free; the layout of bits is in core/bits.h.
//
// acc[m, n] counts positions where both rows have a 1. With ra and rb the ones of a's and b's rows,
//
//   signed * signed      K - 2 ra - 2 rb + 4 acc        unsigned * signed    2 acc - ra
//   signed * unsigned    2 acc - rb                     unsigned * unsigned  acc
//
// and a ternary row is the difference of two unsigned ones, its planes. So one AND and one
// population count serve all, and padding bits need no mask.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/export.h"

namespace fastbb {

enum class BinaryOut : int { kInt32 = 0, kFloat = 1, kBits = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2 };  // GELU through erf

// y = activation(alpha * scale[n] * dot + bias[n]), in float32; kInt32: dot itself.
struct BinaryLinearParams {
  const uint8_t* a;  // [batch, m, planes of a_kind, bit_row_bytes(k)]
  int64_t a_batch;   // bytes
  int64_t a_row;     // bytes; planes follow each other within a row
  const uint8_t* b;  // [batch, n, bit_row_bytes(k)], rows contiguous
  int64_t b_batch;   // bytes
  BitKind a_kind;    // any
  BitKind b_kind;    // kPlus or kMinus, or kUnsigned
  int64_t batch, m, n, k;

  BinaryOut out_kind;
  void* out;             // int32 or out_dtype [batch, m, n], or bits [batch, m, planes, bytes of n]
  Dtype out_dtype;       // kFloat
  const float* alpha;    // one, or null: 1. Raised to kLeastAlpha
  const float* scale;    // one, or [n], or null: 1
  int64_t scale_column;  // 0 or 1
  const float* bias;     // [n] or null
  Activation activation;
  BitKind bit_kind;        // kBits: of the result, y' = y + bit_shift[n]
  const float* bit_shift;  // [n] or null
  const float* bit_alpha;  // one; kUnsigned alone
};

// A task makes a tile of rows x columns of one product; bits of a result are written by whole
// bytes, so the columns of a tile are a multiple of 8 unless it is the last.
struct BinaryLinearPlan {
  int64_t rows, columns;  // of a tile
  int64_t row_tiles, column_tiles;
  int64_t tasks;  // batch * row_tiles * column_tiles
};
FASTBB_EXPORT BinaryLinearPlan binary_linear_plan(const BinaryLinearParams& p, int64_t threads);

struct BinaryLinearKernels {
  void (*forward)(const BinaryLinearParams&, const BinaryLinearPlan&, int64_t begin, int64_t end);
  // The limit of the instruction set: AND, count and add of registers alone, `steps` times for as
  // many sums as a register tile has. Returns how many bits that were.
  int64_t (*peak)(int64_t steps);
};
FASTBB_EXPORT const BinaryLinearKernels& binary_linear_kernels();

}  // namespace fastbb
