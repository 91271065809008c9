// SPDX-License-Identifier: Apache-2.0
// Bits of GELU(y) without GELU: a bit depends on an integer, the product, so it is set on an
// interval of integers that is found once per column.
//
// GELU falls to its minimum at y = -0.7518 and rises from there, and y rises with the product. On
// either side a bit changes once, and a binary search of 2 log2(K) evaluations finds where. For the
// 128 rows and more of a task that is a tenth of evaluating GELU for every result, which would take
// half as long as the product itself at K = 768.
#pragma once

#include "ops/binary_linear/binary_linear_epilogue.h"

namespace fastbb {
namespace {

constexpr float kGeluMinimum = -0.75179157f;
constexpr int64_t kThresholdRows = 48;  // fewer are finished before the search pays

// Products d with a set bit. First plane: d < fall or d >= rise. Second: rise <= d < fall.
struct BitIntervals {
  alignas(64) int32_t fall[2][kPanel];
  alignas(64) int32_t rise[2][kPanel];
};

constexpr int kPanelParts = kPanel / kLanes;  // vectors of results

// In each lane of low[i], the first d in [low, high) for which `is_true(i, d)` holds, or high; it
// must not turn false again. The searches run side by side, since each step waits for its last.
template <int kSearches, class IsTrue>
FASTBB_INLINE void first_true(VecI (&low)[kSearches], VecI (&high)[kSearches], int steps,
                              IsTrue is_true) {
  for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < kSearches; ++i) {
      const VecI middle = low[i] + ((high[i] - low[i]) >> 1);
      const VecI open = low[i] < high[i];
      const VecI yes = is_true(i, middle);
      high[i] = open & yes ? middle : high[i];
      low[i] = open & ~yes ? middle + 1 : low[i];
    }
  }
}

// Whether products and results rise together in every column: no factor is negative or NaN.
inline bool rising(const PanelTerms& terms) {
  for (int c = 0; c < kPanel; ++c) {
    if (!(terms.factor[c] >= 0.0f)) return false;
  }
  return true;
}

// kPlanes of bits: the first is set at both ends, the second one, of negative values, between them.
template <int kPlanes>
void find_intervals(const BinaryLinearParams& p, const PanelTerms& terms, BitIntervals& intervals) {
  const auto k = static_cast<int32_t>(p.k);
  const int steps = 33 - __builtin_clz(2u * static_cast<uint32_t>(k) + 2u);
  const VecF threshold = bit_threshold(p);
  VecI minimum[kPanelParts], end[kPanelParts];
  for (int i = 0; i < kPanelParts; ++i) minimum[i] = broadcast(-k), end[i] = broadcast(k + 1);
  first_true(minimum, end, steps, [&](int i, VecI dot) __attribute__((always_inline)) {
    return result<Activation::kNone>(dot, terms, i * kLanes) > broadcast(kGeluMinimum);
  });

  // Left and right of the minimum, for each plane and part.
  constexpr int kSearches = 2 * kPlanes * kPanelParts;
  VecI low[kSearches], high[kSearches];
  for (int i = 0; i < kSearches; ++i) {
    const bool right = i / kPanelParts % 2 == 1;
    low[i] = right ? minimum[i % kPanelParts] : broadcast(-k);
    high[i] = right ? broadcast(k + 1) : minimum[i % kPanelParts];
  }
  first_true(low, high, steps, [&](int i, VecI dot) __attribute__((always_inline)) {
    const int c = i % kPanelParts * kLanes;
    const bool right = i / kPanelParts % 2 == 1;
    const int plane = i / kPanelParts / 2;
    const VecF y = result<Activation::kGelu>(dot, terms, c) + load(terms.shift + c);
    const VecI set = bit_mask(p.bit_kind, plane, y, threshold);
    return right == (plane == 0) ? set : ~set;
  });
  for (int i = 0; i < kSearches; ++i) {
    const bool right = i / kPanelParts % 2 == 1;
    const int plane = i / kPanelParts / 2;
    auto& found = right == (plane == 0) ? intervals.rise : intervals.fall;
    std::memcpy(found[plane] + i % kPanelParts * kLanes, &low[i], sizeof(VecI));
  }
}

inline void find_intervals(const BinaryLinearParams& p, const PanelTerms& terms,
                           BitIntervals& intervals) {
  if (p.bit_kind == BitKind::kTernary) {
    find_intervals<2>(p, terms, intervals);
  } else {
    find_intervals<1>(p, terms, intervals);
  }
}

inline void store_intervals(const BinaryLinearParams& p, const Tile& tile, const DotTerms& d,
                            const PanelTerms& terms, const BitIntervals& intervals) {
  TileBits bits{};
  const bool ternary = p.bit_kind == BitKind::kTernary;
  for_dots(tile, d, terms, [&](int r, int c, VecI dot) __attribute__((always_inline)) {
    const VecI outside = (dot < load_as<VecI>(intervals.fall[0] + c)) |
                         (dot >= load_as<VecI>(intervals.rise[0] + c));
    bits.plane[0][r] |= uint64_t{bits_of(outside)} << c;
    if (!ternary) return;
    const VecI inside = (dot >= load_as<VecI>(intervals.rise[1] + c)) &
                        (dot < load_as<VecI>(intervals.fall[1] + c));
    bits.plane[1][r] |= uint64_t{bits_of(inside)} << c;
  });
  write_bits(p, tile, bits);
}

}  // namespace
}  // namespace fastbb
