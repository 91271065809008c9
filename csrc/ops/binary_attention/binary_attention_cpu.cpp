// SPDX-License-Identifier: Apache-2.0
// CPU kernels of binary attention, one instruction-set level per compilation. The algorithm and
// what bounds it are described in binary_attention_forward.h.
#include "ops/binary_attention/binary_attention_forward.h"

namespace fastbb {
namespace {

void pack(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan, uint8_t* workspace,
          int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return pack_tasks<float>(p, plan, workspace, begin, end);
    case Dtype::kBFloat16:
      return pack_tasks<BFloat16>(p, plan, workspace, begin, end);
    case Dtype::kFloat16:
      return pack_tasks<Float16>(p, plan, workspace, begin, end);
  }
}

void forward(const BinaryAttentionParams& p, const BinaryAttentionPlan& plan,
             const uint8_t* workspace, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return forward_tasks<float>(p, plan, workspace, begin, end);
    case Dtype::kBFloat16:
      return forward_tasks<BFloat16>(p, plan, workspace, begin, end);
    case Dtype::kFloat16:
      return forward_tasks<Float16>(p, plan, workspace, begin, end);
  }
}

}  // namespace

#define FASTBB_TABLE_NAME(level) FASTBB_TABLE_NAME_(level)
#define FASTBB_TABLE_NAME_(level) binary_attention_##level

extern const BinaryAttentionKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME);
const BinaryAttentionKernels FASTBB_TABLE_NAME(FASTBB_ISA_NAME) = {pack, forward};

}  // namespace fastbb
