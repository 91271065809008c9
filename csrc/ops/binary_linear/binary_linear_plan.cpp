// SPDX-License-Identifier: Apache-2.0
// How products are cut into tasks, and choice of the instruction-set level: baseline code.
#include <algorithm>

#include "core/isa.h"
#include "ops/binary_linear/binary_linear.h"

namespace fastbb {

extern const BinaryLinearKernels binary_linear_baseline;
#if defined(__x86_64__)
extern const BinaryLinearKernels binary_linear_avx2;
extern const BinaryLinearKernels binary_linear_avx512;
extern const BinaryLinearKernels binary_linear_avx512_bf16;
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a task: 192 of 768 bits are 18 KB interleaved, and b's interleaving is below 1 % of the
// work. Columns: enough work to pay for a's interleaving and the hand-over, about 10 us.
constexpr int64_t kRows = 192;  // a multiple of every register tile's rows
constexpr int64_t kColumns = 128;
constexpr int64_t kColumnUnit = 32;              // of panels at any level
constexpr int64_t kTaskWork = int64_t{1} << 24;  // bits

}  // namespace

BinaryLinearPlan binary_linear_plan(const BinaryLinearParams& p) {
  BinaryLinearPlan plan{};
  if (p.batch == 0 || p.m == 0 || p.n == 0) return plan;
  plan.row_tiles = ceil_div(p.m, kRows);
  plan.rows = ceil_div(p.m, plan.row_tiles);
  const int64_t wanted = kTaskWork / (plan.rows * std::max<int64_t>(p.k, 64));
  plan.columns = std::max(kColumns, wanted / kColumnUnit * kColumnUnit);
  plan.columns = std::min(plan.columns, ceil_div(p.n, kColumnUnit) * kColumnUnit);
  plan.column_tiles = ceil_div(p.n, plan.columns);
  plan.tasks = p.batch * plan.row_tiles * plan.column_tiles;
  return plan;
}

const BinaryLinearKernels& binary_linear_kernels() {
  static const BinaryLinearKernels* const tables[kIsaCount] = {
      &binary_linear_baseline,
#if defined(__x86_64__)
      &binary_linear_avx2,
      &binary_linear_avx512,
      &binary_linear_avx512_bf16,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
