// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of binary attention.
//
// A block takes up to 128 queries of one head, a warp 16 of them. It packs them, and all keys and
// values of the head, to bits in shared memory: K row by row, V along the keys. Then it walks the
// keys twice, since a probability is compared with alpha / 2 and needs its row's sum: pass 1 takes
// the largest score and the sum, pass 2 the bits and their product with V. Scores are computed in
// both; with one walk they would have to be kept. Where K and V do not fit into shared memory, they
// are packed chunk by chunk in either pass.
//
// Products are m16n8k256 of bits on tensor cores. A sign is two bits, x > 0 and x < 0, so that 0 is
// exact, and d <= 64 signs of K are one operand: with the swapped and inverted planes as its second
// half,
//   q+ k+ + q- k- + q+ ~k- + q- ~k+ = (q . k) + popc(q+) + popc(q-),
// whose second part is the same for a row and is in the accumulator before. P V likewise. POPC, 16
// lanes per cycle, would take 4 cycles of a warp for 32 scores at d = 64 with the same zeros, an
// mma about a third of one (sm_80, sm_90); and 8 against 1/2 for P V. From sm_100 on ptxas emulates
// the mma by 8 products of int8, which still is less than POPC.
//
// An accumulator holds columns 2 t and 2 t + 1 of a lane. Keys are dealt to columns so that those
// of two neighbouring tiles are four consecutive keys: one random block of dropout, one float4 of
// mask and estimator, and 4 bits of the word that is the lane's own operand for P V.
//
// Bound, by arithmetic and not yet by measurement: at 128 keys and d = 64, memory and arithmetic
// alike. A head moves 64 KB in float16, 6600 cycles of an SM of an A100; 16384 scores need
// some 12 instructions in pass 1 (and 1.25 exponentials, 16 lanes per cycle) and 8 in pass 2, and
// packing 24576 elements 10 each: 5500 cycles at 4 warps per cycle. Longer sequences are bound by
// the scores' arithmetic.
#pragma once

#include "core/philox.h"
#include "core/ptx.cuh"
#include "ops/binary_attention/binary_attention_cuda_pack.cuh"

namespace fastbb {
namespace cuda {

constexpr int kTile = kBinaryAttentionCudaTile;
constexpr int kRows = kBinaryAttentionCudaRows;
constexpr int kAttentionThreads = 32 * kBinaryAttentionCudaWarps;
constexpr float kLog2E = 1.44269504088896341f;
// An accumulator that starts with the bits of 1.5 * 2^23 ends as those of 1.5 * 2^23 plus the
// count: a subtraction makes it a float, exact below 2^22.
constexpr float kCountBase = 12582912.0f;

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

// The 16 queries of a warp; a lane has rows lane / 4 and lane / 4 + 8.
template <int kWords>
struct WarpQueries {
  uint32_t a[2 * AttentionShared<kWords>::kUnits];  // as operands
  int32_t base[2];                                  // where accumulators start
  int64_t query[2];
  int row[2];  // within the block

