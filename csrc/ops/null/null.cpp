// SPDX-License-Identifier: Apache-2.0
// Host code of the null operator: schema, checks, allocation, launch, in this order.
#include "ops/null/null.h"

#include "core/torch_api.h"

namespace fastbb {
namespace {

constexpr const char* kOp = "null";

Tensor forward(const Tensor& x) {
  // Checks: all that memory safety needs, each naming op, argument, rule and value.
  check(x.is_cpu(), kOp, "x", "must be a CPU tensor", "another device");
  check(x.dim() == 2, kOp, "x", "must be [rows, columns]", shape_of(x));
  check(x.size(1) <= 1 || x.stride(1) == 1, kOp, "x",
        "must have a contiguous last dimension, stride 1", x.stride(1));
  const Dtype dtype = kernel_dtype(kOp, "x", x);

  const Tensor out = torch::stable::new_empty(x, shape_of(x));
  const NullParams p{dtype,     x.const_data_ptr(), x.stride(0), out.mutable_data_ptr(),
                     x.size(0), x.size(1)};
  const NullPlan plan = null_plan(p);
  if (plan.tasks == 0) return out;

  const NullKernels& kernels = null_kernels();
  torch::stable::parallel_for(0, plan.tasks, plan.tasks_per_call,
                              [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) { m.def("null(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) { m.impl("null", TORCH_BOX(&fastbb::forward)); }
