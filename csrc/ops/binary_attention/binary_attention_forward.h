// SPDX-License-Identifier: Apache-2.0
// CPU kernels of binary attention.
//
// Packing, per block of 512 keys of a head: key words interleaved, [words of d][keys], signs and
// non-zeros, so that a vector holds one 32-bit word of as many keys as it has lanes; values packed
// along the sequence, [words of keys][d], positive and negative, where each vector of channels
// collects one bit of every key by a comparison: no transposition.
//
// Attention, per query of a block:
//   1. scores, lanes are keys: (nonzero pairs) - 2 (differing ones), counted, then scaled, plus
//      estimators and mask, in float32; their largest. The nonzero pairs are those of the query
//      alone unless the head has a zero in its keys.
//   2. e = exp(score - largest) and their sum, in blocks whose sums add up in double.
//   3. bit: e > a_p / 2 * sum, which is P > a_p / 2 without a division per key (they can differ
//      where the two sides are equal but for rounding); dropout; words of 32 keys.
//   4. result, lanes are channels: bits AND value words, counted.
// Step 2 bounds it: about 16 of the 30 instructions per vector of keys at d = 64; 1 takes 10. A
// row of scores (4 bytes per key) and the packed head (d / 2 bytes per key) stay in the L1 and L2
// caches up to some thousand keys.
#pragma once

#include "core/scratch.h"
#include "ops/binary_attention/binary_attention_bits.h"
#include "ops/binary_attention/binary_attention_dropout.h"

namespace fastbb {
namespace {

struct Alphas {
  float q = 1, k = 1, v = 1, p = 1;
};

FASTBB_INLINE Alphas alphas_of(const BinaryAttentionParams& p) {
  Alphas a;
  if (p.alphas == nullptr) return a;
  const auto raised = [&](int i) { return p.alphas[i] < kLeastAlpha ? kLeastAlpha : p.alphas[i]; };
  a.q = raised(0);
  a.k = raised(1);
  a.v = raised(2);
  if (!p.bool_probs) a.p = raised(3);
  return a;
}

template <class T>
FASTBB_INLINE const T* token(const HeadMap& map, int64_t image, int64_t index, int64_t head) {
  return static_cast<const T*>(map.data) + image * map.image + index * map.token + head * map.head;
}

// A head's part of the workspace.
template <class Byte>
struct HeadBits {
  using Word = std::conditional_t<std::is_const_v<Byte>, const uint32_t, uint32_t>;
  Word *k_positive, *k_nonzero;   // [words of d][padded_keys]
  Word *v_positive, *v_negative;  // [words of keys][padded_dim]
  Byte* zeros;                    // [key_blocks][2]: whether a key, a value is zero

