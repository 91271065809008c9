// SPDX-License-Identifier: Apache-2.0
// Contract between host code and the CUDA kernels of packing. Torch-free and free of CUDA, so that
// plans are the same in builds with and without kernels.
//
// The parameters are those of the CPU kernels. Bits and the bytes between their rows must be
// multiples of 4. A row of the result whose index is of no row of bits becomes NaN: the host does
// not wait for the device to learn of it.
#pragma once

#include <cstdint>

#include "core/cuda_launch.h"
#include "core/export.h"
#include "ops/binary_pack/binary_pack.h"

namespace fastbb {

constexpr int kPackCudaThreads = 256;  // of a block; each warp takes a part of a row
constexpr int kPackCudaWords = 32;     // of 32 bits, of a part: one for each lane
constexpr int kPackCudaMeansThreads = 512;

struct BinaryPackCudaPlan {
  CudaLaunch launch;  // a grid of 0: nothing to do
  int64_t parts;      // of a row
};

// Of packing and unpacking, and of sums, for which a warp takes a whole row.
FASTBB_EXPORT BinaryPackCudaPlan binary_pack_cuda_plan(int64_t rows, int64_t k);
FASTBB_EXPORT BinaryPackCudaPlan binary_stats_cuda_plan(int64_t rows);

// From sums of rows to means, in float64 and rounded once: of x, and of |x|.
struct BinaryMeansParams {
  const double* sums;  // [rows, 2]
  int64_t rows, k;
  float* center;  // of each row [rows], or of all [1], or null
  bool center_rows;
  float* scale;  // likewise, not null
  bool scale_rows;
};
FASTBB_EXPORT CudaLaunch binary_means_cuda_launch();

// Results are texts of errors, or nullptr. Built where FASTBB_WITH_CUDA is defined.
FASTBB_EXPORT const char* binary_pack_cuda(const BinaryPackParams& p,
                                           const BinaryPackCudaPlan& plan, void* stream);
FASTBB_EXPORT const char* binary_stats_cuda(const BinaryStatsParams& p,
                                            const BinaryPackCudaPlan& plan, void* stream);
FASTBB_EXPORT const char* binary_means_cuda(const BinaryMeansParams& p, void* stream);
FASTBB_EXPORT const char* binary_unpack_cuda(const BinaryUnpackParams& p,
                                             const BinaryPackCudaPlan& plan, void* stream);

}  // namespace fastbb
