// SPDX-License-Identifier: Apache-2.0
// Launch plan and choice of the instruction-set level: baseline code.
#include "core/isa.h"
#include "ops/null/null.h"

namespace fastbb {

extern const NullKernels null_baseline;
#if defined(__x86_64__)
extern const NullKernels null_avx2;
extern const NullKernels null_avx512;
extern const NullKernels null_avx512_bf16;
#endif

NullPlan null_plan(const NullParams& p) {
  constexpr int64_t kElements = 65536;
  return {p.rows, p.columns >= kElements ? 1 : kElements / (p.columns + 1) + 1};
}

const NullKernels& null_kernels() {
  static const NullKernels* const tables[kIsaCount] = {
      &null_baseline,
#if defined(__x86_64__)
      &null_avx2,
      &null_avx512,
      &null_avx512_bf16,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
