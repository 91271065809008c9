// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of elastic binarization.
//
// A block takes 128 columns, 16 bytes of each plane, of 32 rows (forward) or of a task (backward);
// each of its 8 warps takes every eighth of these rows. Lane i has columns i, i + 32, i + 64 and
// i + 96: a ballot is a word of a plane, its own bit of such a word is lane i's, and loads need
// no alignment and no tail of their own. Columns from k on are NaN, whose bits are all 0.
//
// Forward: a lane has 16 loads under way before it uses the first. Backward: sums over the rows of
// a task stay in registers, then warps are added in shared memory, and the partial sums of tasks by
// a second kernel, all in a fixed order.
//
// Bound: memory. Per element of 16 bits, forward 4 bytes and up to 3 bits, backward 4 bytes and the
// same bits; requests are of 64 bytes, or 128 in float32. Forward needs about 13 instructions per
// element with three planes, so 1.1 of 4 issue slots of an H100 at 3.35 TB/s.
#pragma once

#include "core/element.cuh"
#include "core/lanes.cuh"
#include "ops/elastic_binarize/elastic_binarize_cuda.h"

namespace fastbb {
namespace cuda {

constexpr int kElasticWarps = kElasticCudaThreads / 32;
constexpr int kElasticWords = kElasticCudaColumns / 32;  // columns of a lane

// The quantizer: kinds differ in a few numbers.
struct ElasticRule {
  float alpha;
  bool is_signed;
  float least;           // a bit is 1 above
  bool plus, has_minus;  // a bit is 1 at `least` too; a second plane
  float otherwise;       // the value where no bit is 1
  bool inside, open;     // a plane of |x| <= alpha, or |x| < alpha
  int planes;

  __device__ ElasticRule(const ElasticBinarizeParams& p, const ElasticBinarizeCudaPlan& plan) {
    const float given = p.alpha == nullptr ? 1.0f : *p.alpha;
    alpha = given < kLeastAlpha ? kLeastAlpha : given;
    is_signed = plan.is_signed;
    least = is_signed ? 0.0f : alpha / 2;
    plus = p.kind == BitKind::kPlus;
    has_minus = p.kind == BitKind::kTernary;
    otherwise = has_minus || !is_signed ? 0.0f : -1.0f;
    inside = plan.inside;
    open = p.ste == Ste::kClipOpen;
    planes = static_cast<int>(plan.planes);
  }

  __device__ bool is_one(float x) const { return x > least || (plus && x == least); }
  __device__ bool is_minus(float x) const { return has_minus && x < 0.0f; }
  // |x| <= alpha and |x / alpha| <= 1 are the same in floats, and so are < and < 1.
  __device__ bool is_inside(float x) const {
    return fabsf(x) < alpha || (!open && fabsf(x) == alpha);
  }
  __device__ float value(bool one, bool minus) const {
    return one ? 1.0f : minus ? -1.0f : otherwise;
  }
};

// The columns of a lane: the first, and where the row ends as seen from there.
struct ElasticColumns {
  int64_t first;
  int rest;

  __device__ ElasticColumns(int64_t unit, int64_t k)
      : first(unit * kElasticCudaColumns + threadIdx.x % 32) {
    rest = k - first < kElasticCudaColumns ? static_cast<int>(k - first) : kElasticCudaColumns;
  }
  __device__ bool has(int i) const { return 32 * i < rest; }

