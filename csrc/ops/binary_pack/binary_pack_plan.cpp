// SPDX-License-Identifier: Apache-2.0
// Launch plan and choice of the instruction-set level: baseline code.
#include <algorithm>

#include "core/isa.h"
#include "ops/binary_pack/binary_pack.h"

namespace fastbb {

extern const BinaryPackKernels binary_pack_baseline;
#if defined(__x86_64__)
extern const BinaryPackKernels binary_pack_avx2;
extern const BinaryPackKernels binary_pack_avx512;
extern const BinaryPackKernels binary_pack_avx512_bf16;
#endif

// Some ten microseconds of reading or writing floats: worth another thread.
BinaryPackPlan binary_pack_plan(int64_t rows, int64_t k) {
  constexpr int64_t kElements = 65536;
  const int64_t most = std::max<int64_t>(1, kElements / std::max<int64_t>(1, k));
  const int64_t tasks = (rows + most - 1) / most;
  // Evenly: 128 rows are two tasks of 64, not of 85 and 43.
  return {tasks == 0 ? most : (rows + tasks - 1) / tasks, tasks};
}

const BinaryPackKernels& binary_pack_kernels() {
  static const BinaryPackKernels* const tables[kIsaCount] = {
      &binary_pack_baseline,
#if defined(__x86_64__)
      &binary_pack_avx2,
      &binary_pack_avx512,
      &binary_pack_avx512_bf16,
#endif
  };
  return select(tables);
}

}  // namespace fastbb
