// SPDX-License-Identifier: Apache-2.0
// CPU kernels of packing, compiled once per instruction-set level. A task is a group of rows.
//
// pack    64 elements at a time: as many vectors as that takes are shifted, compared, and their
//         masks joined to a word, which is stored whole; both planes of a ternary row come from one
//         pass. The last word of a row is made of partial vectors, words beyond are zero.
// stats   sums of a row in 16 parts of float64, added up in one order at every level, so that the
//         centre of a weight, and its bits, are the same at all of them.
// unpack  one word of bits selects among two or three values, which are rounded once per row, as
//         many elements at a time as a vector holds.
//
// Bound: memory. pack reads 32 or 16 bits per element and writes 1 or 2; unpack the reverse. From
// the first-level cache AVX-512 packs 64 float32 in some 8 cycles (4 loads, 4 compares, 4 masks
// moved and joined), which is faster than any cache behind it delivers them.
#include "core/mask.h"
#include "core/simd.h"
#include "ops/binary_pack/binary_pack.h"

namespace fastbb {
namespace {

constexpr int64_t kWord = 64;  // elements
constexpr int kWordVecs = kWord / kLanes;

// ---- pack ----

enum class Plane { kNotBelow, kAbove, kBelow };

template <Plane kPlane>
FASTBB_INLINE Mask compare(VecF x, VecF threshold) {
  if constexpr (kPlane == Plane::kNotBelow) return at_least(x, threshold);
  if constexpr (kPlane == Plane::kAbove) return above(x, threshold);
  return above(threshold, x);
}

// Masks of consecutive vectors, joined to a word. Without an instruction that gathers sign bits,
// each lane keeps its own bits of eight vectors, and lanes are joined once for them.
struct Word {
  uint64_t bits = 0;
#if defined(__SSE2__)
  FASTBB_INLINE void set(int vec, Mask mask) {
    bits |= static_cast<uint64_t>(bits_of(mask)) << (vec * kLanes);
  }
  FASTBB_INLINE uint64_t joined() const { return bits; }
#else
  VecI halves[2] = {};
  FASTBB_INLINE void set(int vec, Mask mask) {
    const VecI own = broadcast(int32_t{1}) << iota();
    halves[vec / 8] |= mask & (own << (vec % 8 * kLanes));
  }
  FASTBB_INLINE uint64_t joined() const {
    uint64_t word = 0;
    for (int i = 0; i < kLanes; ++i) {
      word |= static_cast<uint32_t>(halves[0][i]);
      word |= static_cast<uint64_t>(static_cast<uint32_t>(halves[1][i])) << 32;
    }
    return word;
  }
#endif
};

// What a row is compared with.
struct Levels {
  const float* shift;
  VecF center, threshold;
};

template <class T, bool kShift, bool kCenter>
FASTBB_INLINE VecF shifted(const T* x, const Levels& by, int64_t at) {
  VecF v = load(x + at);
  if constexpr (kShift) v += load(by.shift + at);
  if constexpr (kCenter) v -= by.center;
  return v;
}

template <class T, bool kShift, bool kCenter>
FASTBB_INLINE VecF shifted_partial(const T* x, const Levels& by, int64_t at, int n) {
  VecF v = load_partial(x + at, n);
  if constexpr (kShift) v += load_partial(by.shift + at, n);
  if constexpr (kCenter) v -= by.center;
  return v;
}

FASTBB_INLINE void store_word(uint8_t* row, int64_t word, uint64_t bits) {
  std::memcpy(row + word * 8, &bits, 8);
}

template <class T, bool kShift, bool kCenter, Plane kFirst, bool kTwo>
void pack_row(const T* x, const Levels& by, int64_t k, uint8_t* bits) {
  const int64_t bytes = bit_row_bytes(k);
  const int64_t full = k / kWord;
  const auto put = [&](int64_t word, const Word& first, const Word& second)
                       __attribute__((always_inline)) {
                         store_word(bits, word, first.joined());
                         if constexpr (kTwo) store_word(bits + bytes, word, second.joined());
                       };
  for (int64_t word = 0; word < full; ++word) {
    Word first, second;
#pragma GCC unroll 16
    for (int i = 0; i < kWordVecs; ++i) {
      const VecF v = shifted<T, kShift, kCenter>(x, by, word * kWord + i * kLanes);
      first.set(i, compare<kFirst>(v, by.threshold));
      if constexpr (kTwo) second.set(i, compare<Plane::kBelow>(v, by.threshold));
    }
    put(word, first, second);
  }
  int64_t word = full;
  if (k % kWord != 0) {
    uint64_t first = 0, second = 0;
    for (int64_t at = full * kWord; at < k; at += kLanes) {
      const int n = static_cast<int>(k - at < kLanes ? k - at : kLanes);
      const VecF v = shifted_partial<T, kShift, kCenter>(x, by, at, n);
      const uint64_t inside = (uint64_t{1} << n) - 1;
      const int64_t place = at - full * kWord;
      first |= (bits_of(compare<kFirst>(v, by.threshold)) & inside) << place;
      if constexpr (kTwo) {
        second |= (bits_of(compare<Plane::kBelow>(v, by.threshold)) & inside) << place;
      }
    }
    store_word(bits, word, first);
    if constexpr (kTwo) store_word(bits + bytes, word, second);
    ++word;
  }
  for (; word < bytes / 8; ++word) put(word, Word{}, Word{});
}

template <class T, bool kShift, bool kCenter, Plane kFirst, bool kTwo>
void pack_rows(const BinaryPackParams& p, int64_t first, int64_t last) {
  float threshold = 0.0f;
  if (p.kind == BitKind::kUnsigned) {
    // A NaN stays one, and gives no ones.
    threshold = (*p.alpha < kLeastAlpha ? kLeastAlpha : *p.alpha) / 2;
  }
  const int64_t bytes = bit_planes(p.kind) * bit_row_bytes(p.k);
  for (int64_t row = first; row < last; ++row) {
    const float center = p.center == nullptr ? 0.0f : p.center[row * p.center_row];
    const Levels by{p.shift, broadcast(center), broadcast(threshold)};
    pack_row<T, kShift, kCenter, kFirst, kTwo>(static_cast<const T*>(p.x) + row * p.x_row, by, p.k,
                                               p.bits + row * bytes);
  }
}

template <class T, bool kShift, bool kCenter>
void pack_kind(const BinaryPackParams& p, int64_t first, int64_t last) {
  switch (p.kind) {
    case BitKind::kPlus:
      return pack_rows<T, kShift, kCenter, Plane::kNotBelow, false>(p, first, last);
    case BitKind::kMinus:
    case BitKind::kUnsigned:
      return pack_rows<T, kShift, kCenter, Plane::kAbove, false>(p, first, last);
    case BitKind::kTernary:
      return pack_rows<T, kShift, kCenter, Plane::kAbove, true>(p, first, last);
  }
}

template <class T, bool kShift>
void pack_center(const BinaryPackParams& p, int64_t first, int64_t last) {
  if (p.center == nullptr) {
    pack_kind<T, kShift, false>(p, first, last);
  } else {
    pack_kind<T, kShift, true>(p, first, last);
  }
}

// Calls run(element) with an element of the type.
template <class Run>
FASTBB_INLINE void for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
    case Dtype::kFloat16:
      return run(Float16{});
  }
}

