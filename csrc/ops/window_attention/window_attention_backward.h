// SPDX-License-Identifier: Apache-2.0
// Backward pass. A group walks the windows of a chunk for one head and one split of the queries:
//
//   P = exp(scale Q K^T + terms - lse)      recomputed, never stored whole
//   dV = P^T dO                             dP = dO V^T
//   dS = P (dP - rowsum(P dP))              dQ = scale dS K        dK = scale dS^T Q
//
// in blocks of up to 64 queries, all in float32, with packed operands and the forward's register
// tiles: five products of 2 N^2 d flops each against the forward's two.
//
// Sums over windows (bias table, scale, pads, shared queries) and over query splits (dK, dV) go to
// a partial buffer per group; `reduce` adds the parts in a fixed order. The result therefore does
// not depend on threads. No atomics, no N x N x windows buffer.
#pragma once

#include "ops/window_attention/window_attention_forward.h"

namespace fastbb {
namespace {

struct BackwardScratch {
  Tokens tokens;
  float *keys, *keys_t;      // [keys, ld], [ld, key_ld]
  float *values, *values_t;  // likewise
  float *dkeys, *dvalues;    // [keys, ld]
  float* key_inverse;        // [keys] 1 / |k|
  float *queries, *dout;     // [block rows, ld]
  float *weights, *dlogits;  // [block rows, key_ld] P and dS (first dP)
  float* dq;                 // [block rows, ld]
  float* dq_shared;          // [q_split_rows, ld]
  float* bias;               // [bias_ld]
  float* dbias;          // [q_split_rows, key_ld] sum of dS over the windows of a group, or null
  float* query_inverse;  // [block rows] 1 / |q|
  VecF *total, *along;   // [block rows] row sums of P and of P dP, by lane
  // [block rows]; the lone key's column of P and dS, see the forward pass
  float *normaliser, *delta, *lone_weight, *lone_dlogit;
  int64_t* query;  // [block rows]
  int64_t key_ld, ld, block_rows;
};

// Rows of P and dS kept at once: 64 up to 512 keys, then fewer to stay in the L2 cache.
inline int64_t backward_block_rows(int64_t nk) {
  return larger(smaller(64, 64 * 512 / larger(nk, 1)), kTileRows);
}

// Whether dS is summed over the windows of a group before it is collapsed to the table: where there
// are several and the sum stays in the L1 cache. Neighbouring queries collapse onto overlapping
// table entries, whose stores the next loads must wait for.
inline bool sums_bias_gradient(const WindowAttentionParams& p, const WindowAttentionPlan& plan) {
  constexpr int64_t kFloats = 4096;
  return p.grad.partial_table != nullptr && (plan.windows_per_chunk > 1 || plan.merge_images) &&
         plan.q_split_rows * round_up(p.nk, kLanes) <= kFloats;
}

inline int64_t carve_backward(const WindowAttentionParams& p, const WindowAttentionPlan& plan,
                              void* base, BackwardScratch& s) {
  s.key_ld = round_up(p.nk, kLanes);
  s.ld = round_up(p.head_dim, kLanes);
  s.block_rows = backward_block_rows(p.nk);
  Carver carver(base);
  s.tokens.keys = carver.take<Token>(p.full ? 0 : p.nk);
  s.tokens.region = carver.take<int32_t>(p.full ? 0 : s.key_ld + kLanes);
  for (float** rows : {&s.keys, &s.keys_t, &s.values, &s.values_t, &s.dkeys, &s.dvalues}) {
    *rows = carver.take<float>(s.key_ld * s.ld);
  }
  s.key_inverse = carver.take<float>(s.key_ld);
  for (float** rows : {&s.queries, &s.dout, &s.dq}) {
    *rows = carver.take<float>(s.block_rows * s.ld);
  }
  for (float** rows : {&s.weights, &s.dlogits}) {
    *rows = carver.take<float>(s.block_rows * s.key_ld);
  }
  s.dq_shared = carver.take<float>(p.q_shared ? plan.q_split_rows * s.ld : 0);
  s.bias = carver.take<float>(s.key_ld + kLanes);
  const bool sums_dbias = sums_bias_gradient(p, plan);
  s.dbias = carver.take<float>(sums_dbias ? plan.q_split_rows * s.key_ld : 0);
  if (!sums_dbias) s.dbias = nullptr;
  s.query_inverse = carver.take<float>(s.block_rows);
  const int64_t rows = round_up(s.block_rows, kLanes);
  for (VecF** lanes : {&s.total, &s.along}) *lanes = carver.take<VecF>(rows);
  for (float** values : {&s.normaliser, &s.delta, &s.lone_weight, &s.lone_dlogit}) {
    *values = carver.take<float>(rows);
  }
  s.query = carver.take<int64_t>(s.block_rows);
  return carver.used();
}

// One unit of work and its slices of the partial buffers.
struct BackwardGroup {
  int64_t head, split, chunk, index;  // index: among the groups of a head
  int64_t first_query, last_query;
  float *table, *scale, *pads;
};

template <class T>
void pack_problem(const WindowAttentionParams& p, BackwardScratch& s, int64_t head) {
  const int64_t columns = key_columns(p.nk);
  pack_rows<T>(p, s.tokens, p.k, p.k_pad, head, 0, p.nk, columns, s.ld, next_window(p, p.k),
               s.keys);
  pack_rows<T>(p, s.tokens, p.v, p.v_pad, head, 0, p.nk, columns, s.ld, next_window(p, p.v),
               s.values);
  if (p.qk_l2norm) {
    for (int64_t j = 0; j < p.nk; ++j) s.key_inverse[j] = normalise_row(s.keys + j * s.ld, s.ld);
  }
  transpose_rows(s.keys, columns, s.ld, s.ld, s.keys_t, s.key_ld);
  transpose_rows(s.values, columns, s.ld, s.ld, s.values_t, s.key_ld);
  std::memset(s.dkeys, 0, sizeof(float) * static_cast<size_t>(s.key_ld * s.ld));
  std::memset(s.dvalues, 0, sizeof(float) * static_cast<size_t>(s.key_ld * s.ld));
}

// Raw products -> exp(logit - lse), in place; sums by lane of these weights and of weights * dP.
FASTBB_INLINE void exponentiate_logits(float* weights, const float* dlogits, int64_t keys,
                                       const LogitTerms& terms, float lse, VecF& total,
                                       VecF& along) {
  const int64_t whole = keys / kLanes * kLanes;
  const int rest = static_cast<int>(keys - whole);
  total = along = VecF{};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const VecF w = exp(apply_terms<false>(load(weights + j), terms, j, kLanes) - lse);
    store(weights + j, w);
    along += w * load(dlogits + j);
    total += w;
  }
  if (rest != 0) {
    const VecF x = apply_terms<true>(load(weights + whole), terms, whole, rest) - lse;
    const VecF w = first_lanes(rest) ? exp(x) : VecF{};
    store(weights + whole, w);
    along += w * load(dlogits + whole);
    total += w;
  }
}

// Raw products and dP of a block -> P and dS, in place. rowsum(P dP) equals rowsum(dO O) but needs
// no O, and does not inherit the rounding of a half-precision one. P is normalised again:
// exp(x - lse) carries lse's rounding error, which would not cancel in dP - rowsum(P dP).
inline void differentiate_block(const WindowAttentionParams& p, const BackwardScratch& s,
                                int64_t head, int64_t rows, const float* lse) {
  const int64_t in_vectors = keys_in_vectors(p.nk);
  const int64_t columns = key_columns(p.nk);
  const bool has_lone = in_vectors < p.nk;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = s.query[r];
    if (expands_rows(p)) expand_bias_row(p, head, query, 0, p.nk, s.bias);
    const auto terms = logit_terms(p, s.tokens, head, query, 0, expands_rows(p) ? s.bias : nullptr);
    exponentiate_logits(s.weights + r * s.key_ld, s.dlogits + r * s.key_ld, in_vectors, terms,
                        lse[query], s.total[r], s.along[r]);
    if (has_lone) s.lone_weight[r] = lone_logit(s.lone_weight[r], terms, in_vectors) - lse[query];
  }
  const auto add = [](VecF a, VecF b) { return a + b; };
  for (int64_t g = 0; g < rows; g += kLanes) {
    VecF lone{}, lone_dlogit{};
    if (has_lone) {
      lone = exp(load(s.lone_weight + g));
      lone_dlogit = load(s.lone_dlogit + g);
    }
    const VecF normaliser = 1.0f / (reduce_rows(s.total + g, add) + lone);
    const VecF delta = (reduce_rows(s.along + g, add) + lone * lone_dlogit) * normaliser;
    store(s.normaliser + g, normaliser);
    store(s.delta + g, delta);
    store(s.lone_weight + g, lone * normaliser);
    store(s.lone_dlogit + g, lone * normaliser * (lone_dlogit - delta));
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* weights = s.weights + r * s.key_ld;
    float* dlogits = s.dlogits + r * s.key_ld;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const VecF w = load(weights + j) * s.normaliser[r];
      store(weights + j, w);
      store(dlogits + j, w * (load(dlogits + j) - s.delta[r]));
    }
    if (has_lone) {
      VecF weight{}, dlogit{};
      weight[0] = s.lone_weight[r];
      dlogit[0] = s.lone_dlogit[r];
      store(weights + in_vectors, weight);
      store(dlogits + in_vectors, dlogit);
    }
  }
}

