// SPDX-License-Identifier: Apache-2.0
// The way from tokens of windows to rows of the strided map: addresses, asynchronous loads, and
// what is added to logits.
#pragma once

#include "ops/window_attention/window_attention_cuda_math.cuh"

namespace fastbb {
namespace cuda {

// What the threads of a block agree on: a head, and problems up to `behind`.
struct Task {
  int64_t head, behind;
  float scale;
  float inverse_w;     // 1 / window_w
  const float* table;  // of the head, in shared memory, or null
};

// A window of an image, or an image.
struct Problem {
  int64_t index, image;
  int window;     // of its image
  int top, left;  // first row and column on the rolled, padded map
  bool last_row, last_column;
};

__device__ __forceinline__ Problem problem_at(const WindowAttentionParams& p, int64_t index) {
  Problem problem{index, index, 0, 0, 0, false, false};
  if (p.full) return problem;
  const int windows = p.windows_y * p.windows_x;
  problem.image = index / windows;
  problem.window = static_cast<int>(index - problem.image * windows);
  const int y = problem.window / p.windows_x;
  const int x = problem.window - y * p.windows_x;
  problem.top = y * p.window_h;
  problem.left = x * p.window_w;
  problem.last_row = y == p.windows_y - 1;
  problem.last_column = x == p.windows_x - 1;
  return problem;
}

// Row and column of a token in its window. The quotient is exact: of up to 65536 + 63 tokens, the
// nearest to a border is half a token away, 1 / (2 window_w), and the product errs by 2^-23 of it.
struct Slot {
  int row, column;
};

__device__ __forceinline__ Slot slot_of(const WindowAttentionParams& p, float inverse_w,
                                        int token) {
  const int row = static_cast<int>((static_cast<float>(token) + 0.5f) * inverse_w);
  return {row, token - row * p.window_w};
}

// Side of the shift boundary on both axes.
__device__ __forceinline__ int region_of(const WindowAttentionParams& p, const Problem& problem,
                                         Slot slot) {
  const bool below = problem.last_row && slot.row >= p.window_h - p.shift_h;
  const bool right = problem.last_column && slot.column >= p.window_w - p.shift_w;
  return 2 * below + right;
}

// Where a token lies on the map; y < 0 for padding. A list of tokens is a map of one row.
struct Place {
  int y, x;
};

// One axis: coordinate after the roll -> coordinate on the map, or -1.
__device__ __forceinline__ int place_on_axis(bool roll_first, int rolled, int roll, int map,
                                             int padded) {
  if (roll_first && rolled >= map) return -1;
  const int length = roll_first ? map : padded;
  int at = rolled + roll;
  if (at >= length) at -= length;
  return at < map ? at : -1;
}

__device__ __forceinline__ Place place_of(const WindowAttentionParams& p,
                                          const WindowAttentionCudaRows& plan,
                                          const Problem& problem, float inverse_w, int token) {
  if (p.full) return {0, token};
  const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
  const Slot slot = slot_of(p, inverse_w, token);
  const int y = place_on_axis(roll_first, problem.top + slot.row, plan.roll_h, p.map_h,
                              p.windows_y * p.window_h);
  const int x = place_on_axis(roll_first, problem.left + slot.column, plan.roll_w, p.map_w,
                              p.windows_x * p.window_w);
  return x < 0 ? Place{-1, 0} : Place{y, x};
}

// The first channel of a token's head; the place must be real.
template <class T>
__device__ __forceinline__ T* row_at(const TokenMap& map, int64_t image, int64_t head,
                                     Place place) {
  return static_cast<T*>(map.data) + image * map.image + head * map.head + place.y * map.row +
         place.x * map.column;
}

// Asks for one chunk of 16 bytes of a row: `from` is the row, or null for zeros, or for `pad`,
// which are the float32 channels of a padded token. Channels from `count` on become zeros.
template <class Math>
__device__ __forceinline__ void load_chunk(const typename Math::Element* from, const float* pad,
                                           int c, int count, bool aligned,
                                           typename Math::Element* to) {
  using Element = typename Math::Element;
  if (aligned && (from != nullptr || pad == nullptr || c >= count)) {
    const bool valid = from != nullptr && c < count;
    ptx::cp_async16(ptx::shared_address(to), valid ? from + c : nullptr, valid);
    return;
  }
#pragma unroll
  for (int e = 0; e < Math::kChunk; ++e) {
    Element value = Math::narrow(0.0f);
    if (c + e < count) {
      if (from != nullptr) {
        value = from[c + e];
      } else if (pad != nullptr) {
        value = Math::narrow(pad[c + e]);
      }
    }
    to[e] = value;
  }
}

// 1 / max(|row|, eps) of kRows rows in shared memory, a power of two of threads for each.
template <class Math, int kRows, int kLd>
__device__ __forceinline__ void inverse_lengths(const typename Math::Element (*rows)[kLd],
                                                float* inverse) {
  constexpr int kPerRow = kThreads / kRows;
  const int row = threadIdx.x / kPerRow;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = threadIdx.x % kPerRow; c < kLd - Math::kChunk; c += kPerRow) {
    const float x = Math::widen(rows[row][c]);
    sum += x * x;
  }
  sum = ptx::lanes_sum<kPerRow>(sum);
  if (threadIdx.x % kPerRow == 0) inverse[row] = 1.0f / fmaxf(sqrtf(sum), kL2NormEps);
}

// How many of a block's rows belong to one of kPack problems side by side, and the problem and
// token of a row where `first` is the first of these problems.
template <int kRows, int kPack>
struct Side {
  static constexpr int kEach = kRows / kPack;
  static __device__ int64_t problem(int64_t first, int row) {
    return first + (kPack == 1 ? 0 : row / kEach);
  }
  static __device__ int64_t token(int64_t first, int row) {
    return first + (kPack == 1 ? row : row % kEach);
  }
};

// Queries of the problems from `first` on and, for the backward pass, the gradients of their
// results.
template <class Math, int kDim, int kRows, int kPack, bool kGradients>
__device__ __forceinline__ void load_queries(const WindowAttentionParams& p,
                                             const WindowAttentionCudaRows& plan, const Task& task,
                                             int64_t first, int64_t first_query,
                                             typename Math::Element (*q)[kDim + Math::kChunk],
                                             typename Math::Element (*grad)[kDim + Math::kChunk]) {
  using Element = typename Math::Element;
  constexpr int kChunks = kDim / Math::kChunk;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int c = i % kChunks * Math::kChunk;
    const int64_t index = Side<kRows, kPack>::problem(first, row);
    const int64_t token = Side<kRows, kPack>::token(first_query, row);
    const Element* from = nullptr;
    const Element* grad_from = nullptr;
    if (index < task.behind && token < p.nq) {
      const Problem problem = problem_at(p, index);
      const int at = static_cast<int>(token);
      const Place place =
          kGradients || !p.q_shared ? place_of(p, plan, problem, task.inverse_w, at) : Place{0, at};
      if (p.q_shared) {
        from = row_at<const Element>(p.q, problem.image, task.head, {0, at});
      } else if (place.y >= 0) {
        from = row_at<const Element>(p.q, problem.image, task.head, place);
      }
      if (kGradients && place.y >= 0) {
        grad_from = row_at<const Element>(p.grad.grad_out, problem.image, task.head, place);
      }
    }
    load_chunk<Math>(from, nullptr, c, p.head_dim, plan.aligned, &q[row][c]);
    if constexpr (kGradients) {
      load_chunk<Math>(grad_from, nullptr, c, p.head_dim, plan.aligned, &grad[row][c]);
    }
  }
}

