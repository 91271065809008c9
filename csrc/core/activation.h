// SPDX-License-Identifier: Apache-2.0
// Activations of vectors. Include from files compiled by fastbb_add_family only.
#pragma once

#include "core/simd.h"

namespace fastbb {
namespace {

// erf(x) with an absolute error below 3e-7: formula 7.1.26 of Abramowitz and Stegun; NaN stays NaN.
FASTBB_INLINE VecF erf(VecF x) {
  const VecF size = absolute(x);
  const VecF t = 1.0f / (size * 0.3275911f + 1.0f);
  VecF y = t * 1.061405429f - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  const VecF magnitude = 1.0f - y * t * exp(-(size * size));
  const VecI sign = bit_cast<VecI>(x) & broadcast(static_cast<int32_t>(0x80000000u));
  return bit_cast<VecF>(bit_cast<VecI>(magnitude) | sign);
}

// x * Phi(x), Phi the normal distribution: the exact GELU, with an absolute error of 3e-7 |x|.
FASTBB_INLINE VecF gelu(VecF x) {
  // Where erf is -1 but for rounding, the product would keep that error; -inf gives 0 * inf = NaN
  // in PyTorch too.
  return x * 0.5f * (1.0f + erf(x * 0.70710678118654752f));
}

FASTBB_INLINE VecF relu(VecF x) { return x < broadcast(0.0f) ? VecF{} : x; }

}  // namespace
}  // namespace fastbb