  template <class Element, bool kSave>
  __device__ void load(const BinaryAttentionParams& p, const AttentionTask& task,
                       const AttentionShared<kWords>& s) {
    const int lane = threadIdx.x % 32;
    const int first = threadIdx.x / 32 * kRows;
    const PackSource source = task.source(p, p.q, p.nq, task.alphas.q, p.q_planes);
    const RowBits<kWords> bits = pack_rows<Element, kWords, kRows, kSave>(
        source, [&](int r) { return task.first_query + first + r; });
    if (lane < kRows) {
#pragma unroll
      for (int j = 0; j < s.kUnits; ++j) s.q[j * s.q_block + first + lane] = bits.planes(j);
    }
    for (int64_t i = lane; i < p.rank * kRows; i += 32) {
      const int64_t query = task.first_query + first + i % kRows;
      const float* est = p.est_q + (task.image * p.nq + query) * p.rank;
      s.est_q[i / kRows * s.q_block + first + i % kRows] =
          query < p.nq ? est[i / kRows] * p.scale : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = first + lane / 4 + 8 * i;
      query[i] = task.first_query + row[i];
      int ones = 0;
#pragma unroll
      for (int j = 0; j < s.kUnits; ++j) {
        a[2 * j + i] = reinterpret_cast<const uint32_t*>(s.q + j * s.q_block + row[i])[lane % 4];
        ones += __popc(a[2 * j + i]);
      }
      base[i] = __float_as_int(kCountBase) - ptx::lanes_sum<4>(ones);
    }
  }
};

// Scores of a lane's two rows with keys 16 j + 4 t to 16 j + 4 t + 3 of the chunk.
template <int kWords>
__device__ __forceinline__ void scores_of(const BinaryAttentionParams& p, const AttentionTask& task,
                                          const AttentionShared<kWords>& s,
                                          const WarpQueries<kWords>& q, int64_t start, int j,
                                          float scale, float (&scores)[2][4]) {
  const int t = threadIdx.x % 4;
  const int first = 16 * j + 4 * t;
  const auto* keys = reinterpret_cast<const uint32_t*>(s.k + 16 * j + threadIdx.x % 32 / 4);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    int32_t c[4] = {q.base[0], q.base[0], q.base[1], q.base[1]};
    if constexpr (kWords == 2) {
      ptx::mma_m16n8k256_b1(c, {q.a[0], q.a[1], q.a[0], q.a[1]}, keys[32 * v + t],
                            ~keys[32 * v + (t ^ 2)]);
    } else {
      const uint32_t positive = keys[32 * v + t];
      const uint32_t negative = keys[4 * s.chunk + 32 * v + t];
      ptx::mma_m16n8k256_b1(c, q.a, positive, negative);
      ptx::mma_m16n8k256_b1(c, q.a, ~negative, ~positive);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i / 2][2 * v + i % 2] = __int_as_float(c[i]) - kCountBase;
    }
  }
  const auto add = [&](float4 x, float left, float right) {
    const float terms[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      scores[0][r] = fmaf(terms[r], left, scores[0][r]);
      scores[1][r] = fmaf(terms[r], right, scores[1][r]);
    }
  };
  const float4 mask = *reinterpret_cast<const float4*>(s.terms + first);
  const float masks[4] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    scores[0][r] = fmaf(scores[0][r], scale, masks[r]);
    scores[1][r] = fmaf(scores[1][r], scale, masks[r]);
  }
#pragma unroll 1
  for (int64_t r = 0; r < p.rank; ++r) {
    const float* est = s.est_q + r * s.q_block;
    add(*reinterpret_cast<const float4*>(s.terms + (1 + r) * s.chunk + first), est[q.row[0]],
        est[q.row[1]]);
  }
  if (p.mask_query != 0) {
    const int64_t key = start + first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (q.query[i] >= p.nq) continue;
      const float* row = p.mask + task.image * p.mask_image + q.query[i] * p.mask_query + key;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (key + r < p.nk) scores[i][r] += row[r];
      }
    }
  }
}

// The largest score of a lane's rows, and the sum of exponentials of what they are below it.
struct RowSums {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // What to subtract: nothing while all scores are -inf.
  static __device__ float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

  __device__ void add(const float (&scores)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float (&x)[4] = scores[i];
      const float largest = fmaxf(top[i], fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
      const float shift = shift_of(largest);
      sum[i] *= ptx::exp2_approx((top[i] - shift) * kLog2E);
      top[i] = largest;
#pragma unroll
      for (int r = 0; r < 4; ++r) sum[i] += ptx::exp2_approx((x[r] - shift) * kLog2E);
    }
  }
  // Of the four lanes that share the rows.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float largest = ptx::lanes_max<4>(top[i]);
      sum[i] = ptx::lanes_sum<4>(sum[i] * ptx::exp2_approx((top[i] - shift_of(largest)) * kLog2E));
      top[i] = largest;
    }
  }
};

// Which of four elements from number `element` on dropout keeps.
__device__ __forceinline__ uint32_t kept_of_four(uint64_t seed, uint64_t element, float dropout) {
  const auto kept = [&](uint64_t block) {
    const PhiloxBlock random = philox(seed, block);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= uint32_t{philox_keeps(random.word[i], dropout)} << i;
    return bits;
  };
  const int skipped = static_cast<int>(element % 4);
  uint32_t bits = kept(element / 4);
  if (skipped != 0) bits |= kept(element / 4 + 1) << 4;
  return bits >> skipped & 15u;
}

