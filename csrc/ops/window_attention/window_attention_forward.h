// SPDX-License-Identifier: Apache-2.0
// Forward pass of one task: up to 64 queries of one head of one problem.
//
// 1. Pack the K block transposed [d, keys] and the V block [keys, d]; consecutive tasks of the same
//    head reuse them. At N = 49, d = 32 that is 13 KB and at N = 196 50 KB: L1 and L2.
// 2. For each block of queries whose logits fit in 64 KB (N = 196: all 49): Q K^T, add bias and
//    masks, softmax, P V. Each step finishes the block before the next begins, so that latencies of
//    a row overlap with other rows'; maxima and sums along rows are taken for kLanes rows at once.
// 3. Problems with more than 2048 keys run over blocks of 512 keys with a running maximum and sum.
// 4. A window of 49 keys fills three vectors of 16 lanes and one lane of a fourth. Such a lone last
//    key is kept out of the vectors along the keys: its logits and weights are computed along the
//    queries, which saves a quarter of Q K^T and of the exponentials.
//
// Bound: arithmetic. Per query 4 N d flops of FMA against about 14 vector instructions per kLanes
// logits for the exponential.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/scratch.h"
#include "core/tile.h"
#include "ops/window_attention/window_attention_tokens.h"

namespace fastbb {
namespace {

// Keys of a block that are handled in vectors along the keys: all but a lone last one.
constexpr int64_t keys_in_vectors(int64_t keys) {
  return keys > kLanes && keys % kLanes == 1 ? keys - 1 : keys;
}
// The same, in whole vectors: columns of K^T that are filled.
constexpr int64_t key_columns(int64_t keys) { return round_up(keys_in_vectors(keys), kLanes); }

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Working memory of a thread. Strides are in 32-bit elements.
struct ForwardScratch {
  Tokens tokens;
  float* rows;      // [keys, row_ld] staging for the transposition
  float* keys_t;    // [row_ld, key_ld] K^T
  float* values;    // [keys, value_ld]
  float* queries;   // [block_rows, row_ld]
  float* logits;    // [block_rows, key_ld], then softmax weights
  float* weights;   // the weights as operand of P V (the same rows in float32)
  float* bias;      // [block_rows, bias_ld]
  VecF* lanes;      // [block_rows] maxima, then sums, by lane
  float* lone_key;  // [row_ld] the lone key
  float* lone;      // [block_rows] its logits, then weights
  float* shift;     // [block_rows] what is subtracted from the logits of a row
  float* out;       // [q_block_rows, value_ld]
  int64_t* query;   // [q_block_rows] the real queries of the task
  float* maximum;   // [q_block_rows]
  float* sum;       // [q_block_rows]
  int64_t key_ld, row_ld, value_ld, bias_ld, weight_ld, block_rows;
};

// float32 arithmetic for any element type.
template <class T>
struct Fp32Engine {
  using Element = T;
  using Dot = DotF32;
  static int64_t row_ld(int64_t d) { return round_up(d, kLanes); }
  static int64_t weight_ld(int64_t) { return 0; }  // the logits rows serve
  static int64_t query_inner(int64_t d) { return d; }
  static int64_t key_inner(int64_t keys) { return keys; }

  static void pack_keys(const WindowAttentionParams& p, ForwardScratch& s, int64_t head,
                        int64_t first, int64_t n) {
    const int64_t columns = key_columns(n);
    pack_rows<T>(p, s.tokens, p.k, p.k_pad, head, first, n, columns, s.row_ld,
                 next_head(p, p.k, head), s.rows);
    if (p.qk_l2norm) {
      for (int64_t i = 0; i < n; ++i) normalise_row(s.rows + i * s.row_ld, s.row_ld);
    }
    transpose_rows(s.rows, columns, s.row_ld, s.row_ld, s.keys_t, s.key_ld);
  }
  static void pack_values(const WindowAttentionParams& p, ForwardScratch& s, int64_t head,
                          int64_t first, int64_t n) {
    pack_rows<T>(p, s.tokens, p.v, p.v_pad, head, first, n, n, s.value_ld, next_head(p, p.v, head),
                 s.values);
  }
  static void load_query(const WindowAttentionParams& p, const T* from, float* to, int64_t ld) {
    load_row(from, p.head_dim, ld, to);
    if (p.qk_l2norm) normalise_row(to, ld);
  }
  static const float* weights(ForwardScratch& s, int64_t, int64_t) { return s.logits; }
};

#if defined(FASTBB_ISA_AVX512_BF16)
// bfloat16 operands, two per 32-bit lane, multiplied and summed in float32. The softmax weights
// are rounded to bfloat16; their sum is not. Not used with L2-normalisation, whose unit vectors
// would lose what a scale of up to 100 then magnifies.
struct Bf16Engine {
  using Element = BFloat16;
  using Dot = DotBf16Pairs;
  static int64_t row_ld(int64_t d) { return round_up(d, 2 * kLanes) / 2; }
  static int64_t weight_ld(int64_t keys) { return round_up(keys, 2 * kLanes) / 2; }
  static int64_t query_inner(int64_t d) { return (d + 1) / 2; }
  static int64_t key_inner(int64_t keys) { return (keys + 1) / 2; }

