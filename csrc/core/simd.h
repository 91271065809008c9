// SPDX-License-Identifier: Apache-2.0
// A vector of floats as wide as the instruction-set level, and the few operations kernels need.
//
// Built on GCC/Clang vector types, so one source serves SSE2, NEON, AVX2 and AVX-512; intrinsics
// appear only where a level has an instruction that the compiler will not find by itself.
// Include from files compiled by fastbb_add_family only: everything is in an anonymous namespace,
// so that no function compiled for one level can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTBB_INLINE inline __attribute__((always_inline))

namespace fastbb {
namespace {

#if defined(FASTBB_ISA_AVX512) || defined(FASTBB_ISA_AVX512_BF16)
constexpr int kLanes = 16;
#elif defined(FASTBB_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Vectors of accumulators per row in a register tile of 6 rows: 32 or 16 vector registers.
#if defined(FASTBB_ISA_AVX2) || (defined(FASTBB_ISA_BASELINE) && defined(__x86_64__))
constexpr int kTileVecs = 2;
#else
constexpr int kTileVecs = 4;
#endif

using VecF = float __attribute__((vector_size(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4)));
using VecU = uint32_t __attribute__((vector_size(kLanes * 4)));
using VecH = uint16_t __attribute__((vector_size(kLanes * 2)));

// Storage forms of half-precision elements.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTBB_INLINE VecF broadcast(float x) { return x - VecF{}; }
FASTBB_INLINE VecI broadcast(int32_t x) { return x - VecI{}; }

template <class To, class From>
FASTBB_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vec>
FASTBB_INLINE Vec load_as(const void* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTBB_INLINE VecF load(const float* p) { return load_as<VecF>(p); }
FASTBB_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

FASTBB_INLINE VecI iota() {
  VecI v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// All ones in the first n lanes.
FASTBB_INLINE VecI first_lanes(int n) { return iota() < broadcast(static_cast<int32_t>(n)); }

// b where either is NaN.
FASTBB_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

FASTBB_INLINE VecF absolute(VecF x) { return bit_cast<VecF>(bit_cast<VecI>(x) & 0x7fffffff); }

#if defined(__clang__)
template <int... kIndex>
FASTBB_INLINE VecF shuffle(VecF a, VecF b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, kIndex...);
}
#else
template <int... kIndex>
FASTBB_INLINE VecF shuffle(VecF a, VecF b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shuffle(a, b, VecI{kIndex...});
}
#endif

template <int kStep, int... kLane>
FASTBB_INLINE VecF swap_lanes(VecF v, std::integer_sequence<int, kLane...>) {
  return shuffle(v, v, std::integer_sequence<int, (kLane ^ kStep)...>{});
}

using LaneSequence = std::make_integer_sequence<int, kLanes>;

template <int kStep = kLanes / 2, class Op>
FASTBB_INLINE float reduce(VecF v, Op op) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return reduce<kStep / 2>(op(v, swap_lanes<kStep>(v, LaneSequence{})), op);
  }
}
FASTBB_INLINE float reduce_add(VecF v) {
  return reduce(v, [](VecF a, VecF b) __attribute__((always_inline)) { return a + b; });
}

// e^x for x <= 88: relative error below 2e-7 + 6e-8 |x|, which the weight e^x of a softmax makes
// harmless; exactly 1 at 0; results below the smallest normal number may be 0; -inf gives 0, NaN
// stays NaN.
// x log2(e) = n + f with |f| <= 1/2, then the degree-5 minimax polynomial of 2^f with p(0) = 1.
FASTBB_INLINE VecF exp(VecF x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
#if defined(__AVX512F__)
  // Far below the smallest result the scaling underflows to 0 by itself.
  x = max(broadcast(-200.0f), x);
#endif
  const VecF shifted = x * kLog2E + kShifter;
  const VecF n = shifted - kShifter;
  const VecF f = x * kLog2E - n;
  VecF y = f * 1.3274633e-3f + 9.671962e-3f;
  y = y * f + 5.5506784e-2f;
  y = y * f + 0.24022235f;
  y = y * f + 0.69314706f;
  y = y * f + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
  // The low bits of `shifted` hold n: add it to the exponent field.
  const VecF scaled = bit_cast<VecF>(bit_cast<VecI>(y) + (bit_cast<VecI>(shifted) << 23));
  return x < broadcast(-87.0f) ? VecF{} : scaled;
#endif
}

// Natural logarithm of a positive normal number, relative error about 1e-7; NaN stays NaN.
// x = 2^e m with sqrt(1/2) <= m < sqrt(2), then Cephes' logf polynomial in m - 1.
FASTBB_INLINE VecF log(VecF x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // sqrt(1/2)
  const VecI bits = bit_cast<VecI>(x) - kHalfRoot;
  const VecF e = __builtin_convertvector(bits >> 23, VecF);
  const VecF f = bit_cast<VecF>((bits & 0x7fffff) + kHalfRoot) - 1.0f;
  VecF y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const VecF square = f * f;
  y = y * f * square + e * -2.12194440e-4f - 0.5f * square;
  y = f + y + e * 0.693359375f;
  return x == x ? y : x;
}

// ---- loads and stores of element types; n < kLanes lanes, the others read as 0 ----

FASTBB_INLINE VecF load_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#elif defined(__AVX2__)
  return bit_cast<VecF>(_mm256_maskload_ps(p, bit_cast<__m256i>(first_lanes(n))));
#else
  VecF v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

FASTBB_INLINE void store_partial(float* p, VecF v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), bit_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, bit_cast<__m256i>(first_lanes(n)), bit_cast<__m256>(v));
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

