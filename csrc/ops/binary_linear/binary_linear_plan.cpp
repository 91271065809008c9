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
// work. A multiple of every register tile's rows.
constexpr int64_t kRows = 192;
constexpr int64_t kColumnUnit = 32;  // of panels at any level
// What a task costs beyond its columns, in columns: interleaving a, and the hand-over.
constexpr int64_t kTaskColumns = 12;

// Column tiles for which the busiest thread is done first. Products are integers, the same however
// they are cut, so unlike elsewhere the cut may follow the number of threads.
int64_t best_column_tiles(int64_t row_tiles, int64_t units, int64_t threads) {
  int64_t best = 1, least = 0;
  for (int64_t tiles = 1; tiles <= std::min(units, 4 * threads); ++tiles) {
    const int64_t columns = ceil_div(units, tiles) * kColumnUnit;
    const int64_t cost = ceil_div(row_tiles * tiles, threads) * (columns + kTaskColumns);
    if (tiles == 1 || cost < least) best = tiles, least = cost;
  }
  return best;
}

}  // namespace

BinaryLinearPlan binary_linear_plan(const BinaryLinearParams& p, int64_t threads) {
  BinaryLinearPlan plan{};
  if (p.batch == 0 || p.m == 0 || p.n == 0) return plan;
  plan.row_tiles = ceil_div(p.m, kRows);
  plan.rows = ceil_div(p.m, plan.row_tiles);
  const int64_t units = ceil_div(p.n, kColumnUnit);
  const int64_t tiles = best_column_tiles(p.batch * plan.row_tiles, units, threads);
  plan.columns = ceil_div(units, tiles) * kColumnUnit;
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
