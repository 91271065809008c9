// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of elastic binarization. Torch-free and free of
// CUDA, so that plans are the same in builds with and without kernels.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/elastic_binarize/elastic_binarize.h"

namespace fastbb {

constexpr int kElasticCudaThreads = 256;    // of a block: 8 warps
constexpr int kElasticCudaColumns = 128;    // of a block: 16 bytes of each plane
constexpr int kElasticCudaRows = 32;        // of a block of the forward pass
constexpr int kElasticCudaSumColumns = 32;  // of a block that adds partial sums of dshift

// Tasks of the backward pass are groups of rows. It takes partial_shift [tasks, k], and
// partial_alpha [blocks of the backward pass].
struct ElasticBinarizeCudaPlan {
  CudaLaunch forward, backward;  // a grid of 0: nothing to do
  CudaLaunch sums;               // of dshift, and in the last block of dalpha
  int64_t units;                 // groups of kElasticCudaColumns columns
  int64_t rows_per_task, tasks;
  double alpha_factor;     // of dalpha: one over the root of the number of elements
  int64_t planes;          // of a row
  bool is_signed, inside;  // of the kind; whether the last plane tells where gradients pass
};

// Function of the sizes.
FASTBB_EXPORT ElasticBinarizeCudaPlan elastic_binarize_cuda_plan(const ElasticBinarizeParams& p);

// The error's text, or nullptr. Built where FASTBB_WITH_CUDA is defined. Planes are aligned to 16
// bytes.
FASTBB_EXPORT const char* elastic_binarize_cuda(const ElasticBinarizeParams& p,
                                                const ElasticBinarizeCudaPlan& plan, void* stream);

// dalpha: one float, or null with partial_alpha.
FASTBB_EXPORT const char* elastic_binarize_backward_cuda(const ElasticBinarizeParams& p,
                                                         const ElasticBinarizeCudaPlan& plan,
                                                         float* dalpha, void* stream);

}  // namespace fastbb
