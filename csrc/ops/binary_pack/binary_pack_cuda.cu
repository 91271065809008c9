// SPDX-License-Identifier: Apache-2.0
// Launches of packing: one instantiation per element type.
#include "ops/binary_pack/binary_pack_cuda.cuh"

#include "core/launch.cuh"

namespace fastbb {
namespace {

// Calls launch(an element of the type).
template <class Launch>
const char* with_element(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(float{});
    case Dtype::kBFloat16:
      return launch(__nv_bfloat16{});
    case Dtype::kFloat16:
      return launch(__half{});
  }
  return "no such element type";
}

}  // namespace

const char* binary_pack_cuda(const BinaryPackParams& p, const BinaryPackCudaPlan& plan,
                             void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return cuda::launch(cuda::binary_pack<decltype(element)>, plan.launch, stream, p, plan);
  });
}

const char* binary_stats_cuda(const BinaryStatsParams& p, const BinaryPackCudaPlan& plan,
                              void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return cuda::launch(cuda::binary_stats<decltype(element)>, plan.launch, stream, p, plan);
  });
}

const char* binary_means_cuda(const BinaryMeansParams& p, void* stream) {
  return cuda::launch(cuda::binary_means, binary_means_cuda_launch(), stream, p);
}

const char* binary_unpack_cuda(const BinaryUnpackParams& p, const BinaryPackCudaPlan& plan,
                               void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return cuda::launch(cuda::binary_unpack<decltype(element)>, plan.launch, stream, p, plan);
  });
}

}  // namespace fastbb
