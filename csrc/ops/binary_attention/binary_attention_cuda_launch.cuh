// SPDX-License-Identifier: Apache-2.0
// Launches of one element type; each is instantiated in a file of its own, so that they compile
// side by side.
#pragma once

#include "core/launch.cuh"
#include "ops/binary_attention/binary_attention_cuda.cuh"

namespace fastbb {
namespace cuda {

template <class Element>
const char* launch_binary_attention(const BinaryAttentionParams& p,
                                    const BinaryAttentionCudaPlan& plan, void* stream) {
  const auto run = [&](auto kernel) { return launch(kernel, plan.launch, stream, p, plan); };
  if (plan.words == 2) {
    return plan.training ? run(binary_attention_forward<Element, 2, true>)
                         : run(binary_attention_forward<Element, 2, false>);
  }
  return plan.training ? run(binary_attention_forward<Element, 4, true>)
                       : run(binary_attention_forward<Element, 4, false>);
}

extern template const char* launch_binary_attention<float>(const BinaryAttentionParams&,
                                                           const BinaryAttentionCudaPlan&, void*);
extern template const char* launch_binary_attention<__half>(const BinaryAttentionParams&,
                                                            const BinaryAttentionCudaPlan&, void*);
extern template const char* launch_binary_attention<__nv_bfloat16>(const BinaryAttentionParams&,
                                                                   const BinaryAttentionCudaPlan&,
                                                                   void*);

}  // namespace cuda
}  // namespace fastbb
