// SPDX-License-Identifier: Apache-2.0
// From sums to results: the dot product of the kinds, scale, bias, activation, and either numbers
// or bits.
#pragma once

#include "ops/binary_linear/binary_linear_cuda_products.cuh"

namespace fastbb {
namespace cuda {

constexpr int kGroup = 4;  // columns of a thread that follow each other
constexpr int kGroups = 2 * kColumnTiles / kGroup;
constexpr int kGroupStep = 16;  // from one group of a thread to the next

// dot = base + sum * sums + row * (ones of the row) + column * (ones of the column). Unsigned,
// since terms may be larger than the result.
struct Terms {
  uint32_t base, sum, row, column;
};

template <int kPlanes>
__device__ __forceinline__ Terms terms_of(const BinaryLinearParams& p) {
  const bool a = is_signed(p.a_kind), b = is_signed(p.b_kind);
  Terms terms{0, 1, 0, 0};
  if (kPlanes == 2) {
    terms = {0, b ? 2u : 1u, b ? -1u : 0u, 0};
  } else if (a && b) {
    terms = {static_cast<uint32_t>(p.k), 4, -2u, -2u};
  } else if (b) {
    terms = {0, 2, -1u, 0};
  } else if (a) {
    terms = {0, 2, 0, -1u};
  }
  if (kComplemented<kPlanes>) terms.column -= terms.sum;
  return terms;
}

__device__ __forceinline__ float floored_alpha(const float* alpha) {
  const float x = *alpha;
  return x < kLeastAlpha ? kLeastAlpha : x;  // NaN stays
}

__device__ __forceinline__ float activate(float y, Activation activation) {
  if (activation == Activation::kRelu) return y < 0.0f ? 0.0f : y;
  if (activation == Activation::kGelu) return 0.5f * y * (1.0f + erff(y * 0.70710678f));
  return y;
}

// A group of 32-bit or 16-bit elements without its first one.
__device__ __forceinline__ uint4 without_first(uint4 group) {
  return {group.y, group.z, group.w, 0};
}
__device__ __forceinline__ uint2 without_first(uint2 group) {
  return {group.x >> 16 | group.y << 16, group.y >> 16};
}

// Four neighbours of a row, of which `count` exist.
template <class Element, class Group>
__device__ __forceinline__ void store_group(Element* to, Group group, bool aligned, int64_t count) {
  static_assert(sizeof(Group) == kGroup * sizeof(Element));
  if (aligned) {
    if (count > 0) ptx::store_global(to, group);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kGroup && i < count; ++i) {
    to[i] = static_cast<Element>(group.x);
    group = without_first(group);
  }
}

// A group of a row of the result.
struct Place {
  int64_t row, column;  // of the product; the first one
  int64_t count;        // columns that exist, from the first on
};

__device__ __forceinline__ void write_floats(const BinaryLinearParams& p, bool aligned,
                                             int64_t start, int64_t count,
                                             const float (&y)[kGroup]) {
  if (p.out_dtype == Dtype::kFloat32) {
    const uint4 group{__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]),
                      __float_as_uint(y[3])};
    store_group(static_cast<uint32_t*>(p.out) + start, group, aligned, count);
    return;
  }
  const bool half = p.out_dtype == Dtype::kFloat16;
  const uint2 group{half ? ptx::pack_f16x2(y[0], y[1]) : ptx::pack_bf16x2(y[0], y[1]),
                    half ? ptx::pack_f16x2(y[2], y[3]) : ptx::pack_bf16x2(y[2], y[3])};
  store_group(static_cast<uint16_t*>(p.out) + start, group, aligned, count);
}

// alpha * scale * dot + bias and its activation.
__device__ __forceinline__ void finish(const BinaryLinearParams& p, const Place& place, float alpha,
                                       const uint32_t (&dots)[kGroup], float (&y)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int64_t column = i < place.count ? place.column + i : 0;
    const float scale = p.scale == nullptr ? 1.0f : p.scale[column * p.scale_column];
    // In the order and with the roundings of the definition: bits of the result depend on them.
    y[i] = __fmul_rn(static_cast<float>(static_cast<int32_t>(dots[i])), __fmul_rn(scale, alpha));
    if (p.bias != nullptr) y[i] = __fadd_rn(y[i], p.bias[column]);
    y[i] = activate(y[i], p.activation);
  }
}

// Bits of the block's rows, put together in shared memory: 16 bytes of each.
template <int kRows>
using BitRows = uint16_t[2][kRows][kColumns / kGroupStep];

