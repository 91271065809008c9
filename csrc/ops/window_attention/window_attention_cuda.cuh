// SPDX-License-Identifier: Apache-2.0
// Forward pass on tensor cores (sm_80 and later), float16 and bfloat16.
//
// A block of 4 warps takes 64 queries of one head of one problem, a warp 16 of them. Keys and
// values come in blocks of 64 through two stages of asynchronous copies, straight from the strided
// map: roll, padding and windows exist in the row addresses only. Logits stay in registers, with a
// running maximum and sum (one pass for windows of up to 64 tokens); the flipped bias table of the
// head lies in shared memory. L2-normalisation multiplies logits by 1 / |q| and 1 / |k|, so that
// nothing is rounded before the product.
//
// Rows in shared memory are kDim + 8 elements apart: eight of them start in eight different groups
// of four banks, as ldmatrix wants.
//
// On sm_80, for kDim 32, 64, 128: 126, 156, 186 registers, no spills; 26, 46, 88 KB of shared
// memory and the table; so 4, 3 and 1 blocks of an A100's multiprocessor at a time (registers
// twice, then shared memory). The second bound of __launch_bounds__ keeps ptxas from spilling for a
// fourth block. Bound, by arithmetic and not yet by measurement: memory. A window of 49 tokens with
// d = 32 moves 12.5 KB and needs 0.5 Mflop of padded products: 8 ns and 1.7 ns of an A100 (1.55
// TB/s, 312 TFLOP/s), 4 ns and 0.5 ns of an H100 (3.35 TB/s, 989 TFLOP/s).
#pragma once

#include "core/ptx.cuh"
#include "ops/window_attention/window_attention.h"

namespace fastbb {
namespace cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kQueries = 16 * kWarps;  // of a block
constexpr int kKeys = 64;              // of a stage
constexpr float kLog2E = 1.44269504088896341f;

struct HalfMath {
  using Element = __half;
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
  static __device__ Element narrow(float x) { return __float2half_rn(x); }
  static __device__ float widen(Element x) { return __half2float(x); }
};

struct Bf16Math {
  using Element = __nv_bfloat16;
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
  static __device__ Element narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ float widen(Element x) { return __bfloat162float(x); }
};

// Which problem a block works on.
struct Problem {
  int64_t image, index;
  int y, x;  // of the window
};

// One axis: coordinate after the roll -> coordinate on the map, or -1.
__device__ __forceinline__ int place(const WindowAttentionParams& p, int rolled, int shift, int map,
                                     int padded) {
  const bool roll_first = p.pad_mode == PadMode::kRollThenPad;
  if (roll_first && rolled >= map) return -1;
  const int length = roll_first ? map : padded;
  int at = rolled + shift;
  if (at >= length) at %= length;
  return at < map ? at : -1;
}

// Elements from the map's first to a token's, without image and head; -1 for padding.
__device__ __forceinline__ int64_t token_offset(const WindowAttentionParams& p, const TokenMap& map,
                                                const Problem& problem, int token) {
  if (p.full) return token * map.column;
  const int row = token / p.window_w;
  const int column = token - row * p.window_w;
  const int y =
      place(p, problem.y * p.window_h + row, p.shift_h, p.map_h, p.windows_y * p.window_h);
  const int x =
      place(p, problem.x * p.window_w + column, p.shift_w, p.map_w, p.windows_x * p.window_w);
  return y < 0 || x < 0 ? -1 : y * map.row + x * map.column;
}

// Side of the shift boundary on both axes.
__device__ __forceinline__ int region_of(const WindowAttentionParams& p, const Problem& problem,
                                         int token) {
  const int row = token / p.window_w;
  const int column = token - row * p.window_w;
  const bool below = problem.y == p.windows_y - 1 && row >= p.window_h - p.shift_h;
  const bool right = problem.x == p.windows_x - 1 && column >= p.window_w - p.shift_w;
  return 2 * below + right;
}

template <class Math, int kDim>
struct ForwardShared {
  static constexpr int kLd = kDim + 8;
  using Element = typename Math::Element;
  alignas(16) Element q[kQueries][kLd];
  alignas(16) Element k[2][kKeys][kLd];
  alignas(16) Element v[2][kKeys][kLd];
  float q_inverse[kQueries];
  float k_inverse[kKeys];
  int key_term[kKeys];  // the key's share of the table index; its region from bit 24 on
};

// Asks for rows [first, first + kRows) of a matrix of `count`; others become zeros, padded tokens
// take `pad`.
template <class Math, int kDim, int kRows, bool kAligned>
__device__ __forceinline__ void load_rows(const WindowAttentionParams& p, const TokenMap& map,
                                          const Problem& problem, bool listed, const float* pad,
                                          int64_t head, int64_t first, int64_t count,
                                          typename Math::Element (*to)[kDim + 8]) {
  using Element = typename Math::Element;
  constexpr int kChunks = kDim / 8;
  const Element* base =
      static_cast<const Element*>(map.data) + problem.image * map.image + head * map.head;
#pragma unroll(kAligned ? 4 : 1)
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int c = i % kChunks * 8;
    const int token = static_cast<int>(first) + row;
    const bool exists = token < count && c < p.head_dim;
    int64_t offset = -1;
    if (exists) offset = listed ? token * map.column : token_offset(p, map, problem, token);
    if (kAligned && (offset >= 0 || !exists || pad == nullptr)) {
      ptx::cp_async16(ptx::shared_address(&to[row][c]), base + (offset < 0 ? 0 : offset + c),
                      offset >= 0);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      Element value = Math::narrow(0.0f);
      if (exists && c + e < p.head_dim) {
        if (offset >= 0) {
          value = base[offset + c + e];
        } else if (pad != nullptr) {
          value = Math::narrow(pad[head * p.head_dim + c + e]);
        }
      }
      to[row][c + e] = value;
    }
  }
}