// Rows of tasks [begin, end).
struct Rows {
  int64_t first, last;
};

Rows rows_of(const BinaryPackPlan& plan, int64_t rows, int64_t begin, int64_t end) {
  const int64_t last = end * plan.rows_per_task;
  return {begin * plan.rows_per_task, last < rows ? last : rows};
}

void pack(const BinaryPackParams& p, const BinaryPackPlan& plan, int64_t begin, int64_t end) {
  const Rows rows = rows_of(plan, p.rows, begin, end);
  for_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.shift == nullptr) {
      pack_center<T, false>(p, rows.first, rows.last);
    } else {
      pack_center<T, true>(p, rows.first, rows.last);
    }
  });
}

// ---- stats ----

constexpr int kParts = 16;
constexpr int kHalfLanes = kLanes / 2;
constexpr int kPartVecs = kParts / kHalfLanes;
using HalfF = float __attribute__((vector_size(kHalfLanes * 4)));
using VecD = double __attribute__((vector_size(kHalfLanes * 8)));
using VecL = int64_t __attribute__((vector_size(kHalfLanes * 8)));

double total(const VecD (&sums)[kPartVecs]) {
  double parts[kParts];
  std::memcpy(parts, sums, sizeof(parts));
  double sum = 0.0;
  for (const double part : parts) sum += part;
  return sum;
}

