// SPDX-License-Identifier: Apache-2.0
#include "ops/binary_attention/binary_attention_cuda_launch.cuh"

template const char* fastbb::cuda::launch_binary_attention<__half>(
    const fastbb::BinaryAttentionParams&, const fastbb::BinaryAttentionCudaPlan&, void*);
