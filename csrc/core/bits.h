// SPDX-License-Identifier: Apache-2.0
// Layout of packed bits, which every binary operator, the CPU and CUDA share.
//
// A row of K elements is 16 * ceil(K / 128) bytes: bit j % 8 of byte j / 8 is element j, so that a
// little-endian word of any size has its elements in order. Bits from K on are zero; an AND of two
// rows then needs no mask. 16 bytes are one asynchronous copy of CUDA and two words of the CPU, and
// rows of 384 or 768 elements have no padding at all.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTBB_BITS __host__ __device__ constexpr
#else
#define FASTBB_BITS constexpr
#endif

namespace fastbb {

// What the bits of an element x mean, with x' = x + shift:
enum class BitKind : int {
  kPlus = 0,      // 1: x' >= 0. Values +1 and -1; zero counts as +1
  kMinus = 1,     // 1: x' > 0. Values +1 and -1; zero counts as -1
  kTernary = 2,   // two planes: x' > 0, then x' < 0. Values +1, 0, -1
  kUnsigned = 3,  // 1: x' > alpha / 2. Values 1 and 0
};

// Gradient of a sign at u = x' / alpha, as a multiple of the gradient of its value.
enum class Ste : int {
  kClip = 0,      // 1 where |u| <= 1
  kClipOpen = 1,  // 1 where |u| < 1
  kIdentity = 2,  // 1
  kBiReal = 3,    // 2 - 2 |u| where |u| <= 1
};

// Lower bound of a learned scale alpha (BiT, BiPFT).
constexpr float kLeastAlpha = 1e-5f;

constexpr int64_t kBitRowUnit = 128;  // elements
FASTBB_BITS int64_t bit_row_bytes(int64_t k) { return (k + kBitRowUnit - 1) / kBitRowUnit * 16; }
FASTBB_BITS int bit_planes(BitKind kind) { return kind == BitKind::kTernary ? 2 : 1; }
FASTBB_BITS bool is_signed(BitKind kind) { return kind != BitKind::kUnsigned; }

}  // namespace fastbb
