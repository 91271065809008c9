// SPDX-License-Identifier: Apache-2.0
#include "ops/window_attention/window_attention_cuda_backward_launch.cuh"

template const char* fastbb::cuda::launch_backward<fastbb::cuda::Bf16Math>(
    const fastbb::WindowAttentionParams&, const fastbb::WindowAttentionCudaBackwardPlan&, float*,
    void*);