  // d bfloat16 -> pairs, zero-filled up to ld lanes; `from` null gives zeros.
  static FASTBB_INLINE void copy_row(const BFloat16* from, int64_t d, float* to, int64_t ld) {
    auto* bits = reinterpret_cast<uint16_t*>(to);
    int64_t c = 0;
    if (from != nullptr) {
      for (; c + 2 * kLanes <= d; c += 2 * kLanes) {
        const auto v = load_as<VecF>(from + c);
        std::memcpy(bits + c, &v, sizeof(v));
      }
      if (c < d) {
        const __mmask32 present = static_cast<__mmask32>((1ull << (d - c)) - 1);
        _mm512_storeu_si512(bits + c, _mm512_maskz_loadu_epi16(present, from + c));
        c += 2 * kLanes;
      }
    }
    for (; c < 2 * ld; c += 2 * kLanes) store(reinterpret_cast<float*>(bits + c), VecF{});
  }
  static FASTBB_INLINE void pack_token(const WindowAttentionParams& p, const Tokens& t,
                                       const TokenMap& map, const float* pad, int64_t head,
                                       int64_t token, int64_t ld, float* row) {
    const int64_t d = p.head_dim;
    if (is_real(p, t, token)) {
      const auto* from = token_at<const BFloat16>(p, t, map, head, token);
      prefetch_row(p, from, next_head(p, map, head));
      copy_row(from, d, row, ld);
    } else {
      copy_row(nullptr, d, row, ld);
      if (pad != nullptr) store_row(pad + head * d, d, 1.0f, reinterpret_cast<BFloat16*>(row));
    }
  }
  static void pack(const WindowAttentionParams& p, const ForwardScratch& s, const TokenMap& map,
                   const float* pad, int64_t head, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      pack_token(p, s.tokens, map, pad, head, first + i, s.row_ld, s.rows + i * s.row_ld);
    }
    for (int64_t i = n; i < round_up(n, 2 * kLanes); ++i) {
      copy_row(nullptr, p.head_dim, s.rows + i * s.row_ld, s.row_ld);
    }
  }
  static void pack_keys(const WindowAttentionParams& p, ForwardScratch& s, int64_t head,
                        int64_t first, int64_t n) {
    pack(p, s, p.k, p.k_pad, head, first, n);
    const int64_t columns = key_columns(n);
    transpose_rows(s.rows, columns, s.row_ld, s.row_ld, s.keys_t, s.key_ld);
  }
  // Pairs run along the keys: lane c of pair row i holds values 2i and 2i+1 of channel c.
  static void pack_values(const WindowAttentionParams& p, ForwardScratch& s, int64_t head,
                          int64_t first, int64_t n) {
    pack(p, s, p.v, p.v_pad, head, first, n);
    for (int64_t i = 0; i < n; i += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(s.rows + i * s.row_ld);
      const auto* odd = reinterpret_cast<const uint16_t*>(s.rows + (i + 1) * s.row_ld);
      for (int64_t c = 0; c < s.value_ld; c += kLanes) {
        const VecU low = __builtin_convertvector(load_as<VecH>(even + c), VecU);
        const VecU high = __builtin_convertvector(load_as<VecH>(odd + c), VecU);
        store(s.values + i / 2 * s.value_ld + c, bit_cast<VecF>(low | (high << 16)));
      }
    }
  }
  static void load_query(const WindowAttentionParams& p, const BFloat16* from, float* to,
                         int64_t ld) {
    copy_row(from, p.head_dim, to, ld);
  }
  static const float* weights(ForwardScratch& s, int64_t rows, int64_t keys) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = s.logits + r * s.key_ld;
      for (int64_t j = 0; j < keys; j += 2 * kLanes) {
        const VecF low = load(from + j);
        const VecF high = j + kLanes < s.key_ld ? load(from + j + kLanes) : VecF{};
        store(s.weights + r * s.weight_ld + j / 2,
              bit_cast<VecF>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low))));
      }
    }
    return s.weights;
  }
};
#endif

