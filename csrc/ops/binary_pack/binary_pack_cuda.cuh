// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of packing: floats to bits, sums of rows and their means, bits to floats.
//
// A warp takes 1024 elements of a row. Neighbouring lanes have neighbouring elements, eight of each
// under way, a vote of the warp makes 32 of them one word, and each lane keeps one of 32 words, so
// that loads and stores are whole cache lines however rows are aligned. Unpacking is the reverse:
// a lane loads a word and hands it to all others, which take a bit each.
//
// Sums of a row are those of its warp's lanes, every 32nd element each, added pairwise; means of
// all are those of one block. The order depends on sizes alone.
//
// Bounds: global memory, the floats.
#pragma once

#include <cuda_runtime.h>

#include "core/element.cuh"
#include "core/lanes.cuh"
#include "ops/binary_pack/binary_pack_cuda.h"

namespace fastbb {
namespace cuda {

constexpr int kLoads = 8;  // of a lane, under way together

// A warp's part of a row.
struct Part {
  int64_t row;
  int64_t first;  // word
  int words;      // that exist
};

__device__ __forceinline__ Part part_of(const BinaryPackCudaPlan& plan, int64_t k) {
  const int64_t warp = int64_t{blockIdx.x} * (kPackCudaThreads / 32) + threadIdx.x / 32;
  const int64_t first = warp % plan.parts * kPackCudaWords;
  const int64_t left = bit_row_bytes(k) / 4 - first;
  return {warp / plan.parts, first,
          static_cast<int>(left < kPackCudaWords ? left : kPackCudaWords)};
}

__device__ __forceinline__ float floored(float alpha) {
  return alpha < kLeastAlpha ? kLeastAlpha : alpha;  // NaN stays
}

template <class Element>
__global__ void __launch_bounds__(kPackCudaThreads)
    binary_pack(const __grid_constant__ BinaryPackParams p,
                const __grid_constant__ BinaryPackCudaPlan plan) {
  const Part part = part_of(plan, p.k);
  if (part.row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const auto* x = static_cast<const Element*>(p.x) + part.row * p.x_row;
  const float center = p.center == nullptr ? 0.0f : p.center[part.row * p.center_row];
  const float threshold = p.kind == BitKind::kUnsigned ? floored(*p.alpha) / 2.0f : 0.0f;
  const int planes = bit_planes(p.kind);
  uint32_t own[2] = {0, 0};
  for (int first = 0; first < part.words; first += kLoads) {
    float values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t column = (part.first + first + i) * 32 + lane;
      values[i] = column < p.k ? widen(x[column]) : NAN;  // which is 0 in every plane
      if (p.shift != nullptr && column < p.k) values[i] += p.shift[column];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float value = values[i] - center;
      const bool one = p.kind == BitKind::kPlus ? value >= threshold : value > threshold;
      const uint32_t ones = __ballot_sync(ptx::kFullWarp, one);
      if (lane == first + i) own[0] = ones;
      if (planes == 1) continue;
      const uint32_t negative = __ballot_sync(ptx::kFullWarp, value < 0.0f);
      if (lane == first + i) own[1] = negative;
    }
  }
  if (lane >= part.words) return;
  const int64_t row_words = bit_row_bytes(p.k) / 4;
  auto* to = reinterpret_cast<uint32_t*>(p.bits) + part.row * planes * row_words + part.first;
  to[lane] = own[0];
  if (planes == 2) to[row_words + lane] = own[1];
}

template <class Element>
__global__ void __launch_bounds__(kPackCudaThreads)
    binary_stats(const __grid_constant__ BinaryStatsParams p,
                 const __grid_constant__ BinaryPackCudaPlan plan) {
  const int64_t row = part_of(plan, p.k).row;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const auto* x = static_cast<const Element*>(p.x) + row * p.x_row;
  double sum = 0.0, size = 0.0;
  for (int64_t first = lane; first < p.k; first += 32 * kLoads) {
    float values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t column = first + 32 * i;
      values[i] = column < p.k ? widen(x[column]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      sum += values[i];
      size += fabsf(values[i]);
    }
  }
  sum = ptx::lanes_sum<32>(sum);
  size = ptx::lanes_sum<32>(size);
  if (lane == 0) {
    p.sums[2 * row] = sum;
    p.sums[2 * row + 1] = size;
  }
}

// One block. The sum over rows is that of its threads, every 512th row each.
__global__ void __launch_bounds__(kPackCudaMeansThreads)
    binary_means(const __grid_constant__ BinaryMeansParams p) {
  __shared__ double sums[kPackCudaMeansThreads / 32][2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto k = static_cast<double>(p.k);
  double sum = 0.0, size = 0.0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kPackCudaMeansThreads) {
    const double row_sum = p.sums[2 * row], row_size = p.sums[2 * row + 1];
    if (p.center != nullptr && p.center_rows) p.center[row] = static_cast<float>(row_sum / k);
    if (p.scale_rows) p.scale[row] = static_cast<float>(row_size / k);
    sum += row_sum;
    size += row_size;
  }
  sum = ptx::lanes_sum<32>(sum);
  size = ptx::lanes_sum<32>(size);
  if (lane == 0) {
    sums[warp][0] = sum;
    sums[warp][1] = size;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kPackCudaMeansThreads / 32; ++i) {
    sum += sums[i][0];
    size += sums[i][1];
  }
  const double count = static_cast<double>(p.rows) * k;
  if (p.center != nullptr && !p.center_rows) *p.center = static_cast<float>(sum / count);
  if (!p.scale_rows) *p.scale = static_cast<float>(size / count);
}

template <class Element>
__global__ void __launch_bounds__(kPackCudaThreads)
    binary_unpack(const __grid_constant__ BinaryUnpackParams p,
                  const __grid_constant__ BinaryPackCudaPlan plan) {
  const Part part = part_of(plan, p.k);
  if (part.row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t from = p.index == nullptr ? part.row : p.index[part.row];
  const bool valid = from >= 0 && from < p.bit_rows;
  const int planes = bit_planes(p.kind);
  uint32_t own[2] = {0, 0};
  float scale = NAN;  // times any value
  if (valid) {
    scale = p.scale == nullptr ? 1.0f : p.scale[from * p.scale_row];
    const auto* bits = reinterpret_cast<const uint32_t*>(p.bits + from * p.bits_row) + part.first;
    if (lane < part.words) {
      own[0] = bits[lane];
      if (planes == 2) own[1] = bits[bit_row_bytes(p.k) / 4 + lane];
    }
  }
  // A bit's value: factor * bit + offset, less the second plane's.
  const float factor = is_signed(p.kind) && planes == 1 ? 2.0f : 1.0f;
  const float offset = 1.0f - factor;
  auto* out = static_cast<Element*>(p.out) + part.row * p.k;
  for (int i = 0; i < part.words; ++i) {
    const uint32_t ones = __shfl_sync(ptx::kFullWarp, own[0], i);
    const uint32_t negative = __shfl_sync(ptx::kFullWarp, own[1], i);
    const int64_t column = (part.first + i) * 32 + lane;
    if (column >= p.k) continue;
    const auto bit = static_cast<float>(ones >> lane & 1);
    const auto other = static_cast<float>(negative >> lane & 1);
    out[column] = narrow<Element>((factor * bit + offset - other) * scale);
  }
}

}  // namespace cuda
}  // namespace fastbb
