// SPDX-License-Identifier: Apache-2.0
// Launches of binary attention by element type.
#include "ops/binary_attention/binary_attention_cuda_launch.cuh"

namespace fastbb {

const char* binary_attention_cuda(const BinaryAttentionParams& p,
                                  const BinaryAttentionCudaPlan& plan, void* stream) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return cuda::launch_binary_attention<float>(p, plan, stream);
    case Dtype::kBFloat16:
      return cuda::launch_binary_attention<__nv_bfloat16>(p, plan, stream);
    case Dtype::kFloat16:
      return cuda::launch_binary_attention<__half>(p, plan, stream);
  }
  return "an element type without kernels";
}

}  // namespace fastbb
