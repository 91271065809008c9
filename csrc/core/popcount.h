// SPDX-License-Identifier: Apache-2.0
// Population counts of vectors of 64-bit words, and sums of many of them.
//
//   avx512_bf16  one VPOPCNTQ and one add per vector
//   avx512, avx2 two table look-ups of nibbles (VPSHUFB) and byte-wise adds; bytes hold the sum of
//                kCountSteps vectors before they are widened to 64 bits
//   aarch64      CNT on bytes, likewise
//   baseline     the counts of bytes by adding neighbouring fields, likewise
//
// Include from files compiled by fastbb_add_family only: everything is in an anonymous namespace.
#pragma once

#include <cstdint>

#include "core/simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastbb {
namespace {

constexpr int kWordLanes = kLanes / 2;
using VecW = uint64_t __attribute__((vector_size(kLanes * 4)));
using VecB = uint8_t __attribute__((vector_size(kLanes * 4)));

FASTBB_INLINE VecW broadcast_word(uint64_t x) { return x + VecW{}; }

// The ones of every byte, of whole vectors of any integers.
template <class Vec>
FASTBB_INLINE VecB count_bytes(Vec words) {
#if defined(__AVX512BW__)
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i v = bit_cast<__m512i>(words);
  return bit_cast<VecB>(
      _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                      _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low))));
#elif defined(__AVX2__)
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i v = bit_cast<__m256i>(words);
  return bit_cast<VecB>(
      _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                      _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low))));
#elif defined(__aarch64__)
  return bit_cast<VecB>(vcntq_u8(bit_cast<uint8x16_t>(words)));
#else
  VecW x = bit_cast<VecW>(words);
  x = x - ((x >> 1) & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return bit_cast<VecB>(x);
#endif
}

#if defined(__AVX512VPOPCNTDQ__)
// Words of a row that may be summed before `widen`: no limit.
constexpr int64_t kCountSteps = INT64_MAX;
FASTBB_INLINE VecW count_add(VecW sum, VecW x) {
  return sum + bit_cast<VecW>(_mm512_popcnt_epi64(bit_cast<__m512i>(x)));
}
FASTBB_INLINE VecW widen_count(VecW sum) { return sum; }
#else
// 8 ones per byte at most, 31 times.
constexpr int64_t kCountSteps = 31;

FASTBB_INLINE VecW count_add(VecW sum, VecW x) {
  return bit_cast<VecW>(bit_cast<VecB>(sum) + count_bytes(x));
}

// Sums of the bytes of each word.
FASTBB_INLINE VecW widen_count(VecW sum) {
#if defined(__AVX512BW__)
  return bit_cast<VecW>(_mm512_sad_epu8(bit_cast<__m512i>(sum), _mm512_setzero_si512()));
#elif defined(__AVX2__)
  return bit_cast<VecW>(_mm256_sad_epu8(bit_cast<__m256i>(sum), _mm256_setzero_si256()));
#elif defined(__aarch64__)
  return bit_cast<VecW>(vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(bit_cast<uint8x16_t>(sum)))));
#else
  return bit_cast<VecW>(_mm_sad_epu8(bit_cast<__m128i>(sum), _mm_setzero_si128()));
#endif
}
#endif

// Ones of one word.
FASTBB_INLINE int32_t count_word(uint64_t x) {
#if defined(__POPCNT__) || defined(__aarch64__)
  return __builtin_popcountll(x);
#else
  x = x - ((x >> 1) & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  return static_cast<int32_t>((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

}  // namespace
}  // namespace fastbb