// Rows of logits kept at once.
inline int64_t forward_block_rows(int64_t key_ld, int64_t q_block_rows) {
  constexpr int64_t kFloats = 16384;
  return larger(smaller(kFloats / key_ld, q_block_rows), smaller(kTileRows, q_block_rows));
}

template <class Engine>
int64_t carve_forward(const WindowAttentionParams& p, const WindowAttentionPlan& plan, void* base,
                      ForwardScratch& s) {
  const int64_t keys = round_up(plan.key_block, 2 * kLanes);
  s.key_ld = round_up(plan.key_block, kLanes);
  s.row_ld = Engine::row_ld(p.head_dim);
  s.value_ld = round_up(p.head_dim, kLanes);
  s.bias_ld = s.key_ld + kLanes;
  s.weight_ld = Engine::weight_ld(plan.key_block);
  s.block_rows = forward_block_rows(s.key_ld, plan.q_block_rows);
  Carver carver(base);
  s.tokens.keys = carver.take<Token>(p.full ? 0 : p.nk);
  s.tokens.region = carver.take<int32_t>(p.full ? 0 : round_up(p.nk, kLanes) + kLanes);
  s.rows = carver.take<float>(keys * s.row_ld);
  s.keys_t = carver.take<float>(s.row_ld * s.key_ld);
  s.values = carver.take<float>(keys * s.value_ld);
  s.queries = carver.take<float>(s.block_rows * s.row_ld);
  s.logits = carver.take<float>(s.block_rows * s.key_ld);
  s.weights = carver.take<float>(s.block_rows * s.weight_ld);
  s.bias = carver.take<float>(s.block_rows * s.bias_ld);
  s.lanes = carver.take<VecF>(round_up(s.block_rows, kLanes));
  s.lone_key = carver.take<float>(s.row_ld);
  s.lone = carver.take<float>(round_up(s.block_rows, kLanes));
  s.shift = carver.take<float>(round_up(s.block_rows, kLanes));
  s.out = carver.take<float>(plan.q_block_rows * s.value_ld);
  s.query = carver.take<int64_t>(plan.q_block_rows);
  s.maximum = carver.take<float>(plan.q_block_rows + kLanes);
  s.sum = carver.take<float>(plan.q_block_rows + kLanes);
  return carver.used();
}

// Whether each query expands its own bias row from the table.
inline bool expands_rows(const WindowAttentionParams& p) {
  return p.table != nullptr && p.bias == nullptr;
}

inline LogitTerms logit_terms(const WindowAttentionParams& p, const Tokens& t, int64_t head,
                              int64_t query, int64_t first_key, const float* expanded_bias) {
  const int64_t mask_index = p.full ? t.image : t.window;
  LogitTerms terms;
  terms.scale = scale_of(p, head);
  terms.bias = expanded_bias;
  if (p.bias != nullptr) terms.bias = p.bias + (head * p.nq + query) * p.bias_ld + first_key;
  terms.mask = nullptr;
  if (p.mask != nullptr) {
    terms.mask = p.mask + (mask_index % p.mask_count * p.nq + query) * p.nk + first_key;
  }
  terms.region = t.has_regions ? t.region + first_key : nullptr;
  terms.query_region = t.has_regions ? t.region[query] : 0;
  terms.region_value = p.swin_mask_value;
  return terms;
}

// Raw products -> logits in place; lanes beyond `keys` become -inf. Returns the maxima by lane.
FASTBB_INLINE VecF logits_row(float* s, int64_t keys, const LogitTerms& terms) {
  const int64_t whole = keys / kLanes * kLanes;
  VecF top = broadcast(-kInfinity);
  for (int64_t j = 0; j < whole; j += kLanes) {
    const VecF x = apply_terms<false>(load(s + j), terms, j, kLanes);
    store(s + j, x);
    top = max(top, x);
  }
  if (whole < keys) {
    const int rest = static_cast<int>(keys - whole);
    VecF x = apply_terms<true>(load(s + whole), terms, whole, rest);
    x = first_lanes(rest) ? x : broadcast(-kInfinity);
    store(s + whole, x);
    top = max(top, x);
  }
  return top;
}

