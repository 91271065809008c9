// SPDX-License-Identifier: Apache-2.0
// The inner loop of binary products: counts of ones of a & b for a few rows times a panel of
// columns.
//
// A vector holds one 64-bit word of several columns, so sums stay in their lanes and nothing is
// added across lanes; b is interleaved for that, panel by panel: [words][columns of the panel]. a
// is interleaved too, [words][rows of the tile], and its words are broadcast.
//
// Registers: kTileRows x kPanelVecs sums. avx512_bf16: 6 x 4 sums, 4 vectors of b, one broadcast of
// 32. Below that level the sums are bytes, and the table look-up wants three or four registers for
// itself: avx512 4 x 4; avx2 has 16 registers, 4 x 2; SSE2 as many, 2 x 4, since a panel of bits is
// written by whole bytes; aarch64 has 32 and vectors of two columns, 4 x 4.
//
// Bound: instructions. Per vector one AND, one VPOPCNTQ and one add: with 512-bit vectors on Zen 4
// (four 256-bit pipes) 6 half-instructions, 1.5 cycles for 512 bits, 341 bits a cycle and core.
// Loads are 1 broadcast per 4 and 1 vector per 6 of these. With VPSHUFB it is 8 instructions per
// vector.
#pragma once

#include <cstdint>

#include "core/popcount.h"

namespace fastbb {
namespace {

#if defined(__AVX512VPOPCNTDQ__)
constexpr int kTileRows = 6;
constexpr int kPanelVecs = 4;
#elif defined(__AVX512BW__) || defined(__aarch64__)
constexpr int kTileRows = 4;
constexpr int kPanelVecs = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kPanelVecs = 2;
#else
constexpr int kTileRows = 2;
constexpr int kPanelVecs = 4;
#endif
constexpr int kPanel = kPanelVecs * kWordLanes;  // columns: 32 with AVX-512, else 8
static_assert(kPanel % 8 == 0 && kPanel % kLanes == 0);

// The low halves of the words of a, then of b, as whole vectors that a later load can be forwarded
// from the store of.
template <int... kLane>
FASTBB_INLINE VecI low_halves(VecW a, VecW b, std::integer_sequence<int, kLane...>) {
  return bit_cast<VecI>(
      shuffle(bit_cast<VecF>(a), bit_cast<VecF>(b), std::integer_sequence<int, (2 * kLane)...>{}));
}

// Sums over at most kCountSteps words.
template <int kRows>
FASTBB_INLINE void count_words(const uint64_t* a, const uint64_t* b, int64_t words,
                               VecW (&sum)[kRows][kPanelVecs]) {
  for (int64_t w = 0; w < words; ++w, a += kRows, b += kPanel) {
    VecW bv[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) bv[v] = load_as<VecW>(b + v * kWordLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecW av = broadcast_word(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sum[r][v] = count_add(sum[r][v], av & bv[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) sum[r][v] = widen_count(sum[r][v]);
  }
}

// counts[r][c] = ones of a[., r] & b[., c] over all words.
template <int kRows>
void count_tile(const uint64_t* a, const uint64_t* b, int64_t words, int32_t* counts) {
  VecW total[kRows][kPanelVecs]{};
  count_words<kRows>(a, b, words < kCountSteps ? words : kCountSteps, total);
  if constexpr (kCountSteps != INT64_MAX) {
    for (int64_t done = kCountSteps; done < words; done += kCountSteps) {
      VecW sum[kRows][kPanelVecs]{};
      const int64_t rest = words - done;
      count_words<kRows>(a + done * kRows, b + done * kPanel,
                         rest < kCountSteps ? rest : kCountSteps, sum);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kPanelVecs; ++v) total[r][v] += sum[r][v];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; v += 2) {
      const VecI narrow = low_halves(total[r][v], total[r][v + 1], LaneSequence{});
      std::memcpy(counts + r * kPanel + v * kWordLanes, &narrow, sizeof(narrow));
    }
  }
}

FASTBB_INLINE uint64_t load_word(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

// Rows [columns, stride bytes] of b, `columns` <= kPanel of them -> [words][kPanel], the rest zero;
// and the ones of each.
inline void interleave_panel(const uint8_t* rows, int64_t stride, int columns, int64_t words,
                             uint64_t* panel, int32_t* ones) {
  for (int c = 0; c < kPanel; ++c) {
    ones[c] = 0;
    if (c >= columns) {
      for (int64_t w = 0; w < words; ++w) panel[w * kPanel + c] = 0;
      continue;
    }
    const uint8_t* row = rows + c * stride;
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = load_word(row + 8 * w);
      panel[w * kPanel + c] = word;
      ones[c] += count_word(word);
    }
  }
}

// Rows of a, `rows` <= kTileRows of them -> [words][rows], and the ones of each.
inline void interleave_tile(const uint8_t* first, int64_t stride, int rows, int64_t words,
                            uint64_t* tile, int32_t* ones) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = first + r * stride;
    int32_t count = 0;
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = load_word(row + 8 * w);
      tile[w * rows + r] = word;
      count += count_word(word);
    }
    ones[r] = count;
  }
}

// The tile of exactly `rows` rows, at most kTileRows.
template <int kRows = kTileRows>
FASTBB_INLINE void count_tile_of(int rows, const uint64_t* a, const uint64_t* b, int64_t words,
                                 int32_t* counts) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return count_tile_of<kRows - 1>(rows, a, b, words, counts);
  }
  count_tile<kRows>(a, b, words, counts);
}

}  // namespace
}  // namespace fastbb