// Adds dS of a block to the gradients of the bias.
inline void add_bias_gradient(const WindowAttentionParams& p, const BackwardScratch& s,
                              const BackwardGroup& group, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = s.query[r];
    const float* dlogits = s.dlogits + r * s.key_ld;
    if (s.dbias != nullptr) {
      add_row(s.dbias + (query - group.first_query) * s.key_ld, dlogits, s.key_ld);
    } else if (group.table != nullptr) {
      collapse_bias_row(p, query, dlogits, group.table);
    }
    if (p.grad.dbias != nullptr) {
      float* dbias = p.grad.dbias + (group.head * p.nq + query) * p.nk;
      for (int64_t j = 0; j < p.nk; ++j) dbias[j] += dlogits[j];
    }
  }
}

// Queries s.query[0 .. rows) of the located problem.
template <class T>
void backward_block(const WindowAttentionParams& p, BackwardScratch& s, const BackwardGroup& group,
                    int64_t rows) {
  const WindowAttentionGradients& g = p.grad;
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  const int64_t problem = s.tokens.image * windows + s.tokens.window;
  const float* lse = p.lse + (problem * p.heads + group.head) * p.nq;
  for (int64_t r = 0; r < rows; ++r) {
    float* query = s.queries + r * s.ld;
    float* dout = s.dout + r * s.ld;
    const T* from = query_at<const T>(p, s.tokens, p.q, group.head, s.query[r]);
    prefetch_row(p, from, next_window(p, p.q));
    load_row(from, p.head_dim, s.ld, query);
    if (p.qk_l2norm) s.query_inverse[r] = normalise_row(query, s.ld);
    from = token_at<const T>(p, s.tokens, g.grad_out, group.head, s.query[r]);
    prefetch_row(p, from, next_window(p, g.grad_out));
    load_row(from, p.head_dim, s.ld, dout);
  }

  // P and dS
  const int64_t in_vectors = keys_in_vectors(p.nk);
  const int64_t key_vecs = key_columns(p.nk) / kLanes;
  const int64_t vecs = s.ld / kLanes;
  multiply<DotF32>(
      rows, key_vecs,
      {p.head_dim, s.queries, s.ld, 1, s.keys_t, s.key_ld, s.weights, s.key_ld, false});
  multiply<DotF32>(rows, key_vecs,
                   {p.head_dim, s.dout, s.ld, 1, s.values_t, s.key_ld, s.dlogits, s.key_ld, false});
  if (in_vectors < p.nk) {
    for (int64_t r = 0; r < rows; ++r) {
      s.lone_weight[r] = dot_rows(s.queries + r * s.ld, s.keys + in_vectors * s.ld, s.ld);
      s.lone_dlogit[r] = dot_rows(s.dout + r * s.ld, s.values + in_vectors * s.ld, s.ld);
    }
  }
  differentiate_block(p, s, group.head, rows, lse);
  add_bias_gradient(p, s, group, rows);

  multiply<DotF32>(p.nk, vecs, {rows, s.weights, 1, s.key_ld, s.dout, s.ld, s.dvalues, s.ld, true});
  multiply<DotF32>(p.nk, vecs,
                   {rows, s.dlogits, 1, s.key_ld, s.queries, s.ld, s.dkeys, s.ld, true});
  multiply<DotF32>(rows, vecs, {p.nk, s.dlogits, s.key_ld, 1, s.keys, s.ld, s.dq, s.ld, false});
  const float scale = scale_of(p, group.head);
  for (int64_t r = 0; r < rows; ++r) {
    float* dq = s.dq + r * s.ld;
    const float* query = s.queries + r * s.ld;
    if (group.scale != nullptr) *group.scale += dot_rows(query, dq, s.ld);
    if (p.qk_l2norm) normalise_row_backward(dq, query, s.query_inverse[r], s.ld);
    if (p.q_shared) {
      scale_row(dq, scale, s.ld);
      add_row(s.dq_shared + (s.query[r] - group.first_query) * s.ld, dq, s.ld);
    } else {
      store_row(dq, p.head_dim, scale, query_at<T>(p, s.tokens, g.dq, group.head, s.query[r]));
    }
  }
}