// Bits 4 j + r of lanes t of four, keys 16 j + 4 t + r, to the words of keys in order: word t.
__device__ __forceinline__ uint32_t words_in_order(uint32_t own) {
  const int t = threadIdx.x % 4;
  uint32_t result = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const uint32_t part = own >> 8 * word;
    uint32_t keys = ((part & 0x0fu) | (part & 0xf0u) << 12) << 4 * t;
    keys |= __shfl_xor_sync(ptx::kFullWarp, keys, 1);
    keys |= __shfl_xor_sync(ptx::kFullWarp, keys, 2);
    if (t == word) result = keys;
  }
  return result;
}

// Pass 2 of a warp: bits of probabilities and what they sum up.
template <class Element, int kWords, bool kTraining>
struct WarpResults {
  int32_t out[4 * kWords][4] = {};  // counts, of 8 channels each, rows as in an accumulator
  int32_t ones[2] = {};             // bits of a row
  float extra[2] = {};              // their v_p

  __device__ void add_tile(const BinaryAttentionParams& p, const BinaryAttentionCudaPlan& plan,
                           const AttentionTask& task, const AttentionShared<kWords>& s,
                           const WarpQueries<kWords>& q, int64_t start, int tile, float scale,
                           const float (&top)[2], const float (&least)[2]) {
    const int lane = threadIdx.x % 32;
    const int t = lane % 4;
    const int64_t rest = p.nk - (start + tile * kTile);
    const int steps = rest < kTile ? static_cast<int>((rest + 15) / 16) : kTile / 16;
    uint32_t bits[2] = {}, kept[2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int j = tile * (kTile / 16) + step;
      float scores[2][4];
      scores_of(p, task, s, q, start, j, scale, scores);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t four = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) four |= uint32_t{scores[i][r] - top[i] > least[i]} << r;
        if (kTraining && p.dropout > 0) {
          const int64_t key = start + 16 * j + 4 * t;
          const int64_t row = (task.image * p.heads + task.head) * p.nq + q.query[i];
          uint32_t keep = kept_of_four(p.seed, static_cast<uint64_t>(row * p.nk + key), p.dropout);
          const int64_t valid = p.nk - key;
          if (valid < 4) keep &= valid <= 0 ? 0u : (1u << valid) - 1;
          kept[i] |= keep << 4 * step;
          four &= keep;
        }
        bits[i] |= four << 4 * step;
      }
      if (p.v_p != nullptr) {
        const float4 x =
            *reinterpret_cast<const float4*>(s.terms + plan.v_p_row * s.chunk + 16 * j + 4 * t);
        const float terms[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            extra[i] = fmaf(bits[i] >> (4 * step + r) & 1 ? 1.0f : 0.0f, terms[r], extra[i]);
          }
        }
      }
    }
    const uint32_t* values = s.v + tile * (2 * s.kDim * 4) + lane;
