// SPDX-License-Identifier: Apache-2.0
// Which element of A [16, k], B [k, 8] and C [16, 8] each register of each lane of a warp holds,
// for the mma.sync shapes m16n8k*. One pattern serves all of them; kPerRegister is the number of
// elements in 32 bits: 1 for tf32, 2 for f16 and bf16, 4 for s8 and u8, 32 for b1. The number of
// registers follows from k: A has k / (2 * kPerRegister) of them, B k / (4 * kPerRegister).
//
// Plain C++, so that host code and tests evaluate the same table as the kernels.
#pragma once

#if defined(__CUDACC__)
#define FASTBB_HOST_DEVICE __host__ __device__
#else
#define FASTBB_HOST_DEVICE
#endif

namespace fastbb {

struct FragmentElement {
  int row;
  int col;
};

template <int kPerRegister>
struct MmaFragments {
  // Element e of register r of A.
  FASTBB_HOST_DEVICE static constexpr FragmentElement a(int lane, int r, int e) {
    return {lane / 4 + 8 * (r % 2), lane % 4 * kPerRegister + e + 4 * kPerRegister * (r / 2)};
  }

  // Element e of register r of B; its row is the index along k.
  FASTBB_HOST_DEVICE static constexpr FragmentElement b(int lane, int r, int e) {
    return {lane % 4 * kPerRegister + e + 4 * kPerRegister * r, lane / 4};
  }
};

// Element i of the four accumulators (f32 or s32) of C and D. With f16 accumulators, i is
// 2 * register + half.
FASTBB_HOST_DEVICE constexpr FragmentElement mma_accumulator(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2};
}

// The row of the 8 x 8 matrices whose address lane gives to ldmatrix, and which of the (up to)
// four matrices it belongs to.
FASTBB_HOST_DEVICE constexpr int ldmatrix_row(int lane) { return lane % 8; }
FASTBB_HOST_DEVICE constexpr int ldmatrix_matrix(int lane) { return lane / 8; }

}  // namespace fastbb
