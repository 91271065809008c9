// SPDX-License-Identifier: Apache-2.0
// Bits in vectors: comparisons to bits, population counts, and packed rows of one token.
//
// Kernels of all levels count in vectors of 32-bit words, one word of as many rows as there are
// lanes, so that counts lie where the floats of these rows will be. VPOPCNTDQ counts lanes in one
// instruction; AVX-512BW and AVX2 look up nibbles, NEON and generic code count bytes, and bytes
// are added up only once every `kFieldWords` words.
#pragma once

#include <limits>
#include <type_traits>

#include "core/mask.h"
#include "core/popcount.h"
#include "ops/binary_attention/binary_attention.h"

namespace fastbb {
namespace {

constexpr int kWordBits = 32;
constexpr int kVecsOfWord = kWordBits / kLanes;
constexpr int kMostWords = 8;  // of a head: 256 channels

FASTBB_INLINE VecU broadcast_word(uint32_t x) { return x - VecU{}; }

// Counts that fit a byte: so many times eight bits.
constexpr int kFieldWords = 31;

// The ones of every byte, or those of the lane.
FASTBB_INLINE VecU count_fields(VecU v) {
#if defined(__AVX512VPOPCNTDQ__)
  return bit_cast<VecU>(_mm512_popcnt_epi32(bit_cast<__m512i>(v)));
#else
  return bit_cast<VecU>(count_bytes(v));
#endif
}

// Sums of up to kFieldWords counts, byte by byte -> the sum of each lane.
FASTBB_INLINE VecI add_fields(VecU counts) {
#if defined(__AVX512VPOPCNTDQ__)
  return bit_cast<VecI>(counts);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16(bit_cast<__m512i>(counts), _mm512_set1_epi8(1));
  return bit_cast<VecI>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(counts), _mm256_set1_epi8(1));
  return bit_cast<VecI>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  const VecU pairs = (counts & 0x00ff00ffu) + ((counts >> 8) & 0x00ff00ffu);
  return bit_cast<VecI>((pairs & 0xffffu) + (pairs >> 16));
#endif
}

// Bit i: a > b in lane i.
FASTBB_INLINE uint32_t bits_greater(VecF a, VecF b) { return bits_of(above(a, b)); }

// Lanes at index + 0, 1, ... of `size` floats; 0 beyond.
template <class T>
FASTBB_INLINE VecF load_within(const T* p, int64_t index, int64_t size) {
  if (index + kLanes <= size) return load(p + index);
  return index < size ? load_partial(p + index, static_cast<int>(size - index)) : VecF{};
}

// Word `word` of a row of `size` elements: bit i is bits(elements) at element i.
template <class T, class Bits>
FASTBB_INLINE uint32_t pack_word(const T* x, int64_t size, int64_t word, const Bits& bits) {
  uint32_t packed = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kVecsOfWord; ++i) {
    const int64_t at = word * kWordBits + i * kLanes;
    if (at < size) packed |= bits(load_within(x, at, size)) << (i * kLanes);
  }
  return packed;
}

struct Signs {
  uint32_t positive[kMostWords], negative[kMostWords];
};

template <class T>
FASTBB_INLINE Signs pack_signs(const T* x, int64_t size) {
  Signs s;
  const auto positive = [](VecF v)
                            __attribute__((always_inline)) { return bits_greater(v, VecF{}); };
  const auto negative = [](VecF v)
                            __attribute__((always_inline)) { return bits_greater(VecF{}, v); };
  for (int64_t w = 0; w * kWordBits < size; ++w) {
    s.positive[w] = pack_word(x, size, w, positive);
    s.negative[w] = pack_word(x, size, w, negative);
  }
  return s;
}

// Where |x / alpha| is small enough for the gradient. Division would round to 1 only what is
// exactly alpha, so no division is needed.
FASTBB_INLINE VecI passes(VecF x, float alpha, Ste ste) {
  if (ste == Ste::kIdentity) return ~VecI{};
  const VecF size = x < VecF{} ? -x : x;
  return ste == Ste::kClip ? size <= broadcast(alpha) : size < broadcast(alpha);
}

// The three planes [3, row_bytes] of a row that the backward pass needs.
template <class T>
void save_planes(const T* x, int64_t size, const Signs& signs, float alpha, Ste ste,
                 uint8_t* planes) {
  const int64_t row = bit_row_bytes(size);
  const int64_t words = (size + kWordBits - 1) / kWordBits;
  std::memset(planes, 0, 3 * row);
  std::memcpy(planes, signs.positive, words * 4);
  std::memcpy(planes + row, signs.negative, words * 4);
  const auto passing = [&](VecF v) __attribute__((always_inline)) {
    return bits_of(passes(v, alpha, ste));
  };
  for (int64_t w = 0; w < words; ++w) {
    const int64_t rest = size - w * kWordBits;
    const uint32_t valid = rest < kWordBits ? (1u << rest) - 1 : ~0u;
    const uint32_t word = pack_word(x, size, w, passing) & valid;
    std::memcpy(planes + 2 * row + w * 4, &word, 4);
  }
}

}  // namespace
}  // namespace fastbb