// dK and dV of the located problem: to the map, to the pads, or to this split's partial buffer.
template <class T>
void finish_keys(const WindowAttentionParams& p, const WindowAttentionPlan& plan,
                 BackwardScratch& s, const BackwardGroup& group) {
  const WindowAttentionGradients& g = p.grad;
  const int64_t d = p.head_dim;
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  const int64_t problem = s.tokens.image * windows + s.tokens.window;
  const float scale = scale_of(p, group.head);
  float* partial = nullptr;
  if (plan.q_splits > 1) {
    partial = g.partial_dkv +
              ((problem * plan.q_splits + group.split) * p.heads + group.head) * 2 * p.nk * d;
  }
  for (int64_t j = 0; j < p.nk; ++j) {
    float* dk = s.dkeys + j * s.ld;
    const float* dv = s.dvalues + j * s.ld;
    if (p.qk_l2norm) normalise_row_backward(dk, s.keys + j * s.ld, s.key_inverse[j], s.ld);
    if (!is_real(p, s.tokens, j)) {
      if (group.pads == nullptr) continue;
      for (int64_t c = 0; c < d; ++c) group.pads[c] += dk[c] * scale;
      for (int64_t c = 0; c < d; ++c) group.pads[d + c] += dv[c];
    } else if (partial != nullptr) {
      store_row(dk, d, scale, partial + j * d);
      store_row(dv, d, 1.0f, partial + (p.nk + j) * d);
    } else {
      store_row(dk, d, scale, token_at<T>(p, s.tokens, g.dk, group.head, j));
      store_row(dv, d, 1.0f, token_at<T>(p, s.tokens, g.dv, group.head, j));
    }
  }
}