  __device__ void load_shifts(const float* shifts, float (&shift)[kElasticWords]) const {
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      shift[i] = !has(i) ? NAN : shifts == nullptr ? 0.0f : shifts[first + 32 * i];
    }
  }
  // Of the row that starts at element `start`.
  template <class Element>
  __device__ void load(const void* data, int64_t start, float (&x)[kElasticWords]) const {
    const auto* from = static_cast<const Element*>(data) + (start + first);
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) x[i] = has(i) ? widen(from[32 * i]) : 0.0f;
  }
  template <class Element>
  __device__ void store(void* data, int64_t start, const float (&x)[kElasticWords]) const {
    auto* to = static_cast<Element*>(data) + (start + first);
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      if (has(i)) to[32 * i] = narrow<Element>(x[i]);
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(kElasticCudaThreads, 5)
    elastic_binarize_forward(const __grid_constant__ ElasticBinarizeParams p,
                             const __grid_constant__ ElasticBinarizeCudaPlan plan) {
  constexpr int kRows = kElasticCudaRows / kElasticWarps;  // of a warp
  const int64_t block = blockIdx.x;
  const int64_t unit = block % plan.units;
  const int lane = threadIdx.x % 32;
  const ElasticColumns columns(unit, p.k);
  const int64_t first_row = block / plan.units * kElasticCudaRows + threadIdx.x / 32;

  float x[kRows][kElasticWords];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r * kElasticWarps;
    if (row < p.rows) columns.load<Element>(p.x, row * p.x_row, x[r]);
  }
  const ElasticRule rule(p, plan);
  float shift[kElasticWords];
  columns.load_shifts(p.shift, shift);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r * kElasticWarps;
    if (row >= p.rows) return;
    float values[kElasticWords];
    uint32_t words[kElasticWords];  // of the plane that this lane stores
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      const float shifted = x[r][i] + shift[i];
      const bool one = rule.is_one(shifted);
      const bool minus = rule.is_minus(shifted);
      values[i] = rule.alpha * rule.value(one, minus);
      if (p.planes == nullptr) continue;
      words[i] = __ballot_sync(ptx::kFullWarp, one);
      if (rule.has_minus) {
        const uint32_t word = __ballot_sync(ptx::kFullWarp, minus);
        if (lane == 1) words[i] = word;
      }
      if (rule.inside) {
        const uint32_t word = __ballot_sync(ptx::kFullWarp, rule.is_inside(shifted));
        if (lane == rule.planes - 1) words[i] = word;
      }
    }
    if (p.out != nullptr) columns.store<Element>(p.out, row * p.k, values);
    if (p.planes != nullptr && lane < rule.planes) {
      auto* to = reinterpret_cast<uint4*>(p.planes);
      to[(row * rule.planes + lane) * plan.units + unit] = {words[0], words[1], words[2], words[3]};
    }
  }
}

// Factor of a gradient, and phi, of a lane's columns in a row, from x or from planes.
struct ElasticFactors {
  float pass[kElasticWords], phi[kElasticWords];

  __device__ void from_x(const ElasticRule& rule, const float (&x)[kElasticWords],
                         const float (&shift)[kElasticWords]) {
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      const float shifted = x[i] + shift[i];
      const float value = rule.value(rule.is_one(shifted), rule.is_minus(shifted));
      const float u = shifted / rule.alpha;
      if (rule.is_signed) {  // kBiReal
        pass[i] = fabsf(u) <= 1.0f ? 2.0f - 2.0f * fabsf(u) : 0.0f;
        phi[i] = value;
      } else {
        pass[i] = u >= 0.0f && u <= 1.0f ? 1.0f : 0.0f;
        phi[i] = u < 0.0f ? 0.0f : u > 1.0f ? 1.0f : value - u;
      }
    }
  }

  __device__ void from_planes(const ElasticBinarizeParams& p, const ElasticRule& rule, int64_t row,
                              int64_t unit, int64_t units) {
    const int lane = threadIdx.x % 32;
    const auto* planes =
        reinterpret_cast<const uint4*>(p.planes) + row * rule.planes * units + unit;
    const auto bits = [&](int plane, bool (&bit)[kElasticWords]) {
      const uint4 words = planes[plane * units];
      bit[0] = words.x >> lane & 1;
      bit[1] = words.y >> lane & 1;
      bit[2] = words.z >> lane & 1;
      bit[3] = words.w >> lane & 1;
    };
    bool one[kElasticWords] = {}, minus[kElasticWords] = {}, inside[kElasticWords];
    if (p.partial_alpha != nullptr) {
      bits(0, one);
      if (rule.has_minus) bits(1, minus);
    }
    if (rule.inside) bits(rule.planes - 1, inside);
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      pass[i] = !rule.inside || inside[i] ? 1.0f : 0.0f;
      phi[i] = rule.value(one[i], minus[i]);
    }
  }
};