  HeadBits(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan, Byte* workspace,
           int64_t head) {
    const int64_t k_words = (p.head_dim + kWordBits - 1) / kWordBits * plan.padded_keys;
    const int64_t v_words = plan.padded_keys / kWordBits * plan.padded_dim;
    k_positive = reinterpret_cast<Word*>(workspace + head * plan.head_bytes);
    k_nonzero = k_positive + k_words;
    v_positive = k_nonzero + k_words;
    v_negative = v_positive + v_words;
    zeros = reinterpret_cast<Byte*>(v_negative + v_words);
  }
};

// ---- packing ----

template <class T>
bool pack_keys(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan,
               const HeadBits<uint8_t>& bits, int64_t image, int64_t head, int64_t first,
               int64_t last) {
  const int64_t words = (p.head_dim + kWordBits - 1) / kWordBits;
  const float alpha = alphas_of(p).k;
  const int64_t stop = last == p.nk ? plan.padded_keys : last;
  bool zero = false;
  for (int64_t j = first; j < stop; ++j) {
    Signs signs{};
    if (j < last) {
      const T* x = token<T>(p.k, image, j, head);
      signs = pack_signs(x, p.head_dim);
      if (p.k_planes != nullptr) {
        const int64_t row = (image * p.nk + j) * p.heads + head;
        save_planes(x, p.head_dim, signs, alpha, p.ste,
                    p.k_planes + row * 3 * bit_row_bytes(p.head_dim));
      }
    }
    int64_t nonzeros = 0;
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t nonzero = signs.positive[w] | signs.negative[w];
      bits.k_positive[w * plan.padded_keys + j] = signs.positive[w];
      bits.k_nonzero[w * plan.padded_keys + j] = nonzero;
      nonzeros += __builtin_popcount(nonzero);
    }
    zero |= j < last && nonzeros != p.head_dim;
  }
  return zero;
}

template <class T>
bool pack_values(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan,
                 const HeadBits<uint8_t>& bits, int64_t image, int64_t head, int64_t first,
                 int64_t last) {
  VecU missing{};
  for (int64_t j = first; j < last; j += kWordBits) {
    const int64_t keys = last - j < kWordBits ? last - j : kWordBits;
    const uint32_t all = keys < kWordBits ? (1u << keys) - 1 : ~0u;
    const int64_t row = j / kWordBits * plan.padded_dim;
    for (int64_t c = 0; c < plan.padded_dim; c += kLanes) {
      VecI positive{}, negative{};
      for (int64_t i = 0; i < keys; ++i) {
        const VecF v = load_within(token<T>(p.v, image, j + i, head), c, p.head_dim);
        const VecI bit = broadcast(static_cast<int32_t>(1u << i));
        positive |= (v > VecF{}) & bit;
        negative |= (v < VecF{}) & bit;
      }
      std::memcpy(bits.v_positive + row + c, &positive, sizeof(positive));
      std::memcpy(bits.v_negative + row + c, &negative, sizeof(negative));
      const int64_t lanes = p.head_dim - c < kLanes ? p.head_dim - c : kLanes;
      if (lanes > 0) {
        const VecU valid = bit_cast<VecU>(first_lanes(static_cast<int>(lanes)));
        missing |= broadcast_word(all) & ~bit_cast<VecU>(positive | negative) & valid;
      }
    }
  }
  return bits_of(missing != VecU{}) != 0;
}

template <class T>
void save_values(const BinaryAttentionParams& p, int64_t image, int64_t head, int64_t first,
                 int64_t last) {
  const float alpha = alphas_of(p).v;
  for (int64_t j = first; j < last; ++j) {
    const T* x = token<T>(p.v, image, j, head);
    const int64_t row = (image * p.nk + j) * p.heads + head;
    save_planes(x, p.head_dim, pack_signs(x, p.head_dim), alpha, p.ste,
                p.v_planes + row * 3 * bit_row_bytes(p.head_dim));
  }
}

// est_k [B, Nk, rank] -> [B, rank, padded_keys].
inline void transpose_estimator(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan,
                                uint8_t* workspace, int64_t image, int64_t first, int64_t last) {
  float* to =
      reinterpret_cast<float*>(workspace + plan.est_offset) + image * p.rank * plan.padded_keys;
  const int64_t stop = last == p.nk ? plan.padded_keys : last;
  for (int64_t j = first; j < stop; ++j) {
    for (int64_t r = 0; r < p.rank; ++r) {
      to[r * plan.padded_keys + j] = j < last ? p.est_k[(image * p.nk + j) * p.rank + r] : 0.0f;
    }
  }
}

template <class T>
void pack_tasks(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan, uint8_t* workspace,
                int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.key_blocks, index = task / plan.key_blocks;
    const int64_t image = index / p.heads, head = index % p.heads;
    const int64_t first = block * plan.key_block;
    const int64_t last = first + plan.key_block < p.nk ? first + plan.key_block : p.nk;
    const HeadBits<uint8_t> bits(p, plan, workspace, index);
    bits.zeros[2 * block] = pack_keys<T>(p, plan, bits, image, head, first, last);
    bits.zeros[2 * block + 1] = pack_values<T>(p, plan, bits, image, head, first, last);
    if (p.v_planes != nullptr) save_values<T>(p, image, head, first, last);
    if (p.est_k != nullptr && head == 0) {
      transpose_estimator(p, plan, workspace, image, first, last);
    }
  }
}

// ---- attention ----

