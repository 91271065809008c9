// SPDX-License-Identifier: Apache-2.0
// What becomes of counts: integer products, scaled and biased floats, or bits for the next layer.
//
// About 7 instructions per vector of results (25 more for GELU), where K = 768 takes 72 in the
// inner loop. They run tile by tile on counts that are still in L1.
#pragma once

#include "core/activation.h"
#include "core/mask.h"
#include "ops/binary_linear/binary_linear.h"
#include "ops/binary_linear/binary_linear_tile.h"

namespace fastbb {
namespace {

// dot = acc * 2^doublings + row * (ones of a's row) + base of the column: see binary_linear.h.
struct DotTerms {
  int32_t doublings, row;
  int32_t column, constant;  // base = column * (ones of b's row) + constant
};

inline DotTerms dot_terms(bool a_signed, bool b_signed, int64_t k) {
  return {int32_t{a_signed} + int32_t{b_signed}, b_signed ? -1 - int32_t{a_signed} : 0,
          a_signed ? -1 - int32_t{b_signed} : 0,
          a_signed && b_signed ? static_cast<int32_t>(k) : 0};
}

// What the columns of one panel contribute, padded to whole panels.
struct PanelTerms {
  alignas(64) int32_t base[2][kPanel];  // for a's rows as unsigned values, as signed ones
  alignas(64) float factor[kPanel];     // alpha * scale
  alignas(64) float bias[kPanel];
  alignas(64) float shift[kPanel];  // before the result is packed
};

inline float floored(float alpha) { return alpha < kLeastAlpha ? kLeastAlpha : alpha; }

inline void fill_terms(const BinaryLinearParams& p, const DotTerms (&dots)[2], int64_t first,
                       int columns, const int32_t* ones, PanelTerms& terms) {
  const float alpha = p.alpha == nullptr ? 1.0f : floored(*p.alpha);
  for (int c = 0; c < kPanel; ++c) {
    const int64_t n = first + (c < columns ? c : 0);
    for (int i = 0; i < 2; ++i) terms.base[i][c] = dots[i].column * ones[c] + dots[i].constant;
    terms.factor[c] = (p.scale == nullptr ? 1.0f : p.scale[n * p.scale_column]) * alpha;
    terms.bias[c] = p.bias == nullptr ? 0.0f : p.bias[n];
    terms.shift[c] = p.bit_shift == nullptr ? 0.0f : p.bit_shift[n];
  }
}

// A tile of counts and where its results go.
struct Tile {
  int64_t row;     // of the first, batch included
  int64_t column;  // first of the panel
  int rows;        // at most kTileRows
  int columns;     // at most kPanel
  bool as_signed;  // how a's rows are meant
  alignas(64) int32_t counts[kTileRows * kPanel];
  int32_t ones[kTileRows];
};

// The integer products of a vector of columns in each row of a tile, one call of `use(r, c, dot)`
// each.
template <class Use>
FASTBB_INLINE void for_dots(const Tile& tile, const DotTerms& d, const PanelTerms& terms, Use use) {
  for (int c = 0; c < tile.columns; c += kLanes) {
    const VecI base = load_as<VecI>(terms.base[tile.as_signed] + c);
    for (int r = 0; r < tile.rows; ++r) {
      const VecI counts = load_as<VecI>(tile.counts + r * kPanel + c);
      use(r, c, (counts << d.doublings) + (base + broadcast(d.row * tile.ones[r])));
    }
  }
}

template <Activation kActivation>
FASTBB_INLINE VecF result(VecI dot, const PanelTerms& terms, int c) {
  const VecF y = __builtin_convertvector(dot, VecF) * load(terms.factor + c) + load(terms.bias + c);
  if constexpr (kActivation == Activation::kRelu) return relu(y);
  if constexpr (kActivation == Activation::kGelu) return gelu(y);
  return y;
}

inline void store_ints(const BinaryLinearParams& p, const Tile& tile, const DotTerms& d,
                       const PanelTerms& terms) {
  auto* to = static_cast<int32_t*>(p.out) + tile.row * p.n + tile.column;
  for_dots(tile, d, terms, [&](int r, int c, VecI dot) __attribute__((always_inline)) {
    const int n = tile.columns - c < kLanes ? tile.columns - c : kLanes;
    std::memcpy(to + r * p.n + c, &dot, sizeof(int32_t) * static_cast<size_t>(n));
  });
}

template <class T, Activation kActivation>
void store_floats(const BinaryLinearParams& p, const Tile& tile, const DotTerms& d,
                  const PanelTerms& terms) {
  T* to = static_cast<T*>(p.out) + tile.row * p.n + tile.column;
  for_dots(tile, d, terms, [&](int r, int c, VecI dot) __attribute__((always_inline)) {
    const VecF y = result<kActivation>(dot, terms, c);
    if (c + kLanes <= tile.columns) {
      store(to + r * p.n + c, y);
    } else {
      store_partial(to + r * p.n + c, y, tile.columns - c);
    }
  });
}

// Whether a bit of a plane is set: plane 1 is that of negative values.
FASTBB_INLINE VecI bit_mask(BitKind kind, int plane, VecF y, VecF threshold) {
  if (plane == 1) return y < threshold;
  return kind == BitKind::kPlus ? y >= threshold : y > threshold;
}

FASTBB_INLINE VecF bit_threshold(const BinaryLinearParams& p) {
  return broadcast(p.bit_kind == BitKind::kUnsigned ? floored(*p.bit_alpha) / 2 : 0.0f);
}

// Bits of a tile, column by column from bit 0.
struct TileBits {
  uint64_t plane[2][kTileRows];
};

inline void write_bits(const BinaryLinearParams& p, const Tile& tile, const TileBits& bits) {
  const int64_t row_bytes = bit_row_bytes(p.n);
  const int planes = bit_planes(p.bit_kind);
  const uint64_t real = (uint64_t{1} << tile.columns) - 1;
  const auto bytes = static_cast<size_t>((tile.columns + 7) / 8);
  for (int r = 0; r < tile.rows; ++r) {
    auto* to = static_cast<uint8_t*>(p.out) + (tile.row + r) * planes * row_bytes + tile.column / 8;
    for (int plane = 0; plane < planes; ++plane) {
      const uint64_t word = bits.plane[plane][r] & real;
      std::memcpy(to + plane * row_bytes, &word, bytes);
    }
  }
}

template <Activation kActivation>
void store_bits(const BinaryLinearParams& p, const Tile& tile, const DotTerms& d,
                const PanelTerms& terms) {
  const VecF threshold = bit_threshold(p);
  const int planes = bit_planes(p.bit_kind);
  TileBits bits{};
  for_dots(tile, d, terms, [&](int r, int c, VecI dot) __attribute__((always_inline)) {
    const VecF y = result<kActivation>(dot, terms, c) + load(terms.shift + c);
    for (int plane = 0; plane < planes; ++plane) {
      bits.plane[plane][r] |= uint64_t{bits_of(bit_mask(p.bit_kind, plane, y, threshold))} << c;
    }
  });
  write_bits(p, tile, bits);
}

using StoreTile = void (*)(const BinaryLinearParams&, const Tile&, const DotTerms&,
                           const PanelTerms&);

template <Activation kActivation>
StoreTile store_of(const BinaryLinearParams& p) {
  if (p.out_kind == BinaryOut::kBits) return store_bits<kActivation>;
  switch (p.out_dtype) {
    case Dtype::kFloat32:
      return store_floats<float, kActivation>;
    case Dtype::kBFloat16:
      return store_floats<BFloat16, kActivation>;
    case Dtype::kFloat16:
      return store_floats<Float16, kActivation>;
  }
  return nullptr;
}

inline StoreTile store_of(const BinaryLinearParams& p) {
  if (p.out_kind == BinaryOut::kInt32) return store_ints;
  switch (p.activation) {
    case Activation::kNone:
      return store_of<Activation::kNone>(p);
    case Activation::kRelu:
      return store_of<Activation::kRelu>(p);
    case Activation::kGelu:
      return store_of<Activation::kGelu>(p);
  }
  return nullptr;
}

}  // namespace
}  // namespace fastbb