// Keys and values of the problems from `first` on.
template <class Math, int kDim, int kRows, int kPack>
__device__ __forceinline__ void load_keys(const WindowAttentionParams& p,
                                          const WindowAttentionCudaRows& plan, const Task& task,
                                          int64_t first, int64_t first_key,
                                          typename Math::Element (*k_rows)[kDim + Math::kChunk],
                                          typename Math::Element (*v_rows)[kDim + Math::kChunk]) {
  using Element = typename Math::Element;
  constexpr int kChunks = kDim / Math::kChunk;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int c = i % kChunks * Math::kChunk;
    const int64_t index = Side<kRows, kPack>::problem(first, row);
    const int64_t token = Side<kRows, kPack>::token(first_key, row);
    const Element* k = nullptr;
    const Element* v = nullptr;
    const float* k_pad = nullptr;
    const float* v_pad = nullptr;
    if (index < task.behind && token < p.nk) {
      const Problem problem = problem_at(p, index);
      const Place place = place_of(p, plan, problem, task.inverse_w, static_cast<int>(token));
      if (place.y >= 0) {
        k = row_at<const Element>(p.k, problem.image, task.head, place);
        v = row_at<const Element>(p.v, problem.image, task.head, place);
      } else {
        if (p.k_pad != nullptr) k_pad = p.k_pad + task.head * p.head_dim;
        if (p.v_pad != nullptr) v_pad = p.v_pad + task.head * p.head_dim;
      }
    }
    load_chunk<Math>(k, k_pad, c, p.head_dim, plan.aligned, &k_rows[row][c]);
    load_chunk<Math>(v, v_pad, c, p.head_dim, plan.aligned, &v_rows[row][c]);
  }
}

// Two elements of a row on the map, or those of them that the head has.
template <class Math>
__device__ __forceinline__ void write_pair(typename Math::Element* row, int c, int count,
                                           bool aligned, float low, float high) {
  if (aligned) {
    if (c < count) Math::store_pair(row + c, low, high);
    return;
  }
  if (c < count) row[c] = Math::narrow(low);
  if (c + 1 < count) row[c + 1] = Math::narrow(high);
}

// The bias table of a head, flipped on both axes, so that a query and a key add their terms.
__device__ __forceinline__ void load_table(const WindowAttentionParams& p, int64_t head,
                                           float* table) {
  const int size = (2 * p.window_h - 1) * (2 * p.window_w - 1);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    table[i] = p.table[int64_t{size - 1 - i} * p.heads + head];
  }
}