using PackedHead = HeadBits<const uint8_t>;

// One query of a head.
struct Query {
  uint32_t positive[kMostWords], nonzero[kMostWords];
  int32_t nonzeros;
  const float* est;   // [rank]
  const float* mask;  // [Nk] or null
};

// What all queries of a task share.
struct Task {
  const BinaryAttentionParams& p;
  const BinaryAttentionPlan& plan;
  PackedHead bits;
  const float* est_k;  // [rank, padded_keys]
  const float* v_p;    // [Nk] or null
  Alphas alphas;
  bool key_zeros, value_zeros;
};

// 1. Writes the scores of all padded keys, -inf behind the last key; returns the largest.
template <int kWords, bool kKeyZeros>
float write_scores(const Task& t, const Query& q, float* scores) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const BinaryAttentionParams& p = t.p;
  const int64_t stride = t.plan.padded_keys;
  const int64_t words = kWords > 0 ? kWords : (p.head_dim + kWordBits - 1) / kWordBits;
  const float product = t.alphas.q * t.alphas.k;
  VecF largest = broadcast(-kInfinity);
  const auto score = [&](int64_t j) __attribute__((always_inline)) {
    VecU pairs{}, differing{};
#pragma GCC unroll 4
    for (int64_t w = 0; w < words; ++w) {
      const VecU signs = load_as<VecU>(t.bits.k_positive + w * stride + j);
      VecU both = broadcast_word(q.nonzero[w]);
      if constexpr (kKeyZeros) {
        both &= load_as<VecU>(t.bits.k_nonzero + w * stride + j);
        pairs += count_fields(both);
      }
      differing += count_fields((signs ^ broadcast_word(q.positive[w])) & both);
    }
    const VecI all = kKeyZeros ? add_fields(pairs) : broadcast(q.nonzeros);
    VecF s = __builtin_convertvector(all - 2 * add_fields(differing), VecF) * product;
    for (int64_t r = 0; r < p.rank; ++r) s += q.est[r] * load(t.est_k + r * stride + j);
    return s * p.scale;
  };
  int64_t j = 0;
  for (; j + kLanes <= p.nk; j += kLanes) {
    VecF s = score(j);
    if (q.mask != nullptr) s += load(q.mask + j);
    largest = max(largest, s);
    store(scores + j, s);
  }
  for (; j < stride; j += kLanes) {
    const int rest = p.nk > j ? static_cast<int>(p.nk - j) : 0;
    VecF s = score(j);
    if (q.mask != nullptr) s += load_within(q.mask, j, p.nk);
    s = first_lanes(rest) ? s : broadcast(-kInfinity);
    largest = max(largest, s);
    store(scores + j, s);
  }
  return reduce(largest, [](VecF a, VecF b) __attribute__((always_inline)) { return max(a, b); });
}

template <int kWords>
FASTBB_INLINE float scores_of_words(const Task& t, const Query& q, float* scores) {
  return t.key_zeros ? write_scores<kWords, true>(t, q, scores)
                     : write_scores<kWords, false>(t, q, scores);
}

FASTBB_INLINE float scores_of(const Task& t, const Query& q, float* scores) {
  if (t.p.head_dim <= kWordBits) return scores_of_words<1>(t, q, scores);
  if (t.p.head_dim <= 2 * kWordBits) return scores_of_words<2>(t, q, scores);
  return scores_of_words<0>(t, q, scores);
}

// 2. Replaces scores by their exponentials; returns the sum.
inline double exponentials(float* scores, int64_t size, float largest) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t last = first + kBlock < size ? first + kBlock : size;
    VecF sum{};
    for (int64_t j = first; j < last; j += kLanes) {
      const VecF e = exp(load(scores + j) - largest);
      store(scores + j, e);
      sum += e;
    }
    total += reduce_add(sum);
  }
  return total;
}

