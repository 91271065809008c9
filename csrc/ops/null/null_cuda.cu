// SPDX-License-Identifier: Apache-2.0
// Launches of the null operator: one instantiation per width of a unit.
#include "ops/null/null_cuda.cuh"

#include "core/launch.cuh"

namespace fastbb {

const char* null_cuda(const NullParams& p, const NullCudaPlan& plan, void* stream) {
  switch (plan.unit_bytes) {
    case 16:
      return cuda::launch(cuda::null_copy<uint4>, plan.launch, stream, p, plan);
    case 8:
      return cuda::launch(cuda::null_copy<uint2>, plan.launch, stream, p, plan);
    case 4:
      return cuda::launch(cuda::null_copy<uint32_t>, plan.launch, stream, p, plan);
    case 2:
      return cuda::launch(cuda::null_copy<uint16_t>, plan.launch, stream, p, plan);
    default:
      return "a unit is not of 2, 4, 8 or 16 bytes";
  }
}

}  // namespace fastbb