template <class T>
void stats_row(const T* x, int64_t k, double* sums) {
  VecD values[kPartVecs] = {}, sizes[kPartVecs] = {};
  const auto add = [&](int part, VecF v) __attribute__((always_inline)) {
    HalfF halves[2];
    std::memcpy(halves, &v, sizeof(v));
    for (int i = 0; i < 2; ++i) {
      const VecD wide = __builtin_convertvector(halves[i], VecD);
      values[part + i] += wide;
      sizes[part + i] += bit_cast<VecD>(bit_cast<VecL>(wide) & INT64_MAX);
    }
  };
  int64_t at = 0;
  for (; at + kParts <= k; at += kParts) {
#pragma GCC unroll 8
    for (int part = 0; part < kPartVecs; part += 2) add(part, load(x + at + part * kHalfLanes));
  }
  for (int part = 0; at < k; part += 2, at += kLanes) {
    add(part, load_partial(x + at, static_cast<int>(k - at < kLanes ? k - at : kLanes)));
  }
  sums[0] = total(values);
  sums[1] = total(sizes);
}

void stats(const BinaryStatsParams& p, const BinaryPackPlan& plan, int64_t begin, int64_t end) {
  const Rows rows = rows_of(plan, p.rows, begin, end);
  for_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = rows.first; row < rows.last; ++row) {
      stats_row(static_cast<const T*>(p.x) + row * p.x_row, p.k, p.sums + 2 * row);
    }
  });
}

// ---- unpack ----

// Results as integers of their width: values are selected, never computed with.
template <class T>
struct Stored;
template <>
struct Stored<float> {
  using Int = uint32_t;
};
template <>
struct Stored<BFloat16> {
  using Int = uint16_t;
};
template <>
struct Stored<Float16> {
  using Int = uint16_t;
};

template <class Int>
struct Vector;
template <>
struct Vector<uint32_t> {
  using Type = VecU;
};
template <>
struct Vector<uint16_t> {
  using Type = uint16_t __attribute__((vector_size(kLanes * 4)));
};

template <class Int>
struct Wide {
  static constexpr int kCount = kLanes * 4 / static_cast<int>(sizeof(Int));
  using Vec = typename Vector<Int>::Type;

  // `yes` where the bit of a lane is 1, lane i being that of bit i.
  static FASTBB_INLINE Vec select(uint64_t bits, Vec yes, Vec no) {
#if defined(__AVX512BW__)
    const __m512i a = bit_cast<__m512i>(no), b = bit_cast<__m512i>(yes);
    if constexpr (sizeof(Int) == 4) {
      return bit_cast<Vec>(_mm512_mask_blend_epi32(static_cast<__mmask16>(bits), a, b));
    } else {
      return bit_cast<Vec>(_mm512_mask_blend_epi16(static_cast<__mmask32>(bits), a, b));
    }
#else
    Vec own{};
    for (int i = 0; i < kCount; ++i) own[i] = static_cast<Int>(Int{1} << i);
    const Vec all = Vec{} + static_cast<Int>(bits);
    return (all & own) == own ? yes : no;
#endif
  }
};