// Logits -> exp(logit - shift), in place. Returns the sums by lane.
FASTBB_INLINE VecF exponentiate_row(float* s, int64_t key_ld, float shift) {
  VecF total{};
  for (int64_t j = 0; j < key_ld; j += kLanes) {
    const VecF e = exp(load(s + j) - shift);
    store(s + j, e);
    total += e;
  }
  return total;
}

// Raw products of the lone key with the packed queries.
template <class Dot>
void multiply_lone_key(const ForwardScratch& s, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    VecF sum{};
    for (int64_t c = 0; c < s.row_ld; c += kLanes) {
      sum = Dot::apply(sum, load(s.queries + r * s.row_ld + c), load(s.lone_key + c));
    }
    s.lone[r] = reduce_add(sum);
  }
}

FASTBB_INLINE float lone_logit(float raw, const LogitTerms& t, int64_t j) {
  float x = raw * t.scale;
  if (t.bias != nullptr) x += t.bias[j];
  if (t.mask != nullptr) x += t.mask[j];
  if (t.region != nullptr && t.region[j] != t.query_region) x += t.region_value;
  return x;
}

// Maxima of a group of rows -> what is subtracted from their logits; with earlier key blocks, their
// sums and outputs are brought to the new maxima.
inline void update_maxima(const ForwardScratch& s, int64_t r0, int64_t g, int n, bool first) {
  float* maxima = s.maximum + r0 + g;
  float* sums = s.sum + r0 + g;
  VecF top =
      max(reduce_rows(s.lanes + g, [](VecF a, VecF b) { return max(a, b); }), load(s.lone + g));
  if (!first) top = max(top, load(maxima));
  // All keys masked with -inf so far: subtract 0, so that later blocks still count.
  const VecF shift = top == broadcast(-kInfinity) ? VecF{} : top;
  store(s.shift + g, shift);
  if (!first) {
    const VecF shrink = exp(load(maxima) - shift);
    store_partial(sums, load(sums) * shrink, n);
    for (int r = 0; r < n; ++r) scale_row(s.out + (r0 + g + r) * s.value_ld, shrink[r], s.value_ld);
  }
  store_partial(maxima, top, n);
}

// Raw products of a block -> softmax weights relative to each row's running maximum, in place.
// Horizontal maxima and sums are taken for kLanes rows at once.
inline void softmax_block(const WindowAttentionParams& p, const ForwardScratch& s, int64_t head,
                          int64_t r0, int64_t rows, int64_t first_key, int64_t keys) {
  const bool first = first_key == 0;
  const int64_t in_vectors = keys_in_vectors(keys);
  const bool has_lone = in_vectors < keys;
  for (int64_t r = 0; r < rows; ++r) {
    const float* expanded = expands_rows(p) ? s.bias + r * s.bias_ld : nullptr;
    const auto terms = logit_terms(p, s.tokens, head, s.query[r0 + r], first_key, expanded);
    s.lanes[r] = logits_row(s.logits + r * s.key_ld, in_vectors, terms);
    s.lone[r] = has_lone ? lone_logit(s.lone[r], terms, in_vectors) : -kInfinity;
  }
  const auto group_size = [rows](int64_t g) { return static_cast<int>(smaller(kLanes, rows - g)); };
  for (int64_t g = 0; g < rows; g += kLanes) update_maxima(s, r0, g, group_size(g), first);
  for (int64_t r = 0; r < rows; ++r) {
    s.lanes[r] = exponentiate_row(s.logits + r * s.key_ld, key_columns(keys), s.shift[r]);
  }
  for (int64_t g = 0; g < rows; g += kLanes) {
    float* sums = s.sum + r0 + g;
    const VecF lone = exp(load(s.lone + g) - load(s.shift + g));
    store(s.lone + g, lone);
    VecF sum = reduce_rows(s.lanes + g, [](VecF a, VecF b) { return a + b; }) + lone;
    if (!first) sum += load(sums);
    store_partial(sums, sum, group_size(g));
  }
  for (int64_t r = 0; has_lone && r < rows; ++r) {
    VecF last{};
    last[0] = s.lone[r];
    store(s.logits + r * s.key_ld + in_vectors, last);
  }
}

