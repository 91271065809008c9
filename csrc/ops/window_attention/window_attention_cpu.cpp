// SPDX-License-Identifier: Apache-2.0
// CPU kernels of window attention, one instruction-set level per compilation. The algorithm, tile
// sizes and limits are described in window_attention_forward.h and window_attention_backward.h.
#include "ops/window_attention/window_attention_backward.h"
#include "ops/window_attention/window_attention_forward.h"

namespace fastbb {
namespace {

void expand_bias(const WindowAttentionParams& p, float* dense, int64_t bias_ld, int64_t begin,
                 int64_t end) {
  for (int64_t row = begin * p.nq; row < end * p.nq; ++row) {
    expand_bias_row(p, row / p.nq, row % p.nq, 0, p.nk, dense + row * bias_ld);
  }
}

void forward(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
             int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return forward_tasks<Fp32Engine<float>>(p, plan, begin, end);
    case Dtype::kBFloat16:
#if defined(FASTBB_ISA_AVX512_BF16)
      if (!p.qk_l2norm) return forward_tasks<Bf16Engine>(p, plan, begin, end);
#endif
      return forward_tasks<Fp32Engine<BFloat16>>(p, plan, begin, end);
    case Dtype::kFloat16:
      return forward_tasks<Fp32Engine<Float16>>(p, plan, begin, end);
  }
}

void backward(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
              int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return backward_tasks<float>(p, plan, begin, end);
    case Dtype::kBFloat16:
      return backward_tasks<BFloat16>(p, plan, begin, end);
    case Dtype::kFloat16:
      return backward_tasks<Float16>(p, plan, begin, end);
  }
}

void reduce(const WindowAttentionParams& p, const WindowAttentionPlan& plan, int64_t begin,
            int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return reduce_tasks<float>(p, plan, begin, end);
    case Dtype::kBFloat16:
      return reduce_tasks<BFloat16>(p, plan, begin, end);
    case Dtype::kFloat16:
      return reduce_tasks<Float16>(p, plan, begin, end);
  }
}

}  // namespace

#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) window_attention_##level

extern const WindowAttentionKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const WindowAttentionKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {expand_bias, forward, backward,
                                                                   reduce};

}  // namespace fastbb
