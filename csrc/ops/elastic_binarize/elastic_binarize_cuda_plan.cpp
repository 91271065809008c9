// SPDX-License-Identifier: Apache-2.0
// Launch plan of the CUDA kernels.
#include <algorithm>
#include <cmath>

#include "ops/elastic_binarize/elastic_binarize_cuda.h"

namespace fastbb {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a task of the backward pass: few enough for a thousand blocks, which fill the device, and
// at least 32, so that partial sums, 4 bytes per column and task, are a small share of the traffic.
int64_t rows_per_task(int64_t rows, int64_t units) {
  constexpr int64_t kBlocks = 1024;
  constexpr int64_t kLeastRows = 32;
  const int64_t tasks = std::max<int64_t>(1, kBlocks / units);
  return divide_up(std::max(divide_up(rows, tasks), kLeastRows), 8) * 8;
}

}  // namespace

ElasticBinarizeCudaPlan elastic_binarize_cuda_plan(const ElasticBinarizeParams& p) {
  ElasticBinarizeCudaPlan plan{};
  plan.units = divide_up(p.k, kElasticCudaColumns);
  plan.sums = {divide_up(p.k, kElasticCudaSumColumns) + 1, kElasticCudaThreads, 0};
  plan.alpha_factor =
      1.0 / std::sqrt(std::max(static_cast<double>(p.rows) * static_cast<double>(p.k), 1.0));
  plan.planes = elastic_planes(p.kind, p.ste);
  plan.is_signed = is_signed(p.kind);
  plan.inside = has_inside_plane(p.kind, p.ste);
  if (p.rows == 0 || p.k == 0) return plan;
  plan.rows_per_task = rows_per_task(p.rows, plan.units);
  plan.tasks = divide_up(p.rows, plan.rows_per_task);
  plan.forward = {divide_up(p.rows, kElasticCudaRows) * plan.units, kElasticCudaThreads, 0};
  plan.backward = {plan.tasks * plan.units, kElasticCudaThreads, 0};
  return plan;
}

}  // namespace fastbb