// `rows` queries (from entry r0 of the task's list) against the packed key block.
template <class Engine>
void forward_block(const WindowAttentionParams& p, ForwardScratch& s, int64_t head, int64_t r0,
                   int64_t rows, int64_t first_key, int64_t keys) {
  using T = typename Engine::Element;
  using Dot = typename Engine::Dot;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = s.query[r0 + r];
    const T* from = query_at<const T>(p, s.tokens, p.q, head, query);
    prefetch_row(p, from, next_head(p, p.q, head));
    Engine::load_query(p, from, s.queries + r * s.row_ld, s.row_ld);
    if (expands_rows(p)) {
      expand_bias_row(p, head, query, first_key, keys, s.bias + r * s.bias_ld);
    }
  }
  const int64_t in_vectors = keys_in_vectors(keys);
  multiply<Dot>(rows, key_columns(keys) / kLanes,
                {Engine::query_inner(p.head_dim), s.queries, s.row_ld, 1, s.keys_t, s.key_ld,
                 s.logits, s.key_ld, false});
  if (in_vectors < keys) multiply_lone_key<Dot>(s, rows);
  softmax_block(p, s, head, r0, rows, first_key, keys);
  const float* weights = Engine::weights(s, rows, keys);
  const int64_t weight_ld = weights == s.logits ? s.key_ld : s.weight_ld;
  multiply<Dot>(rows, s.value_ld / kLanes,
                {Engine::key_inner(keys), weights, weight_ld, 1, s.values, s.value_ld,
                 s.out + r0 * s.value_ld, s.value_ld, first_key != 0});
}

// Normalises the output rows of the task's queries and writes them and their log-sum-exp.
template <class T>
void write_results(const WindowAttentionParams& p, const ForwardScratch& s, int64_t head,
                   int64_t rows, float* lse) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const VecF sum = load(s.sum + r);
    store(s.maximum + r, load(s.maximum + r) + log(sum));
    store(s.sum + r, 1.0f / sum);
  }
  for (int64_t r = 0; r < rows; ++r) {
    lse[s.query[r]] = s.maximum[r];
    store_row(s.out + r * s.value_ld, p.head_dim, s.sum[r],
              token_at<T>(p, s.tokens, p.out, head, s.query[r]));
  }
}

template <class Engine>
void forward_tasks(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
                   int64_t end) {
  using T = typename Engine::Element;
  ForwardScratch s;
  const int64_t bytes = carve_forward<Engine>(p, plan, nullptr, s);
  carve_forward<Engine>(p, plan, thread_scratch(static_cast<size_t>(bytes)), s);
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  int64_t packed_problem = -1, packed_head = -1, packed_key = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t q_block = task % plan.q_blocks;
    const int64_t head = task / plan.q_blocks % p.heads;
    const int64_t problem = task / plan.q_blocks / p.heads;
    if (problem != packed_problem) locate(p, problem / windows, problem % windows, s.tokens);
    if (problem != packed_problem || head != packed_head) packed_key = -1;
    packed_problem = problem;
    packed_head = head;

    float* lse = p.lse + (problem * p.heads + head) * p.nq;
    const int64_t q_end = smaller((q_block + 1) * plan.q_block_rows, p.nq);
    int64_t rows = 0;
    for (int64_t query = q_block * plan.q_block_rows; query < q_end; ++query) {
      lse[query] = 0.0f;
      if (is_real(p, s.tokens, query)) s.query[rows++] = query;
    }
    for (int64_t key = 0; rows > 0 && key < p.nk; key += plan.key_block) {
      const int64_t keys = smaller(plan.key_block, p.nk - key);
      if (packed_key != key) {
        Engine::pack_keys(p, s, head, key, keys);
        std::memcpy(s.lone_key, s.rows + (keys - 1) * s.row_ld, sizeof(float) * s.row_ld);
        Engine::pack_values(p, s, head, key, keys);
        packed_key = key;
      }
      for (int64_t r = 0; r < rows; r += s.block_rows) {
        forward_block<Engine>(p, s, head, r, smaller(s.block_rows, rows - r), key, keys);
      }
    }
    write_results<T>(p, s, head, rows, lse);
  }
}

}  // namespace
}  // namespace fastbb