// 3. Bits of values above the limit, of kept keys if `kept` is given; returns their number.
inline int32_t write_bits(const float* values, int64_t words, float limit, const uint32_t* kept,
                          uint32_t* bits) {
  const VecF least = broadcast(limit);
  int32_t ones = 0;
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kVecsOfWord; ++i) {
      word |= bits_greater(load(values + w * kWordBits + i * kLanes), least) << (i * kLanes);
    }
    if (kept != nullptr) word &= kept[w];
    bits[w] = word;
    ones += __builtin_popcount(word);
  }
  return ones;
}

// Sum of bit * v_p; a zero bit times infinity is NaN, as in the reference.
inline float weigh(const uint32_t* bits, int64_t words, const float* v_p, int64_t keys) {
  VecF sum{};
  for (int64_t w = 0; w < words; ++w) {
    for (int i = 0; i < kVecsOfWord; ++i) {
      const VecU bit = (broadcast_word(bits[w]) >> bit_cast<VecU>(iota() + i * kLanes)) & 1u;
      const VecF ones = __builtin_convertvector(bit_cast<VecI>(bit), VecF);
      sum += ones * load_within(v_p, w * kWordBits + i * kLanes, keys);
    }
  }
  return reduce_add(sum);
}

// 4. kVecs vectors of channels from channel c on: value * bits + shift.
template <class T, int kVecs, bool kValueZeros>
void write_channels(const Task& t, const uint32_t* bits, int32_t ones, float value, float shift,
                    int64_t c, T* out) {
  const int64_t words = t.plan.padded_keys / kWordBits;
  VecI sums[kVecs]{};
  for (int64_t first = 0; first < words; first += kFieldWords) {
    const int64_t last = first + kFieldWords < words ? first + kFieldWords : words;
    VecU positive[kVecs]{}, negative[kVecs]{};
    for (int64_t w = first; w < last; ++w) {
      const VecU word = broadcast_word(bits[w]);
      const int64_t at = w * t.plan.padded_dim + c;
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        positive[i] += count_fields(word & load_as<VecU>(t.bits.v_positive + at + i * kLanes));
        if constexpr (kValueZeros) {
          negative[i] += count_fields(word & load_as<VecU>(t.bits.v_negative + at + i * kLanes));
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      sums[i] += kValueZeros ? add_fields(positive[i]) - add_fields(negative[i])
                             : 2 * add_fields(positive[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVecs; ++i) {
    const VecI sum = kValueZeros ? sums[i] : sums[i] - ones;
    const VecF y = __builtin_convertvector(sum, VecF) * value + shift;
    const int64_t at = c + i * kLanes;
    const int64_t rest = t.p.head_dim - at;
    if (rest >= kLanes) {
      store(out + at, y);
    } else if (rest > 0) {
      store_partial(out + at, y, static_cast<int>(rest));
    }
  }
}

template <class T, bool kValueZeros>
void write_row(const Task& t, const uint32_t* bits, int32_t ones, float value, float shift,
               T* out) {
  const int64_t vecs = t.plan.padded_dim / kLanes;
  int64_t v = 0;
  for (; v + 4 <= vecs; v += 4) {
    write_channels<T, 4, kValueZeros>(t, bits, ones, value, shift, v * kLanes, out);
  }
  for (; v + 2 <= vecs; v += 2) {
    write_channels<T, 2, kValueZeros>(t, bits, ones, value, shift, v * kLanes, out);
  }
  for (; v < vecs; ++v) {
    write_channels<T, 1, kValueZeros>(t, bits, ones, value, shift, v * kLanes, out);
  }
}

template <class T>
Query query_of(const Task& t, int64_t image, int64_t head, int64_t i) {
  const BinaryAttentionParams& p = t.p;
  const T* x = token<T>(p.q, image, i, head);
  const Signs signs = pack_signs(x, p.head_dim);
  if (p.q_planes != nullptr) {
    const int64_t row = (image * p.nq + i) * p.heads + head;
    save_planes(x, p.head_dim, signs, t.alphas.q, p.ste,
                p.q_planes + row * 3 * bit_row_bytes(p.head_dim));
  }
  Query q;
  q.nonzeros = 0;
  for (int64_t w = 0; w * kWordBits < p.head_dim; ++w) {
    q.positive[w] = signs.positive[w];
    q.nonzero[w] = signs.positive[w] | signs.negative[w];
    q.nonzeros += __builtin_popcount(q.nonzero[w]);
  }
  q.est = p.rank > 0 ? p.est_q + (image * p.nq + i) * p.rank : nullptr;
  q.mask = p.mask == nullptr ? nullptr : p.mask + image * p.mask_image + i * p.mask_query;
  return q;
}

// One thread's rows, for any number of queries.
struct Rows {
  float* scores;
  uint32_t *bits, *kept;  // kept: null without dropout
};

template <class T>
void attend(const Task& t, int64_t image, int64_t head, int64_t i, const Rows& rows) {
  const BinaryAttentionParams& p = t.p;
  const int64_t words = t.plan.padded_keys / kWordBits;
  const int64_t row = (image * p.heads + head) * p.nq + i;
  const float largest = scores_of(t, query_of<T>(t, image, head, i), rows.scores);
  float limit = 0;
  if (!p.bool_probs) {
    const double sum = exponentials(rows.scores, t.plan.padded_keys, largest);
    limit = static_cast<float>(sum * (1.0 - double{p.dropout}) * t.alphas.p / 2);
    if (p.lse != nullptr) {
      const VecF logarithm = log(broadcast(static_cast<float>(sum)));
      const bool masked = largest == -std::numeric_limits<float>::infinity();
      p.lse[row] = masked ? largest : largest + logarithm[0];
    }
  }
  if (rows.kept != nullptr) write_kept(p, row * p.nk, rows.kept, words);
  const int32_t ones = write_bits(rows.scores, words, limit, rows.kept, rows.bits);
  if (p.p_planes != nullptr) {
    const int64_t bytes = bit_row_bytes(p.nk);
    const int64_t planes = rows.kept == nullptr ? 1 : 2;
    uint8_t* to = p.p_planes + row * planes * bytes;
    std::memset(to, 0, planes * bytes);
    std::memcpy(to, rows.bits, words * 4);
    if (rows.kept != nullptr) std::memcpy(to + bytes, rows.kept, words * 4);
  }
  const float shift = t.v_p == nullptr ? 0.0f : t.alphas.p * weigh(rows.bits, words, t.v_p, p.nk);
  T* out = static_cast<T*>(p.out) + ((image * p.nq + i) * p.heads + head) * p.head_dim;
  const float value = t.alphas.p * t.alphas.v;
  if (t.value_zeros) {
    write_row<T, true>(t, rows.bits, ones, value, shift, out);
  } else {
    write_row<T, false>(t, rows.bits, ones, value, shift, out);
  }
}

template <class T>
void forward_tasks(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan,
                   const uint8_t* workspace, int64_t begin, int64_t end) {
  const int64_t words = plan.padded_keys / kWordBits;
  Rows rows;
  rows.scores = static_cast<float*>(thread_scratch((plan.padded_keys + 2 * words) * 4));
  rows.bits = reinterpret_cast<uint32_t*>(rows.scores + plan.padded_keys);
  rows.kept = p.dropout > 0 ? rows.bits + words : nullptr;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.q_blocks, index = task / plan.q_blocks;
    const int64_t image = index / p.heads, head = index % p.heads;
    const PackedHead bits(p, plan, workspace, index);
    const float* est = reinterpret_cast<const float*>(workspace + plan.est_offset);
    Task t{p,
           plan,
           bits,
           est + image * p.rank * plan.padded_keys,
           p.v_p == nullptr ? nullptr : p.v_p + image * p.nk,
           alphas_of(p),
           false,
           false};
    for (int64_t k = 0; k < plan.key_blocks; ++k) {
      t.key_zeros |= bits.zeros[2 * k] != 0;
      t.value_zeros |= bits.zeros[2 * k + 1] != 0;
    }
    const int64_t last = (block + 1) * plan.q_block < p.nq ? (block + 1) * plan.q_block : p.nq;
    for (int64_t i = block * plan.q_block; i < last; ++i) attend<T>(t, image, head, i, rows);
  }
}

}  // namespace
}  // namespace fastbb
