// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp compute together, without inline PTX.
#pragma once

namespace fastbb {
namespace ptx {

constexpr unsigned kFullWarp = 0xffffffffu;

// Reductions over kLanes consecutive lanes (a power of two); every lane of the warp takes part and
// gets the result of its own group. 4 lanes hold a row of an accumulator, 32 are the warp.

template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

template <int kLanes, typename T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, step);
  }
  return x;
}

}  // namespace ptx
}  // namespace fastbb
