// SPDX-License-Identifier: Apache-2.0
// What a block of binary attention works on, and the keys and values that it has in shared memory.
#pragma once

#include "ops/binary_attention/binary_attention_cuda_pack.cuh"

namespace fastbb {
namespace cuda {

constexpr int kTile = kBinaryAttentionCudaTile;
constexpr int kRows = kBinaryAttentionCudaRows;

struct AttentionAlphas {
  float q = 1.0f, k = 1.0f, v = 1.0f, p = 1.0f;

  __device__ explicit AttentionAlphas(const BinaryAttentionParams& params) {
    if (params.alphas == nullptr) return;
    const auto raised = [&](int i) {
      return params.alphas[i] < kLeastAlpha ? kLeastAlpha : params.alphas[i];
    };
    q = raised(0);
    k = raised(1);
    v = raised(2);
    if (!params.bool_probs) p = raised(3);
  }
};

// Dynamic shared memory. Keys of 16 are in the order of columns, see key_place.
template <int kWords>
struct AttentionShared {
  static constexpr int kUnits = kWords / 2;  // of 16 bytes, of both planes of a row
  static constexpr int kDim = 32 * kWords;
  uint4* q;      // [kUnits][q_block]
  uint4* k;      // [kUnits][chunk]
  uint32_t* v;   // [tiles][2][kDim][4]: x > 0, and not x < 0
  float* terms;  // [1 + rank + v_p][chunk]: mask, or -inf behind the last key; est_k; v_p
  float* est_q;  // [rank][q_block], times scale
  int64_t chunk, q_block;

  __device__ AttentionShared(void* memory, const BinaryAttentionParams& p,
                             const BinaryAttentionCudaPlan& plan)
      : chunk(plan.chunk), q_block(plan.q_block) {
    q = static_cast<uint4*>(memory);
    k = q + kUnits * q_block;
    v = reinterpret_cast<uint32_t*>(k + kUnits * chunk);
    terms = reinterpret_cast<float*>(v + chunk / kTile * 2 * kDim * 4);
    est_q = terms + (plan.v_p_row + (p.v_p != nullptr ? 1 : 0)) * chunk;
  }
};

// What a block works on.
struct AttentionTask {
  int64_t image, head, first_query;
  bool saves_keys;  // planes of keys and values: one block of a head
  AttentionAlphas alphas;

  __device__ AttentionTask(const BinaryAttentionParams& p, const BinaryAttentionCudaPlan& plan)
      : alphas(p) {
    const int64_t block = blockIdx.x;
    image = block / plan.q_blocks / p.heads;
    head = block / plan.q_blocks % p.heads;
    first_query = block % plan.q_blocks * plan.q_block;
    saves_keys = first_query == 0;
  }
  __device__ PackSource source(const BinaryAttentionParams& p, const HeadMap& map, int64_t tokens,
                               float alpha, uint8_t* planes) const {
    return {map, image, head, p.heads, tokens, static_cast<int>(p.head_dim), alpha, p.ste, planes};
  }
};

// Where key 4 u + 2 v + e of 16 is: as column 2 u + e of tile v.
__device__ __forceinline__ int key_place(int key) {
  return (key & ~15) | (key & 2) << 2 | (key & 12) >> 1 | (key & 1);
}

// Packs keys [first, first + 32) of the chunk that starts at key `start`.
template <class Element, int kWords, bool kSave>
__device__ __forceinline__ void stage_keys(const BinaryAttentionParams& p,
                                           const AttentionTask& task,
                                           const AttentionShared<kWords>& s, int64_t start,
                                           int first, bool save) {
  const PackSource source =
      task.source(p, p.k, p.nk, task.alphas.k, save && task.saves_keys ? p.k_planes : nullptr);
  const RowBits<kWords> bits =
      pack_rows<Element, kWords, 32, kSave>(source, [&](int r) { return start + first + r; });
  const int place = key_place(first + static_cast<int>(threadIdx.x % 32));
#pragma unroll
  for (int j = 0; j < s.kUnits; ++j) s.k[j * s.chunk + place] = bits.planes(j);
}

// Packs the values of word `word` of a tile: the 32 keys whose bits lane `word` of four gets.
template <class Element, int kWords, bool kSave>
__device__ __forceinline__ void stage_values(const BinaryAttentionParams& p,
                                             const AttentionTask& task,
                                             const AttentionShared<kWords>& s, int64_t start,
                                             int tile, int word) {
  const int lane = threadIdx.x % 32;
  const PackSource source =
      task.source(p, p.v, p.nk, task.alphas.v, task.saves_keys ? p.v_planes : nullptr);
  const RowBits<kWords> bits = pack_rows<Element, kWords, 32, kSave>(
      source, [&](int r) { return start + tile * kTile + r / 4 * 16 + word * 4 + r % 4; });
  uint32_t* to = s.v + tile * (2 * s.kDim * 4) + word;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    to[(32 * w + lane) * 4] = transpose_bits(bits.positive[w]);
    to[(s.kDim + 32 * w + lane) * 4] = ~transpose_bits(bits.negative[w]);
  }
}

template <int kWords>
__device__ __forceinline__ void stage_terms(const BinaryAttentionParams& p,
                                            const BinaryAttentionCudaPlan& plan,
                                            const AttentionTask& task,
                                            const AttentionShared<kWords>& s, int64_t start) {
  const bool masked = p.mask != nullptr && p.mask_query == 0;
  for (int64_t i = threadIdx.x; i < s.chunk; i += blockDim.x) {
    const int64_t key = start + i;
    const bool valid = key < p.nk;
    s.terms[i] = !valid ? -INFINITY : masked ? p.mask[task.image * p.mask_image + key] : 0.0f;
    const float* est = p.est_k + (task.image * p.nk + key) * p.rank;
    for (int64_t r = 0; r < p.rank; ++r) s.terms[(1 + r) * s.chunk + i] = valid ? est[r] : 0.0f;
    if (p.v_p != nullptr) {
      s.terms[plan.v_p_row * s.chunk + i] = valid ? p.v_p[task.image * p.nk + key] : 0.0f;
    }
  }
}

// All of a chunk, or without its values.
template <class Element, int kWords, bool kSave>
__device__ __forceinline__ void stage(const BinaryAttentionParams& p,
                                      const BinaryAttentionCudaPlan& plan,
                                      const AttentionTask& task, const AttentionShared<kWords>& s,
                                      int64_t start, bool values) {
  const int warps = blockDim.x / 32;
  const int64_t rest = p.nk - start < s.chunk ? p.nk - start : s.chunk;
  const int tiles = static_cast<int>((rest + kTile - 1) / kTile);
  const int groups = tiles * (kTile / 32);
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < groups; group += warps) {
    stage_keys<Element, kWords, kSave>(p, task, s, start, group * 32, values);
    if (values) stage_values<Element, kWords, kSave>(p, task, s, start, group / 4, group % 4);
  }
  stage_terms(p, plan, task, s, start);
}

}  // namespace cuda
}  // namespace fastbb