// The shared queries' gradient over the windows seen: to the result, or to the chunk's partial.
template <class T>
void finish_shared_queries(const WindowAttentionParams& p, const WindowAttentionPlan& plan,
                           const BackwardScratch& s, const BackwardGroup& group) {
  const int64_t d = p.head_dim;
  for (int64_t query = group.first_query; query < group.last_query; ++query) {
    const float* dq = s.dq_shared + (query - group.first_query) * s.ld;
    if (plan.partial_dq > 0) {
      store_row(dq, d, 1.0f,
                p.grad.partial_dq + ((group.chunk * p.heads + group.head) * p.nq + query) * d);
    } else {
      store_row(dq, d, 1.0f, query_at<T>(p, s.tokens, p.grad.dq, group.head, query));
    }
  }
}

template <class T>
void backward_group(const WindowAttentionParams& p, const WindowAttentionPlan& plan,
                    BackwardScratch& s, const BackwardGroup& group) {
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  const int64_t first_image = plan.merge_images ? 0 : group.chunk / plan.chunks;
  const int64_t last_image = plan.merge_images ? p.batch : first_image + 1;
  const int64_t first = plan.merge_images ? 0 : group.chunk % plan.chunks * plan.windows_per_chunk;
  const int64_t last = smaller(first + plan.windows_per_chunk, windows);
  const int64_t queries = group.last_query - group.first_query;
  if (s.dbias != nullptr) {
    std::memset(s.dbias, 0, sizeof(float) * static_cast<size_t>(queries * s.key_ld));
  }
  for (int64_t image = first_image; image < last_image; ++image) {
    if (p.q_shared) {
      std::memset(s.dq_shared, 0, sizeof(float) * static_cast<size_t>(plan.q_split_rows * s.ld));
    }
    for (int64_t window = first; window < last; ++window) {
      locate(p, image, window, s.tokens);
      pack_problem<T>(p, s, group.head);
      for (int64_t query = group.first_query; query < group.last_query;) {
        int64_t rows = 0;
        for (; query < group.last_query && rows < s.block_rows; ++query) {
          if (is_real(p, s.tokens, query)) s.query[rows++] = query;
        }
        if (rows > 0) backward_block<T>(p, s, group, rows);
      }
      finish_keys<T>(p, plan, s, group);
    }
    if (p.q_shared) finish_shared_queries<T>(p, plan, s, group);
  }
  for (int64_t i = 0; s.dbias != nullptr && i < queries; ++i) {
    collapse_bias_row(p, group.first_query + i, s.dbias + i * s.key_ld, group.table);
  }
}

