// SPDX-License-Identifier: Apache-2.0
// The kernels that tests/test_window_attention_ptx.py executes. It mirrors the parameters in
// Python.
#include "ops/window_attention/window_attention_cuda.cuh"

#include <cstddef>

namespace fastbb {

static_assert(sizeof(WindowAttentionParams) == 576);
static_assert(offsetof(WindowAttentionParams, q) == 88);
static_assert(offsetof(WindowAttentionParams, lse) == 248);
static_assert(offsetof(WindowAttentionParams, qk_l2norm) == 332);

namespace cuda {

#define FASTBB_INSTANTIATE(math, dim, aligned)                                                 \
  template __global__ void window_attention_forward<math, dim, aligned>(WindowAttentionParams, \
                                                                        int64_t)

FASTBB_INSTANTIATE(HalfMath, 32, true);
FASTBB_INSTANTIATE(HalfMath, 64, true);
FASTBB_INSTANTIATE(HalfMath, 128, true);
FASTBB_INSTANTIATE(HalfMath, 32, false);
FASTBB_INSTANTIATE(Bf16Math, 32, true);
FASTBB_INSTANTIATE(Bf16Math, 32, false);
FASTBB_INSTANTIATE(Bf16Math, 64, true);

}  // namespace cuda
}  // namespace fastbb