// The bits of the 16 columns whose groups four lanes have, in each of them: of both planes, the
// second one in the upper half.
__device__ __forceinline__ uint32_t bits_of(const BinaryLinearParams& p, const Place& place,
                                            const float (&y)[kGroup], float threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= place.count) continue;
    const float shift = p.bit_shift == nullptr ? 0.0f : p.bit_shift[place.column + i];
    const float x = __fadd_rn(y[i], shift);
    if (p.bit_kind == BitKind::kPlus ? x >= threshold : x > threshold) bits |= 1u << i;
    if (x < 0.0f) bits |= 1u << (16 + i);
  }
  return ptx::lanes_sum<4>(bits << threadIdx.x % 4 * kGroup);
}

template <int kRows>
__device__ __forceinline__ void write_bits(const BinaryLinearParams& p, const Tile& tile,
                                           const BitRows<kRows>& words) {
  const int planes = bit_planes(p.bit_kind);
  const int64_t row_bytes = bit_row_bytes(p.n);
  for (int i = threadIdx.x; i < planes * kRows; i += Warps<kRows>::kThreads) {
    const int plane = i / kRows, row = i % kRows;
    const int64_t of_batch = int64_t{tile.row_tile} * kRows + row;
    if (of_batch >= p.m) continue;
    const int64_t at = (tile.batch * p.m + of_batch) * planes + plane;
    auto* to = static_cast<uint8_t*>(p.out) + at * row_bytes + tile.column_tile * int64_t{kUnit};
    ptx::store_global(to, *reinterpret_cast<const uint4*>(words[plane][row]));
  }
}

// Results of the warp's tiles, a group of each thread at a time. Sums are chosen by branches, since
// this code is too long to be written for each group, and registers have no index.
template <int kRows, int kPlanes>
__device__ __forceinline__ void write_tile(
    const BinaryLinearParams& p, const BinaryLinearCudaPlan& plan, const Tile& tile,
    const int32_t (&sums)[Warps<kRows>::kRowTiles][kColumnTiles][4],
    BinaryShared<kRows, kPlanes>& s) {
  constexpr int kHalves = 2 * Warps<kRows>::kRowTiles;  // of 8 rows
  static_assert(sizeof(BitRows<kRows>) <= sizeof(s.stages));
  auto& words = reinterpret_cast<BitRows<kRows>&>(s.stages);
  const int lane = threadIdx.x % 32;
  const Terms terms = terms_of<kPlanes>(p);
  const float alpha = p.alpha == nullptr ? 1.0f : floored_alpha(p.alpha);
  const bool to_bits = p.out_kind == BinaryOut::kBits;
  const bool of_unsigned = to_bits && p.bit_kind == BitKind::kUnsigned;
  const float threshold = of_unsigned ? floored_alpha(p.bit_alpha) / 2.0f : 0.0f;
#pragma unroll 1
  for (int i = 0; i < kHalves * kGroups; ++i) {
    uint32_t chosen[kGroup];
#pragma unroll
    for (int each = 0; each < kHalves * kGroups; ++each) {
      if (each != i) continue;
      const int half = each / kGroups, group = each % kGroups;
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        chosen[e] = static_cast<uint32_t>(sums[half / 2][group * 2 + e / 2][half % 2 * 2 + e % 2]);
      }
    }
    const int row = (tile.warp_row * kHalves + i / kGroups) * 8 + lane / 4;
    const int columns = tile.warp_column * kColumnTiles * 8 + i % kGroups * kGroupStep;
    const int column = columns + lane % 4 * kGroup;
    Place place;
    place.row = int64_t{tile.row_tile} * kRows + row;
    place.column = int64_t{tile.column_tile} * kColumns + column;
    place.count = p.n - place.column;
    const uint32_t base = terms.base + terms.row * static_cast<uint32_t>(s.row_ones[row]);
    uint32_t dots[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const auto ones = static_cast<uint32_t>(s.column_ones[column + e]);
      dots[e] = base + terms.sum * chosen[e] + terms.column * ones;
    }
    const int64_t start = (tile.batch * p.m + place.row) * p.n + place.column;
    if (p.out_kind == BinaryOut::kInt32) {
      if (place.row < p.m) {
        store_group(static_cast<uint32_t*>(p.out) + start,
                    uint4{dots[0], dots[1], dots[2], dots[3]}, plan.aligned, place.count);
      }
      continue;
    }
    float y[kGroup];
    finish(p, place, alpha, dots, y);
    if (!to_bits) {
      if (place.row < p.m) write_floats(p, plan.aligned, start, place.count, y);
      continue;
    }
    const uint32_t bits = bits_of(p, place, y, threshold);
    if (lane % 4 == 0) {
      words[0][row][columns / kGroupStep] = static_cast<uint16_t>(bits);
      words[1][row][columns / kGroupStep] = static_cast<uint16_t>(bits >> 16);
    }
  }
  if (!to_bits) return;
  __syncthreads();
  write_bits<kRows>(p, tile, words);
}

}  // namespace cuda
}  // namespace fastbb
