// SPDX-License-Identifier: Apache-2.0
// CPU kernel of the null operator, compiled once per instruction-set level.
//
// Algorithm: each task copies one row, a vector at a time, through float32 as a real kernel would.
// Bound: memory, 2 * itemsize bytes per element.
#include "core/simd.h"
#include "ops/null/null.h"

namespace fastbb {
namespace {

template <class T>
void copy_rows(const NullParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(p.x) + row * p.x_row;
    T* to = static_cast<T*>(p.out) + row * p.columns;
    int64_t c = 0;
    for (; c + kLanes <= p.columns; c += kLanes) store(to + c, load(from + c));
    if (c < p.columns) {
      const int rest = static_cast<int>(p.columns - c);
      store_partial(to + c, load_partial(from + c, rest), rest);
    }
  }
}

void forward(const NullParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return copy_rows<float>(p, begin, end);
    case Dtype::kBFloat16:
      return copy_rows<BFloat16>(p, begin, end);
    case Dtype::kFloat16:
      return copy_rows<Float16>(p, begin, end);
  }
}

}  // namespace

// The one symbol that leaves this file carries the level in its name.
#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) null_##level

extern const NullKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const NullKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {forward};

}  // namespace fastbb