// Loads the head's table where it fits; a barrier must follow.
__device__ __forceinline__ Task task_of(const WindowAttentionParams& p,
                                        const WindowAttentionCudaRows& plan, int64_t head,
                                        int64_t behind, float* table) {
  if (plan.table_shared) load_table(p, head, table);
  return {head, behind, p.scale_per_head != nullptr ? p.scale_per_head[head] : p.scale,
          p.full ? 0.0f : 1.0f / static_cast<float>(p.window_w),
          plan.table_shared ? table : nullptr};
}

// A token, or the last one.
__device__ __forceinline__ int64_t clamped(int64_t token, int64_t tokens) {
  return token < tokens ? token : tokens - 1;
}

// What a query and a key of the windowed domain contribute to their pair's index in the flipped
// table: the pair has the sum. From bit 24 on, the token's side of the shift boundary. Beyond the
// last token: the last one's.
constexpr int kRegionBit = 24;

__device__ __forceinline__ int query_term(const WindowAttentionParams& p, const Problem& problem,
                                          float inverse_w, int64_t token) {
  if (p.full) return 0;
  const Slot slot = slot_of(p, inverse_w, static_cast<int>(clamped(token, p.nq)));
  const int row = p.window_h - 1 - slot.row;
  const int column = p.window_w - 1 - slot.column;
  return row * (2 * p.window_w - 1) + column + (region_of(p, problem, slot) << kRegionBit);
}

__device__ __forceinline__ int key_term(const WindowAttentionParams& p, const Problem& problem,
                                        float inverse_w, int64_t token) {
  if (p.full) return 0;
  const Slot slot = slot_of(p, inverse_w, static_cast<int>(clamped(token, p.nk)));
  const int index = slot.row * (2 * p.window_w - 1) + slot.column;
  return index + (region_of(p, problem, slot) << kRegionBit);
}

// The matrices [Nq, Nk] that are added to a problem's logits, or null.
struct Matrices {
  const float* bias;
  const float* mask;
};

__device__ __forceinline__ Matrices matrices_of(const WindowAttentionParams& p, const Task& task,
                                                const Problem& problem) {
  Matrices to{nullptr, nullptr};
  if (p.bias != nullptr) to.bias = p.bias + task.head * p.nq * p.bias_ld;
  if (p.mask != nullptr) {
    const int64_t mask = (p.full ? problem.image : problem.window) % p.mask_count;
    to.mask = p.mask + mask * p.nq * p.nk;
  }
  return to;
}

// Calls f(x, i, column) for a thread's elements of 16 rows of accumulators: i tells its two rows
// apart.
template <int kTiles, class F>
__device__ __forceinline__ void each_pair(float (&x)[kTiles][4], const F& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(x[n][e], e / 2, n * 8 + threadIdx.x % 4 * 2 + e % 2);
  }
}

// A query and a key: their tokens, or their terms.
template <class T>
struct Pair {
  T query, key;
};

// Adds table, shift mask, bias and mask to scaled products. terms(i, column) and tokens(i, column)
// describe a pair; exists(i, column) tells whether it is one, terms are of real tokens anyway.
template <int kTiles, class Terms, class Tokens, class Exists>
__device__ __forceinline__ void add_terms(const WindowAttentionParams& p, const Task& task,
                                          const Matrices& matrices, float (&logits)[kTiles][4],
                                          const Terms& terms, const Tokens& tokens,
                                          const Exists& exists) {
  constexpr int kIndex = (1 << kRegionBit) - 1;
  if (task.table != nullptr) {
    each_pair(logits, [&](float& x, int i, int column) {
      const Pair<int> pair = terms(i, column);
      x += task.table[(pair.query & kIndex) + (pair.key & kIndex)];
    });
  } else if (p.table != nullptr) {
    const int64_t last = int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1) - 1;
    each_pair(logits, [&](float& x, int i, int column) {
      const Pair<int> pair = terms(i, column);
      const int at = (pair.query & kIndex) + (pair.key & kIndex);
      x += p.table[(last - at) * p.heads + task.head];
    });
  }
  if (p.swin_mask) {
    each_pair(logits, [&](float& x, int i, int column) {
      const Pair<int> pair = terms(i, column);
      if (pair.query >> kRegionBit != pair.key >> kRegionBit) x += p.swin_mask_value;
    });
  }
  if (matrices.bias != nullptr) {
    each_pair(logits, [&](float& x, int i, int column) {
      const Pair<int64_t> pair = tokens(i, column);
      if (exists(i, column)) x += matrices.bias[pair.query * p.bias_ld + pair.key];
    });
  }
  if (matrices.mask != nullptr) {
    each_pair(logits, [&](float& x, int i, int column) {
      const Pair<int64_t> pair = tokens(i, column);
      if (exists(i, column)) x += matrices.mask[pair.query * p.nk + pair.key];
    });
  }
}

}  // namespace cuda
}  // namespace fastbb
