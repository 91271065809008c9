// SPDX-License-Identifier: Apache-2.0
// How the work is cut, and the choice of the instruction-set level: baseline code.
#include <algorithm>

#include "core/isa.h"
#include "ops/elastic_binarize/elastic_binarize.h"

namespace fastbb {

extern const ElasticBinarizeKernels elastic_binarize_baseline;
#if defined(__x86_64__)
extern const ElasticBinarizeKernels elastic_binarize_avx2;
extern const ElasticBinarizeKernels elastic_binarize_avx512;
extern const ElasticBinarizeKernels elastic_binarize_avx512_bf16;
#endif

ElasticBinarizePlan elastic_binarize_plan(const ElasticBinarizeParams& p) {
  // Some 20 microseconds of memory traffic. At least 16 rows, so that partial sums over rows, which
  // are written once per task, are a small share of it.
  constexpr int64_t kElements = 32768;
  constexpr int64_t kLeastRows = 16;
  const int64_t rows = std::max(kLeastRows, kElements / std::max<int64_t>(p.k, 1));
  return {rows, (p.rows + rows - 1) / rows};
}

const ElasticBinarizeKernels& elastic_binarize_kernels() {
  static const ElasticBinarizeKernels* const tables[kIsaCount] = {
      &elastic_binarize_baseline,
#if defined(__x86_64__)
      &elastic_binarize_avx2,
      &elastic_binarize_avx512,
      &elastic_binarize_avx512_bf16,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