// 1 / max(|row|, eps) of rows in shared memory, two threads a row.
template <class Math, int kDim>
__device__ __forceinline__ void inverse_lengths(const typename Math::Element (*rows)[kDim + 8],
                                                float* inverse) {
  const int row = threadIdx.x / 2;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = threadIdx.x % 2; c < kDim; c += 2) {
    const float x = Math::widen(rows[row][c]);
    sum += x * x;
  }
  sum = ptx::lanes_sum<2>(sum);
  if (threadIdx.x % 2 == 0) inverse[row] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
}

template <class Math, int kDim, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    window_attention_forward(const WindowAttentionParams p, const int64_t q_blocks) {
  using Element = typename Math::Element;
  using Shared = ForwardShared<Math, kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  float* table = reinterpret_cast<float*>(memory + sizeof(Shared));

  const int64_t task = blockIdx.x;
  const int64_t first_query = task % q_blocks * kQueries;
  const int64_t head = task / q_blocks % p.heads;
  Problem problem;
  problem.index = task / q_blocks / p.heads;
  const int windows = p.full ? 1 : p.windows_y * p.windows_x;
  problem.image = problem.index / windows;
  const int window = static_cast<int>(problem.index % windows);
  problem.y = window / p.windows_x;
  problem.x = window % p.windows_x;

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int table_w = 2 * p.window_w - 1;
  if (p.table != nullptr) {
    const int size = (2 * p.window_h - 1) * table_w;
    for (int i = threadIdx.x; i < size; i += kThreads) table[i] = p.table[head * size + i];
  }
  load_rows<Math, kDim, kQueries, kAligned>(p, p.q, problem, p.q_shared, nullptr, head, first_query,
                                            p.nq, s.q);
  load_rows<Math, kDim, kKeys, kAligned>(p, p.k, problem, false, p.k_pad, head, 0, p.nk, s.k[0]);
  load_rows<Math, kDim, kKeys, kAligned>(p, p.v, problem, false, p.v_pad, head, 0, p.nk, s.v[0]);
  ptx::cp_async_commit();

  const float scale = p.scale_per_head != nullptr ? p.scale_per_head[head] : p.scale;
  const int64_t mask_index = p.full ? problem.image : window;
  const float* mask =
      p.mask == nullptr ? nullptr : p.mask + mask_index % p.mask_count * p.nq * p.nk;
  const float* bias = p.bias == nullptr ? nullptr : p.bias + head * p.nq * p.bias_ld;

  // A thread's two rows of the accumulators: lane / 4 and 8 further.
  int64_t query[2];
  int query_term[2] = {0, 0};
  int query_region[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    query[i] = first_query + warp * 16 + lane / 4 + 8 * i;
    if (query[i] >= p.nq) query[i] = p.nq - 1;
    if (!p.full) {
      const int row = static_cast<int>(query[i]) / p.window_w;
      const int column = static_cast<int>(query[i]) - row * p.window_w;
      query_term[i] = (p.window_h - 1 - row) * table_w + p.window_w - 1 - column;
      query_region[i] = region_of(p, problem, static_cast<int>(query[i]));
    }
  }

  float out[kDim / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  const int64_t blocks = (p.nk + kKeys - 1) / kKeys;
  for (int64_t block = 0; block < blocks; ++block) {
    const int stage = static_cast<int>(block % 2);
    const int64_t first_key = block * kKeys;
    if (block + 1 < blocks) {
      load_rows<Math, kDim, kKeys, kAligned>(p, p.k, problem, false, p.k_pad, head,
                                             first_key + kKeys, p.nk, s.k[1 - stage]);
      load_rows<Math, kDim, kKeys, kAligned>(p, p.v, problem, false, p.v_pad, head,
                                             first_key + kKeys, p.nk, s.v[1 - stage]);
    }
    ptx::cp_async_commit();
    if (!p.full && threadIdx.x < kKeys) {
      const int key = static_cast<int>(first_key) + threadIdx.x;
      const int row = key / p.window_w;
      s.key_term[threadIdx.x] =
          row * table_w + key - row * p.window_w + (region_of(p, problem, key) << 24);
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (p.qk_l2norm) {
      if (block == 0) inverse_lengths<Math, kDim>(s.q, s.q_inverse);
      inverse_lengths<Math, kDim>(s.k[stage], s.k_inverse);
      __syncthreads();
    }

    float logits[kKeys / 8][4] = {};
#pragma unroll
    for (int c = 0; c < kDim; c += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, ptx::shared_address(&s.q[warp * 16 + lane % 16][c + lane / 16 * 8]));
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, ptx::shared_address(
                                &s.k[stage][n + lane / 16 * 8 + lane % 8][c + lane / 8 % 2 * 8]));
        Math::mma(logits[n / 8], a, b[0], b[1]);
        Math::mma(logits[n / 8 + 1], a, b[2], b[3]);
      }
    }

    float new_top[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = e / 2;
        const int column = n * 8 + lane % 4 * 2 + e % 2;
        const int64_t key = first_key + column;
        float x = logits[n][e] * scale;
        if (p.qk_l2norm) {
          x *= s.q_inverse[warp * 16 + lane / 4 + 8 * i] * s.k_inverse[column];
        }
        if (key < p.nk) {
          if (!p.full) {
            const int term = s.key_term[column];
            if (p.table != nullptr) x += table[query_term[i] + (term & 0xffffff)];
            if (p.swin_mask && term >> 24 != query_region[i]) x += p.swin_mask_value;
          }
          if (bias != nullptr) x += bias[query[i] * p.bias_ld + key];
          if (mask != nullptr) x += mask[query[i] * p.nk + key];
        } else {
          x = -INFINITY;
        }
        logits[n][e] = x;
        new_top[i] = fmaxf(new_top[i], x);
      }
    }

    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      new_top[i] = ptx::lanes_max<4>(new_top[i]);
      // All keys masked with -inf so far: subtract 0, so that later blocks still count.
      shift[i] = new_top[i] == -INFINITY ? 0.0f : new_top[i] * kLog2E;
      const float shrink = ptx::exp2_approx(top[i] * kLog2E - shift[i]);
      top[i] = new_top[i];
      sum[i] *= shrink;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * i] *= shrink;
        out[n][2 * i + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        logits[n][e] = ptx::exp2_approx(logits[n][e] * kLog2E - shift[e / 2]);
        sum[e / 2] += logits[n][e];
      }
    }