template <class Element, bool kFromX>
__global__ void __launch_bounds__(kElasticCudaThreads)
    elastic_binarize_backward(const __grid_constant__ ElasticBinarizeParams p,
                              const __grid_constant__ ElasticBinarizeCudaPlan plan) {
  __shared__ float shift_sums[kElasticWarps][kElasticCudaColumns];
  __shared__ float alpha_sums[kElasticWarps];
  const int64_t block = blockIdx.x;
  const int64_t unit = block % plan.units;
  const int64_t task = block / plan.units;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const ElasticColumns columns(unit, p.k);
  const int64_t first_row = task * plan.rows_per_task;
  const int64_t behind =
      first_row + plan.rows_per_task < p.rows ? first_row + plan.rows_per_task : p.rows;

  const ElasticRule rule(p, plan);
  float shift[kElasticWords];
  if (kFromX) columns.load_shifts(p.shift, shift);
  float shift_sum[kElasticWords] = {};
  float alpha_sum = 0.0f;
#pragma unroll 2
  for (int64_t row = first_row + warp; row < behind; row += kElasticWarps) {
    float grad[kElasticWords];
    columns.load<Element>(p.grad, row * p.grad_row, grad);
    ElasticFactors factors;
    if (kFromX) {
      float x[kElasticWords];
      columns.load<Element>(p.x, row * p.x_row, x);
      factors.from_x(rule, x, shift);
    } else {
      factors.from_planes(p, rule, row, unit, plan.units);
    }
    float dx[kElasticWords];
#pragma unroll
    for (int i = 0; i < kElasticWords; ++i) {
      dx[i] = factors.pass[i] * grad[i];
      shift_sum[i] += dx[i];
      if (columns.has(i)) alpha_sum += factors.phi[i] * grad[i];
    }
    columns.store<Element>(p.dx, row * p.k, dx);
  }

#pragma unroll
  for (int i = 0; i < kElasticWords; ++i) shift_sums[warp][lane + 32 * i] = shift_sum[i];
  alpha_sum = ptx::lanes_sum<32>(alpha_sum);
  if (lane == 0) alpha_sums[warp] = alpha_sum;
  __syncthreads();
  const int64_t column = unit * kElasticCudaColumns + threadIdx.x;
  if (p.partial_shift != nullptr && threadIdx.x < kElasticCudaColumns && column < p.k) {
    float sum = 0.0f;
    for (int i = 0; i < kElasticWarps; ++i) sum += shift_sums[i][threadIdx.x];
    p.partial_shift[task * p.k + column] = sum;
  }
  if (p.partial_alpha != nullptr && threadIdx.x == 0) {
    double sum = 0.0;
    for (int i = 0; i < kElasticWarps; ++i) sum += alpha_sums[i];
    p.partial_alpha[block] = sum;
  }
}

// A block adds the partial sums of 32 columns of dshift; the last one those of dalpha.
__global__ void __launch_bounds__(kElasticCudaThreads)
    elastic_binarize_sums(const __grid_constant__ ElasticBinarizeParams p,
                          const __grid_constant__ ElasticBinarizeCudaPlan plan, float* dalpha) {
  constexpr int kColumns = kElasticCudaSumColumns;
  constexpr int kRows = kElasticCudaThreads / kColumns;
  __shared__ double sums[kRows][kColumns];
  const bool of_alpha = blockIdx.x == plan.sums.grid - 1;
  const int row = threadIdx.x / kColumns;
  const int place = threadIdx.x % kColumns;
  const int64_t column = int64_t{blockIdx.x} * kColumns + place;
  double sum = 0.0;
  if (of_alpha) {
    if (dalpha == nullptr) return;
    for (int64_t i = threadIdx.x; i < plan.backward.grid; i += kElasticCudaThreads) {
      sum += p.partial_alpha[i];
    }
  } else {
    if (p.dshift == nullptr) return;
    if (column < p.k) {
#pragma unroll 4
      for (int64_t i = row; i < plan.tasks; i += kRows) sum += p.partial_shift[i * p.k + column];
    }
  }
  sums[row][place] = sum;
  __syncthreads();
  if (row != 0) return;
  for (int i = 1; i < kRows; ++i) sum += sums[i][place];
  if (!of_alpha) {
    if (column < p.k) p.dshift[column] = static_cast<float>(sum);
    return;
  }
  sums[0][place] = sum;
  __syncwarp();
  if (place != 0) return;
  for (int i = 1; i < kColumns; ++i) sum += sums[0][i];
  *dalpha = static_cast<float>(sum * plan.alpha_factor);
}

}  // namespace cuda
}  // namespace fastbb
