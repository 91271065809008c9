// SPDX-License-Identifier: Apache-2.0
// Rows of queries, keys and values to bits, in CUDA kernels.
#pragma once

#include "core/element.cuh"
#include "core/lanes.cuh"
#include "ops/binary_attention/binary_attention_cuda.h"

namespace fastbb {
namespace cuda {

// Words of a lane's own row: channels 32 w to 32 w + 31 in word w.
template <int kWords>
struct RowBits {
  uint32_t positive[kWords] = {}, negative[kWords] = {};
  uint32_t inside[kWords] = {};  // where the gradient passes; of kSave

  // uint4 j of the planes positive and negative, one after the other.
  __device__ uint4 planes(int j) const {
    const auto word = [&](int i) { return i < kWords ? positive[i] : negative[i - kWords]; };
    return {word(4 * j), word(4 * j + 1), word(4 * j + 2), word(4 * j + 3)};
  }
};

// Where rows come from, and where their planes go.
struct PackSource {
  HeadMap map;
  int64_t image, head, heads, tokens;
  int head_dim;
  float alpha;
  Ste ste;
  uint8_t* planes;  // of all rows, or null: not saved

  __device__ bool passes(float x) const {
    const float size = fabsf(x);
    return ste == Ste::kIdentity || size < alpha || (ste == Ste::kClip && size == alpha);
  }
};

// Packs kRows rows; lane r gets row r, which is token token_of(r). Lanes are channels, so that
// loads are contiguous and a ballot is a word.
template <class Element, int kWords, int kRows, bool kSave, class TokenOf>
__device__ __forceinline__ RowBits<kWords> pack_rows(const PackSource& source,
                                                     const TokenOf& token_of) {
  const int lane = threadIdx.x % 32;
  const auto* rows = static_cast<const Element*>(source.map.data) +
                     source.image * source.map.image + source.head * source.map.head;
  RowBits<kWords> bits;
#pragma unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = token_of(r);
    const auto* row = rows + token * source.map.token;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int channel = 32 * w + lane;
      const bool valid = channel < source.head_dim && token < source.tokens;
      const float x = valid ? widen(row[channel]) : 0.0f;
      const uint32_t positive = __ballot_sync(ptx::kFullWarp, x > 0.0f);
      const uint32_t negative = __ballot_sync(ptx::kFullWarp, x < 0.0f);
      const uint32_t inside = kSave ? __ballot_sync(ptx::kFullWarp, valid && source.passes(x)) : 0u;
      if (lane == r) {
        bits.positive[w] = positive;
        bits.negative[w] = negative;
        bits.inside[w] = inside;
      }
    }
  }
  if (kSave && lane < kRows && source.planes != nullptr && token_of(lane) < source.tokens) {
    const int64_t index = (source.image * source.tokens + token_of(lane)) * source.heads;
    auto* to = reinterpret_cast<uint4*>(source.planes) + (index + source.head) * 3;
    const auto row = [](const uint32_t (&words)[kWords]) {
      return kWords == 2 ? uint4{words[0], words[1], 0, 0}
                         : uint4{words[0], words[1], words[kWords - 2], words[kWords - 1]};
    };
    to[0] = row(bits.positive);
    to[1] = row(bits.negative);
    to[2] = row(bits.inside);
  }
  return bits;
}

// Lane i's bit j becomes lane j's bit i.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t x) {
  const int lane = threadIdx.x % 32;
  uint32_t low = 0x0000ffffu;  // bits whose number has no `step` in it
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(ptx::kFullWarp, x, step);
    x = lane & step ? (x & ~low) | (other >> step & low) : (x & low) | (other & low) << step;
    low ^= low << (step / 2);
  }
  return x;
}

}  // namespace cuda
}  // namespace fastbb