#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      const float (&low)[4] = logits[n / 8];
      const float (&high)[4] = logits[n / 8 + 1];
      const uint32_t a[4] = {Math::pack(low[0], low[1]), Math::pack(low[2], low[3]),
                             Math::pack(high[0], high[1]), Math::pack(high[2], high[3])};
#pragma unroll
      for (int c = 0; c < kDim; c += 16) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b,
                               ptx::shared_address(&s.v[stage][n + lane % 16][c + lane / 16 * 8]));
        Math::mma(out[c / 8], a, b[0], b[1]);
        Math::mma(out[c / 8 + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] = ptx::lanes_sum<4>(sum[i]);
    const int64_t row = first_query + warp * 16 + lane / 4 + 8 * i;
    if (row >= p.nq) continue;
    const int64_t offset = token_offset(p, p.out, problem, static_cast<int>(row));
    if (lane % 4 == 0) {
      p.lse[(problem.index * p.heads + head) * p.nq + row] =
          offset < 0 ? 0.0f : top[i] + logf(sum[i]);
    }
    if (offset < 0) continue;
    Element* to = static_cast<Element*>(p.out.data) + problem.image * p.out.image +
                  head * p.out.head + offset;
    const float inverse = 1.0f / sum[i];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int c = n * 8 + lane % 4 * 2;
      if (c < p.head_dim) to[c] = Math::narrow(out[n][2 * i] * inverse);
      if (c + 1 < p.head_dim) to[c + 1] = Math::narrow(out[n][2 * i + 1] * inverse);
    }
  }
}

}  // namespace cuda
}  // namespace fastbb