#pragma unroll
    for (int n = 0; n < 4 * kWords; ++n) {
      ptx::mma_m16n8k256_b1(out[n], {bits[0], bits[1], bits[0], bits[1]}, values[32 * n],
                            values[4 * s.kDim + 32 * n]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) ones[i] += __popc(bits[i]);
    if (kTraining && p.p_planes != nullptr) {
      const int planes = p.dropout > 0 ? 2 : 1;
      const int64_t words = (p.nk + kTile - 1) / kTile * 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = (task.image * p.heads + task.head) * p.nq + q.query[i];
        auto* to = reinterpret_cast<uint32_t*>(p.p_planes) + row * planes * words +
                   (start / kTile + tile) * 4 + t;
        const uint32_t probability = words_in_order(bits[i]);
        const uint32_t keep = words_in_order(kept[i]);
        if (q.query[i] >= p.nq) continue;
        to[0] = probability;
        if (planes == 2) to[words] = keep;
      }
    }
  }

  __device__ void write(const BinaryAttentionParams& p, const BinaryAttentionCudaPlan& plan,
                        const AttentionTask& task, const WarpQueries<kWords>& q) {
    const int t = threadIdx.x % 4;
    const float scale = task.alphas.p * task.alphas.v;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int all = ptx::lanes_sum<4>(ones[i]);
      const float shift = task.alphas.p * ptx::lanes_sum<4>(extra[i]);
      if (q.query[i] >= p.nq) continue;
      Element* to = static_cast<Element*>(p.out) +
                    ((task.image * p.nq + q.query[i]) * p.heads + task.head) * p.head_dim;
#pragma unroll
      for (int n = 0; n < 4 * kWords; ++n) {
        const int channel = 8 * n + 2 * t;
        const auto value = [&](int e) {
          return narrow<Element>(fmaf(static_cast<float>(out[n][2 * i + e] - all), scale, shift));
        };
        struct alignas(2 * sizeof(Element)) Pair {
          Element low, high;
        };
        if (plan.even) {
          if (channel < p.head_dim) {
            *reinterpret_cast<Pair*>(to + channel) = {value(0), value(1)};
          }
        } else {
          if (channel < p.head_dim) to[channel] = value(0);
          if (channel + 1 < p.head_dim) to[channel + 1] = value(1);
        }
      }
    }
  }
};

template <class Element, int kWords, bool kTraining>
__global__ void __launch_bounds__(kAttentionThreads, kWords == 2 ? 2 : 1)
    binary_attention_forward(const __grid_constant__ BinaryAttentionParams p,
                             const __grid_constant__ BinaryAttentionCudaPlan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  const AttentionShared<kWords> s(memory, p, plan);
  const AttentionTask task(p, plan);
  WarpQueries<kWords> q;
  q.template load<Element, kTraining>(p, task, s);
  const float scale = p.scale * (task.alphas.q * task.alphas.k);
  const bool works = q.query[0] - threadIdx.x % 32 / 4 < p.nq;  // the warp has a query
  const bool one_chunk = p.nk <= s.chunk;

  float top[2] = {}, least[2] = {};
  if (!p.bool_probs) {
    RowSums sums;
#pragma unroll 1
    for (int64_t start = 0; start < p.nk; start += s.chunk) {
      if (start > 0) __syncthreads();
      stage<Element, kWords, kTraining>(p, plan, task, s, start, one_chunk);
      __syncthreads();
      const int64_t rest = p.nk - start < s.chunk ? p.nk - start : s.chunk;
      const int steps = works ? static_cast<int>((rest + 15) / 16) : 0;
#pragma unroll 1
      for (int j = 0; j < steps; ++j) {
        float scores[2][4];
        scores_of(p, task, s, q, start, j, scale, scores);
        sums.add(scores);
      }
    }
    sums.finish();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = sums.top[i];
      // P / (1 - dropout) > alpha / 2, in logarithms. NaN where all scores are -inf or one is NaN.
      least[i] = logf(sums.sum[i] * (task.alphas.p / 2 * (1.0f - p.dropout)));
      if (kTraining && p.lse != nullptr && threadIdx.x % 4 == 0 && q.query[i] < p.nq) {
        p.lse[(task.image * p.heads + task.head) * p.nq + q.query[i]] = top[i] + logf(sums.sum[i]);
      }
    }
  }

  WarpResults<Element, kWords, kTraining> results;
#pragma unroll 1
  for (int64_t start = 0; start < p.nk; start += s.chunk) {
    if (p.bool_probs || !one_chunk) {
      if (start > 0 || !p.bool_probs) __syncthreads();
      stage<Element, kWords, kTraining>(p, plan, task, s, start, true);
      __syncthreads();
    }
    const int64_t rest = p.nk - start < s.chunk ? p.nk - start : s.chunk;
    const int tiles = works ? static_cast<int>((rest + kTile - 1) / kTile) : 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      results.add_tile(p, plan, task, s, q, start, tile, scale, top, least);
    }
  }
  results.write(p, plan, task, q);
}

}  // namespace cuda
}  // namespace fastbb