template <class T>
typename Stored<T>::Int rounded(float x) {
  T one;
  store_partial(&one, broadcast(x), 1);
  return bit_cast<typename Stored<T>::Int>(one);
}

FASTBB_INLINE uint64_t load_word(const uint8_t* row, int64_t word) {
  uint64_t bits;
  std::memcpy(&bits, row + word * 8, 8);
  return bits;
}

// The values of one word of bits, `ones` and, with kTwo, the ones of the second plane.
template <class Int, bool kTwo>
struct WordValues {
  using W = Wide<Int>;
  static constexpr int kVecs = static_cast<int>(kWord) / W::kCount;
  uint64_t ones, negative = 0;

  FASTBB_INLINE WordValues(const uint8_t* bits, const uint8_t* second, int64_t word)
      : ones(load_word(bits, word)) {
    if constexpr (kTwo) {
      const uint64_t below = load_word(second, word);
      negative = below & ~ones;
      ones &= ~below;
    }
  }
  FASTBB_INLINE typename W::Vec vec(int i, typename W::Vec yes, typename W::Vec no) const {
    if constexpr (kTwo) no = W::select(negative >> (i * W::kCount), no, typename W::Vec{});
    return W::select(ones >> (i * W::kCount), yes, no);
  }
};

// `one` where a bit is 1, else `other`; with kTwo `other` where the second one is 1, else 0.
template <class Int, bool kTwo>
void unpack_row(const uint8_t* bits, Int one, Int other, int64_t k, Int* out) {
  using Values = WordValues<Int, kTwo>;
  using Vec = typename Wide<Int>::Vec;
  const Vec yes = Vec{} + one, no = Vec{} + other;
  const uint8_t* second = bits + bit_row_bytes(k);
  const int64_t full = k / kWord;
  for (int64_t word = 0; word < full; ++word) {
    const Values values(bits, second, word);
#pragma GCC unroll 16
    for (int i = 0; i < Values::kVecs; ++i) {
      const Vec v = values.vec(i, yes, no);
      std::memcpy(out + word * kWord + i * Wide<Int>::kCount, &v, sizeof(v));
    }
  }
  if (full * kWord < k) {
    const Values values(bits, second, full);
    Vec rest[Values::kVecs];
    for (int i = 0; i < Values::kVecs; ++i) rest[i] = values.vec(i, yes, no);
    std::memcpy(out + full * kWord, rest, static_cast<size_t>(k - full * kWord) * sizeof(Int));
  }
}

template <class T>
int64_t unpack_rows(const BinaryUnpackParams& p, int64_t first, int64_t last) {
  using Int = typename Stored<T>::Int;
  for (int64_t row = first; row < last; ++row) {
    const int64_t from = p.index == nullptr ? row : p.index[row];
    if (from < 0 || from >= p.bit_rows) return row;
    const float scale = p.scale == nullptr ? 1.0f : p.scale[from * p.scale_row];
    const uint8_t* bits = p.bits + from * p.bits_row;
    Int* out = static_cast<Int*>(p.out) + row * p.k;
    const Int one = rounded<T>(scale), minus = rounded<T>(-scale);
    if (p.kind == BitKind::kTernary) {
      unpack_row<Int, true>(bits, one, minus, p.k, out);
    } else {
      unpack_row<Int, false>(bits, one, is_signed(p.kind) ? minus : Int{0}, p.k, out);
    }
  }
  return -1;
}

int64_t unpack(const BinaryUnpackParams& p, const BinaryPackPlan& plan, int64_t begin,
               int64_t end) {
  const Rows rows = rows_of(plan, p.rows, begin, end);
  int64_t bad = -1;
  for_dtype(p.dtype,
            [&](auto element) { bad = unpack_rows<decltype(element)>(p, rows.first, rows.last); });
  return bad;
}

}  // namespace

// The one symbol that leaves this file carries the level in its name.
#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) binary_pack_##level

extern const BinaryPackKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const BinaryPackKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {pack, stats, unpack};

}  // namespace fastbb
