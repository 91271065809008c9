// SPDX-License-Identifier: Apache-2.0
// Comparisons of vectors, as bits (lane i in bit i) and back. To be included as simd.h is.
#pragma once

#include "core/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastbb {
namespace {

// AVX-512 has registers for it; elsewhere a lane is all ones or all zeros.
#if defined(__AVX512F__)
using Mask = __mmask16;
#else
using Mask = VecI;
#endif

// a > b, false where either is NaN.
FASTBB_INLINE Mask above(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GT_OQ);
#else
  return a > b;
#endif
}

// a >= b, false where either is NaN.
FASTBB_INLINE Mask at_least(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GE_OQ);
#else
  return a >= b;
#endif
}

FASTBB_INLINE VecF select(Mask mask, VecF yes, VecF no) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_mask_blend_ps(mask, bit_cast<__m512>(no), bit_cast<__m512>(yes)));
#else
  return mask ? yes : no;
#endif
}

FASTBB_INLINE VecH select(Mask mask, VecH yes, VecH no) {
#if defined(__AVX512F__)
  return bit_cast<VecH>(
      _mm256_mask_blend_epi16(mask, bit_cast<__m256i>(no), bit_cast<__m256i>(yes)));
#else
  using VecS = int16_t __attribute__((vector_size(kLanes * 2)));
  return __builtin_convertvector(mask, VecS) ? yes : no;
#endif
}

FASTBB_INLINE uint32_t bits_of(Mask mask) {
#if defined(__AVX512F__)
  return mask;
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(bit_cast<__m128>(mask)));
#else
  const VecI lanes = mask & ((VecI{} + 1) << iota());
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(lanes[i]);
  return bits;
#endif
}

#if defined(__AVX512DQ__)
// Of a comparison in lanes, which are all ones or all zeros.
FASTBB_INLINE uint32_t bits_of(VecI mask) { return _mm512_movepi32_mask(bit_cast<__m512i>(mask)); }
#endif

// The lowest kLanes bits; those above do not matter.
FASTBB_INLINE Mask mask_of(uint32_t bits) {
#if defined(__AVX512F__)
  return static_cast<Mask>(bits);
#else
  const VecI own = (VecI{} + 1) << iota();
  return (broadcast(static_cast<int32_t>(bits)) & own) == own;
#endif
}

}  // namespace
}  // namespace fastbb