// This group's slice of a partial buffer [groups per head, h, size], zeroed; null stays null.
inline float* zeroed_slice(float* partial, const WindowAttentionParams& p, int64_t index,
                           int64_t head, int64_t size) {
  if (partial == nullptr) return nullptr;
  float* slice = partial + (index * p.heads + head) * size;
  std::memset(slice, 0, sizeof(float) * static_cast<size_t>(size));
  return slice;
}

inline int64_t table_size(const WindowAttentionParams& p) {
  return int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1);
}

template <class T>
void backward_tasks(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
                    int64_t end) {
  BackwardScratch s;
  const int64_t bytes = carve_backward(p, plan, nullptr, s);
  carve_backward(p, plan, thread_scratch(static_cast<size_t>(bytes)), s);
  for (int64_t task = begin; task < end; ++task) {
    BackwardGroup group;
    group.split = task % plan.q_splits;
    group.head = task / plan.q_splits % p.heads;
    group.chunk = task / plan.q_splits / p.heads;
    group.index = group.chunk * plan.q_splits + group.split;
    group.first_query = group.split * plan.q_split_rows;
    group.last_query = smaller(group.first_query + plan.q_split_rows, p.nq);
    group.table = zeroed_slice(p.grad.partial_table, p, group.index, group.head, table_size(p));
    group.scale = zeroed_slice(p.grad.partial_scale, p, group.index, group.head, 1);
    group.pads = zeroed_slice(p.grad.partial_pads, p, group.index, group.head, 2 * p.head_dim);
    backward_group<T>(p, plan, s, group);
  }
}

