// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/core/ptx.cuh: the same functions, with bodies for the host. Fragments are
// those of the PTX document, which the tests of ptxsim compare with CuTe.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/lanes.cuh"
#include "simt.h"

namespace fastbb {
namespace ptx {

// Tells instructions of a warp apart, where lanes meet.
enum Kind { kLdmatrix = 16, kLdmatrixTrans, kMmaF16, kMmaBf16, kMmaTf32, kMmaB1, kMmaS8 };

inline void* shared_address(const void* pointer) { return const_cast<void*>(pointer); }

inline void cp_async16(void* shared, const void* global, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    simt::fail("cp.async of a misaligned address");
  }
  simt::copy_async(shared, valid ? global : nullptr, 16);
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int kNewest>
void cp_async_wait() {
  simt::copy_wait(kNewest);
}

template <class Group>
void store_global(void* to, Group x) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof x != 0)
    simt::fail("a store to a misaligned address");
  std::memcpy(to, &x, sizeof x);
}

// A lane's row of a matrix, and the registers that it gets.
struct Rows {
  uint16_t row[8];
  uint32_t* to;
};

template <bool kTransposed>
FASTBB_SIMT_UNCHECKED void hand_out_rows(void* const* lanes) {
  for (int lane = 0; lane < simt::kLanes; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t both = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = kTransposed ? lane % 4 * 2 + half : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + half;
        const auto* from = static_cast<const Rows*>(lanes[matrix * 8 + row]);
        both |= uint32_t{from->row[column]} << 16 * half;
      }
      static_cast<const Rows*>(lanes[lane])->to[matrix] = both;
    }
  }
}

template <bool kTransposed>
void ldmatrix(uint32_t (&r)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) simt::fail("ldmatrix of a misaligned address");
  Rows rows;
  std::memcpy(rows.row, shared, sizeof rows.row);
  rows.to = r;
  simt::meet(kTransposed ? kLdmatrixTrans : kLdmatrix, &rows, hand_out_rows<kTransposed>);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) { ldmatrix<false>(r, shared); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) { ldmatrix<true>(r, shared); }

struct MmaF16 {
  static constexpr Kind kKind = kMmaF16;
  static constexpr int kHalves = 2;  // elements of a register
  FASTBB_SIMT_UNCHECKED static float element(uint32_t bits, int half) {
    const auto raw = static_cast<uint16_t>(bits >> 16 * half);
    _Float16 x;
    __builtin_memcpy(&x, &raw, sizeof x);
    return static_cast<float>(x);
  }
};
struct MmaBf16 {
  static constexpr Kind kKind = kMmaBf16;
  static constexpr int kHalves = 2;
  FASTBB_SIMT_UNCHECKED static float element(uint32_t bits, int half) {
    const uint32_t raw = bits >> 16 * half << 16;
    float x;
    __builtin_memcpy(&x, &raw, sizeof x);
    return x;
  }
};
struct MmaTf32 {
  static constexpr Kind kKind = kMmaTf32;
  static constexpr int kHalves = 1;
  FASTBB_SIMT_UNCHECKED static float element(uint32_t bits, int) {
    const uint32_t raw = bits & 0xffffe000u;
    float x;
    __builtin_memcpy(&x, &raw, sizeof x);
    return x;
  }
};

// Integers are a register's elements and exact, whatever the order of the sum.
struct MmaB1 {
  static constexpr Kind kKind = kMmaB1;
  static constexpr int kHalves = 32;
  FASTBB_SIMT_UNCHECKED static int32_t element(uint32_t bits, int at) { return bits >> at & 1; }
};
struct MmaS8 {
  static constexpr Kind kKind = kMmaS8;
  static constexpr int kHalves = 4;
  FASTBB_SIMT_UNCHECKED static int32_t element(uint32_t bits, int at) {
    return static_cast<int8_t>(bits >> 8 * at);
  }
};

template <class Sum>
struct Fragments {
  const uint32_t* a;
  uint32_t b[2];
  Sum* c;
};

// C += A B. A register holds kHalves elements that follow each other along the summed dimension;
// the first half of the registers is of rows and columns before the middle of the tile.
template <class T, class Sum>
FASTBB_SIMT_UNCHECKED void multiply(void* const* lanes) {
  constexpr int kDepth = 8 * T::kHalves;
  Sum a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < simt::kLanes; ++lane) {
    const auto* from = static_cast<const Fragments<Sum>*>(lanes[lane]);
    for (int half = 0; half < T::kHalves; ++half) {
      const int k = lane % 4 * T::kHalves + half;
      for (int r = 0; r < 4; ++r) {
        a[lane / 4 + r % 2 * 8][k + r / 2 * 4 * T::kHalves] = T::element(from->a[r], half);
      }
      for (int r = 0; r < 2; ++r)
        b[k + r * 4 * T::kHalves][lane / 4] = T::element(from->b[r], half);
    }
  }
  for (int lane = 0; lane < simt::kLanes; ++lane) {
    Sum* c = static_cast<const Fragments<Sum>*>(lanes[lane])->c;
    for (int e = 0; e < 4; ++e) {
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += a[lane / 4 + e / 2 * 8][k] * b[k][lane % 4 * 2 + e % 2];
      }
      c[e] += sum;
    }
  }
}

template <class T, class Sum>
void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments<Sum> fragments{a, {b0, b1}, c};
  simt::meet(T::kKind, &fragments, multiply<T, Sum>);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<MmaF16>(c, a, b0, b1);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<MmaBf16>(c, a, b0, b1);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<MmaTf32>(c, a, b0, b1);
}
inline void mma_m16n8k256_b1(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<MmaB1>(c, a, b0, b1);
}
inline void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<MmaS8>(c, a, b0, b1);
}

inline uint32_t round_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline float exp2_approx(float x) { return exp2f(x); }

inline uint32_t pack_f16x2(float low, float high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}
inline uint32_t pack_bf16x2(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}
inline float2 unpack_f16x2(uint32_t x) { return {MmaF16::element(x, 0), MmaF16::element(x, 1)}; }
inline float2 unpack_bf16x2(uint32_t x) { return {MmaBf16::element(x, 0), MmaBf16::element(x, 1)}; }

}  // namespace ptx
}  // namespace fastbb
