// SPDX-License-Identifier: Apache-2.0
// Launches of products of packed bits: one instantiation per tile and number of planes.
#include "ops/binary_linear/binary_linear_cuda.cuh"

#include "core/launch.cuh"

namespace fastbb {
namespace cuda {
namespace {

template <int kRows, int kPlanes>
const char* launch_tiles(const BinaryLinearParams& p, const BinaryLinearCudaPlan& plan,
                         void* stream) {
  static_assert(sizeof(BinaryShared<kRows, kPlanes>) == binary_cuda_shared_bytes(kRows, kPlanes));
  return launch(binary_linear<kRows, kPlanes>, plan.launch, stream, p, plan);
}

template <int kPlanes>
const char* launch_planes(const BinaryLinearParams& p, const BinaryLinearCudaPlan& plan,
                          void* stream) {
  return plan.rows == kBinaryCudaManyRows
             ? launch_tiles<kBinaryCudaManyRows, kPlanes>(p, plan, stream)
             : launch_tiles<kBinaryCudaFewRows, kPlanes>(p, plan, stream);
}

}  // namespace
}  // namespace cuda

const char* binary_linear_cuda(const BinaryLinearParams& p, const BinaryLinearCudaPlan& plan,
                               void* stream) {
  return p.a_kind == BitKind::kTernary ? cuda::launch_planes<2>(p, plan, stream)
                                       : cuda::launch_planes<1>(p, plan, stream);
}

}  // namespace fastbb
