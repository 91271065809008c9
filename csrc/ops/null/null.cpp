// SPDX-License-Identifier: Apache-2.0
// Host code of the null operator: schema, checks, allocation, launch, in this order.
#include "ops/null/null.h"

#include "core/torch_api.h"
#include "ops/null/null_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kOp = "null";

// A result and the parameters of its kernel.
struct Call {
  Tensor out;
  NullParams params;
};

// Checks all that memory safety needs, each naming op, argument, rule and value; allocates.
Call describe(const Tensor& x, Backend backend) {
  check_backend(kOp, "x", x, backend);
  check(x.dim() == 2, kOp, "x", "must be [rows, columns]", shape_of(x));
  check(x.size(1) <= 1 || x.stride(1) == 1, kOp, "x",
        "must have a contiguous last dimension, stride 1", x.stride(1));
  const Dtype dtype = kernel_dtype(kOp, "x", x);
  const Tensor out = torch::stable::new_empty(x, shape_of(x));
  return {out,
          {dtype, x.const_data_ptr(), x.stride(0), out.mutable_data_ptr(), x.size(0), x.size(1)}};
}

Tensor forward(const Tensor& x) {
  const auto [out, p] = describe(x, Backend::kCpu);
  const NullPlan plan = null_plan(p);
  if (plan.tasks == 0) return out;

  const NullKernels& kernels = null_kernels();
  torch::stable::parallel_for(
      0, plan.tasks, plan.tasks_per_call,
      [&, &p = p](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return out;
}

#ifdef FASTBB_WITH_CUDA
Tensor forward_cuda(const Tensor& x) {
  const auto [out, p] = describe(x, Backend::kCuda);
  const NullCudaPlan plan = null_cuda_plan(p);
  if (plan.launch.grid == 0) return out;

  launch_on_device_of(kOp, x, [&, &p = p](void* stream) { return null_cuda(p, plan, stream); });
  return out;
}
#endif

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) { m.def("null(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) { m.impl("null", TORCH_BOX(&fastbb::forward)); }

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) { m.impl("null", TORCH_BOX(&fastbb::forward_cuda)); }
#endif