// to[i] = sum over parts of from[part * stride + i], in order.
inline void sum_parts(const float* from, int64_t parts, int64_t stride, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = 0.0f;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[part * stride + i];
  }
}

// Sums that belong to one head: bias table, scale, pads.
inline void reduce_head(const WindowAttentionParams& p, const WindowAttentionPlan& plan,
                        int64_t head) {
  const WindowAttentionGradients& g = p.grad;
  const int64_t d = p.head_dim;
  const int64_t parts = plan.groups_per_head;
  if (g.partial_table != nullptr) {
    // The table's columns are heads and its rows run the other way round on both axes.
    const int64_t size = table_size(p);
    for (int64_t i = 0; i < size; ++i) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) {
        sum += g.partial_table[(part * p.heads + head) * size + size - 1 - i];
      }
      g.dtable[i * p.heads + head] = sum;
    }
  }
  if (g.partial_scale != nullptr) {
    sum_parts(g.partial_scale + head, parts, p.heads, 1, g.dscale + head);
  }
  if (g.partial_pads != nullptr) {
    const float* pads = g.partial_pads + head * 2 * d;
    if (g.dk_pad != nullptr) sum_parts(pads, parts, p.heads * 2 * d, d, g.dk_pad + head * d);
    if (g.dv_pad != nullptr) sum_parts(pads + d, parts, p.heads * 2 * d, d, g.dv_pad + head * d);
  }
}

// Sums that belong to one image and head: shared queries over chunks, keys over query splits.
template <class T>
void reduce_tasks(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
                  int64_t end) {
  const WindowAttentionGradients& g = p.grad;
  const int64_t d = p.head_dim;
  const int64_t ld = round_up(d, kLanes);
  const int64_t windows = p.full ? 1 : int64_t{p.windows_y} * p.windows_x;
  Carver carver(thread_scratch(static_cast<size_t>(round_up(ld * 4, 64) + round_up(p.nk * 8, 64) +
                                                   round_up((p.nk + 2 * kLanes) * 4, 64))));
  float* sum = carver.take<float>(ld);
  Tokens tokens;
  tokens.keys = p.full ? nullptr : carver.take<Token>(p.nk);
  tokens.region = p.full ? nullptr : carver.take<int32_t>(p.nk + 2 * kLanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.heads, head = task % p.heads;
    if (image == 0) reduce_head(p, plan, head);
    if (plan.partial_dq > 0) {
      tokens.image = image;
      const int64_t stride = p.heads * p.nq * d;
      for (int64_t query = 0; query < p.nq; ++query) {
        const int64_t at = ((image * plan.chunks * p.heads + head) * p.nq + query) * d;
        sum_parts(g.partial_dq + at, plan.chunks, stride, d, sum);
        store_row(sum, d, 1.0f, query_at<T>(p, tokens, g.dq, head, query));
      }
    }
    if (plan.partial_dkv == 0) continue;
    const int64_t stride = p.heads * 2 * p.nk * d;
    for (int64_t window = 0; window < windows; ++window) {
      locate(p, image, window, tokens);
      const int64_t problem = image * windows + window;
      const float* from = g.partial_dkv + (problem * plan.q_splits * p.heads + head) * 2 * p.nk * d;
      for (int64_t j = 0; j < p.nk; ++j) {
        if (!is_real(p, tokens, j)) continue;
        sum_parts(from + j * d, plan.q_splits, stride, d, sum);
        store_row(sum, d, 1.0f, token_at<T>(p, tokens, g.dk, head, j));
        sum_parts(from + (p.nk + j) * d, plan.q_splits, stride, d, sum);
        store_row(sum, d, 1.0f, token_at<T>(p, tokens, g.dv, head, j));
      }
    }
  }
}

}  // namespace
}  // namespace fastbb
