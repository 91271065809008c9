// SPDX-License-Identifier: Apache-2.0
// Dropout's bits of a row: the Philox of core/philox.h, a block of four numbers per 64-bit lane.
//
// A lane's upper half is ignored by the multiplications and dropped at the end, so that rounds need
// no masks: two products, two shifts and four XORs for four numbers in every lane.
#pragma once

#include "core/philox.h"
#include "ops/binary_attention/binary_attention_bits.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastbb {
namespace {

using VecL = uint64_t __attribute__((vector_size(kLanes * 4)));
constexpr int kLongLanes = kLanes / 2;

// Product of the lower halves.
FASTBB_INLINE VecL multiply_low(VecL a, uint32_t factor) {
  const VecL b = uint64_t{factor} - VecL{};
#if defined(__AVX512F__)
  return bit_cast<VecL>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecL>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return bit_cast<VecL>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Which of the 32 elements from 4 * block on are kept: those whose upper 24 bits reach the limit.
FASTBB_INLINE uint32_t kept_word(uint64_t seed, uint64_t block, uint64_t limit) {
  VecL lane{};
  for (int i = 0; i < kLongLanes; ++i) lane[i] = static_cast<uint64_t>(i);
  uint32_t word = 0;
  for (int part = 0; part < 8; part += kLongLanes) {
    const VecL index = lane + (block + static_cast<uint64_t>(part));
    VecL c[4] = {index, index >> 32, VecL{}, VecL{}};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const VecL a = multiply_low(c[0], 0xD2511F53u);
      const VecL b = multiply_low(c[2], 0xCD9E8D57u);
      c[0] = (b >> 32) ^ c[1] ^ uint64_t { k0 };
      c[2] = (a >> 32) ^ c[3] ^ uint64_t { k1 };
      c[1] = b;
      c[3] = a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    VecL bits{};
    for (uint64_t i = 0; i < 4; ++i) {
      const VecL upper = (c[i] & 0xffffffffu) >> 8;
      bits |= bit_cast<VecL>(upper >= limit - VecL{}) & (uint64_t{1} << i);
    }
    bits <<= 4 * lane;
    uint64_t all = 0;
    for (int i = 0; i < kLongLanes; ++i) all |= bits[i];
    word |= static_cast<uint32_t>(all) << (4 * part);
  }
  return word;
}

// Which keys of the row that starts at element `first` dropout keeps; 0 behind the last key.
inline void write_kept(const BinaryAttentionParams& p, int64_t first, uint32_t* kept,
                       int64_t words) {
  // 24-bit numbers are floats, so this is philox_keeps without a conversion.
  const float scaled = p.dropout * 0x1p24f;
  const uint64_t below = static_cast<uint64_t>(scaled);
  const uint64_t limit = below + (static_cast<float>(below) < scaled ? 1 : 0);
  const uint64_t block = static_cast<uint64_t>(first) / 4;
  const int skipped = static_cast<int>(first % 4);
  uint32_t next = kept_word(p.seed, block, limit);
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t word = next;
    kept[w] = word;
    if (w + 1 == words && skipped == 0) break;
    next = kept_word(p.seed, block + 8 * static_cast<uint64_t>(w + 1), limit);
    if (skipped != 0) kept[w] = (word >> skipped) | (next << (kWordBits - skipped));
  }
  const int64_t rest = p.nk % kWordBits;
  if (rest != 0) kept[words - 1] &= (1u << rest) - 1;
}

}  // namespace
}  // namespace fastbb