FASTBB_INLINE VecF widen_bf16(VecH h) {
  return bit_cast<VecF>(__builtin_convertvector(h, VecU) << 16);
}

// Round to nearest even; NaN becomes the quiet NaN of its sign.
FASTBB_INLINE VecH narrow_bf16(VecF v) {
  const VecU u = bit_cast<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, VecH);
}

#if defined(__AVX512F__)
FASTBB_INLINE VecF widen_fp16(VecH h) {
  return bit_cast<VecF>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
}
FASTBB_INLINE VecH narrow_fp16(VecF v) {
  return bit_cast<VecH>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FASTBB_INLINE VecF widen_fp16(VecH h) {
  return bit_cast<VecF>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
}
FASTBB_INLINE VecH narrow_fp16(VecF v) {
  return bit_cast<VecH>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent re-biasing by multiplication: a half's bits, shifted into a float's fields, are the
// value times 2^-112; subnormals come out right because the multiplication normalises them.
FASTBB_INLINE VecF widen_fp16(VecH h) {
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU sign = (u & 0x8000u) << 16;
  const VecU magnitude = (u & 0x7fffu) << 13;
  const VecU finite = bit_cast<VecU>(bit_cast<VecF>(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return bit_cast<VecF>(sign | ((u & 0x7c00u) == 0x7c00u ? special : finite));
}
// Adding a power of two whose last place is the half's last place rounds to nearest even.
FASTBB_INLINE VecH narrow_fp16(VecF v) {
  const VecU u = bit_cast<VecU>(v);
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU a = u & 0x7fffffffu;
  const VecU lowest = VecU{} + ((113u + 13u) << 23);  // subnormal halves share one last place
  const VecU exponent = (a & 0x7f800000u) + (13u << 23);
  const VecU anchor = exponent < lowest ? lowest : exponent;
  const VecF rounded = (bit_cast<VecF>(a) + bit_cast<VecF>(anchor)) - bit_cast<VecF>(anchor);
  const VecU half = bit_cast<VecU>(rounded * 0x1p-112f) >> 13;
  const VecU big = a > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  return __builtin_convertvector(sign | (a >= 0x477ff000u ? big : half), VecH);
}
#endif

FASTBB_INLINE VecF widen(VecH h, BFloat16) { return widen_bf16(h); }
FASTBB_INLINE VecF widen(VecH h, Float16) { return widen_fp16(h); }
FASTBB_INLINE VecH narrow(VecF v, BFloat16) { return narrow_bf16(v); }
FASTBB_INLINE VecH narrow(VecF v, Float16) { return narrow_fp16(v); }

template <class Half>
FASTBB_INLINE VecF load(const Half* p) {
  return widen(load_as<VecH>(p), Half{});
}
template <class Half>
FASTBB_INLINE void store(Half* p, VecF v) {
  const VecH h = narrow(v, Half{});
  std::memcpy(p, &h, sizeof(h));
}
template <class Half>
FASTBB_INLINE VecF load_partial(const Half* p, int n) {
  VecH h{};
  for (int i = 0; i < n; ++i) h[i] = p[i].bits;
  return widen(h, Half{});
}
template <class Half>
FASTBB_INLINE void store_partial(Half* p, VecF v, int n) {
  const VecH h = narrow(v, Half{});
  for (int i = 0; i < n; ++i) p[i].bits = h[i];
}

// ---- transposition of a kLanes x kLanes block held in rows ----

// Exchanges bit kStep of the row number with bit kStep of the lane number for one pair of rows.
template <int kStep, int... kLane>
FASTBB_INLINE void exchange(VecF& a, VecF& b, std::integer_sequence<int, kLane...>) {
  const VecF low = shuffle(
      a, b, std::integer_sequence<int, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...>{});
  const VecF high = shuffle(
      a, b, std::integer_sequence<int, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...>{});
  a = low;
  b = high;
}

// Lane i of the result: all lanes of rows[i] combined. The rows are overwritten. 45 instructions
// for 16 rows of 16 lanes, where `reduce` takes 128.
template <int kStep = 1, class Op>
FASTBB_INLINE VecF reduce_rows(VecF* rows, Op op) {
  if constexpr (kStep == kLanes) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      exchange<kStep>(rows[i], rows[i + kStep], LaneSequence{});
      rows[i] = op(rows[i], rows[i + kStep]);
    }
    return reduce_rows<2 * kStep>(rows, op);
  }
}

template <int kStep = 1>
FASTBB_INLINE void transpose_block(VecF (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], LaneSequence{});
    }
    transpose_block<kStep * 2>(rows);
  }
}

}  // namespace
}  // namespace fastbb
