// SPDX-License-Identifier: Apache-2.0
// Host code of elastic binarization: schemas, memory-safety checks, allocation, launches.
#include "ops/elastic_binarize/elastic_binarize.h"

#include <cmath>

#include "core/bit_names.h"
#include "core/torch_api.h"
#include "ops/elastic_binarize/elastic_binarize_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kOp = "elastic_binarize";

Ste ste_of(const std::string& name) {
  if (name == "clip") return Ste::kClip;
  if (name == "clip_open") return Ste::kClipOpen;
  if (name == "identity") return Ste::kIdentity;
  if (name == "bireal") return Ste::kBiReal;
  fail(kOp, "ste", "must be clip, clip_open, identity or bireal", name);
}

// Parameters, and the tensors that their pointers lead to. All are where `like` is.
struct Call {
  const Tensor& like;
  Backend backend;
  ElasticBinarizeParams params{};
  std::vector<Tensor> keep{};

  const Tensor& hold(const Tensor& x) {
    keep.push_back(x);
    return keep.back();
  }
};

void check_device(const Call& call, const char* name, const Tensor& x) {
  check_backend(kOp, name, x, call.backend);
  check(x.is_cpu() || x.get_device_index() == call.like.get_device_index(), kOp, name,
        "must be on the device of the others", x.get_device_index());
}

// Whether [..., k] is rows at one distance, `distance` elements, of contiguous elements.
bool has_rows(const Tensor& x, int64_t& distance) {
  const int64_t last = x.dim() - 1;
  distance = x.size(last);
  if (x.numel() == 0) return true;
  if (x.size(last) > 1 && x.stride(last) != 1) return false;
  int64_t rows = 1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (rows == 1) distance = x.stride(i);
    if (x.stride(i) != rows * distance) return false;
    rows *= x.size(i);
  }
  return true;
}

// Its elements for a kernel, and the distance of its rows. Other layouts are copied.
const void* rows_of(Call& call, const Tensor& x, int64_t& distance) {
  if (has_rows(x, distance)) return call.hold(x).const_data_ptr();
  const Tensor packed = call.hold(torch::stable::contiguous(x));
  distance = packed.size(packed.dim() - 1);
  return packed.const_data_ptr();
}

const float* side(Call& call, const char* name, const OptionalTensor& x, int64_t count) {
  if (!x) return nullptr;
  check_device(call, name, *x);
  check_floating(kOp, name, *x);
  if (shape_of(*x) != std::vector<int64_t>{count}) {
    fail(kOp, name, "must have shape [" + std::to_string(count) + "]", shape_of(*x));
  }
  return floats(call.hold(as_float32(*x)));
}

// Checks and fills what forward and backward share: sizes, settings, alpha, shift. `main` is x or
// grad.
Call describe(const char* name, const Tensor& main, const OptionalTensor& alpha,
              const OptionalTensor& shift, const std::string& kind, const std::string& ste,
              Backend backend) {
  check_backend(kOp, name, main, backend);
  check(main.dim() >= 1, kOp, name, "must be [..., K]", shape_of(main));
  Call call{main, backend};
  ElasticBinarizeParams& p = call.params;
  p.dtype = kernel_dtype(kOp, name, main);
  p.kind = bit_kind(kOp, "kind", kind);
  p.ste = ste_of(ste);
  p.k = main.size(main.dim() - 1);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < main.dim(); ++i) p.rows *= main.size(i);
  p.shift = side(call, "shift", shift, p.k);
  p.alpha = side(call, "alpha", alpha, 1);
  return call;
}

// Of x's planes: [..., P, bytes].
std::vector<int64_t> planes_shape(const Tensor& x, const ElasticBinarizeParams& p) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = elastic_planes(p.kind, p.ste);
  shape.push_back(bit_row_bytes(p.k));
  return shape;
}

// How work is launched on a kind of device. The sums of a backward pass are zero to begin with.
struct Cpu {
  static constexpr Backend kBackend = Backend::kCpu;

  static void forward(const Call& call) {
    const ElasticBinarizeParams& p = call.params;
    const ElasticBinarizePlan plan = elastic_binarize_plan(p);
    const ElasticBinarizeKernels& kernels = elastic_binarize_kernels();
    torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
      kernels.forward(p, plan, begin, end);
    });
  }

  static void backward(Call& call, const Tensor& dalpha, bool need_alpha, bool need_shift) {
    ElasticBinarizeParams& p = call.params;
    const ElasticBinarizePlan plan = elastic_binarize_plan(p);
    if (plan.tasks == 0 || p.k == 0) return;
    std::vector<double> sums(need_alpha ? static_cast<size_t>(plan.tasks) : 0);
    if (need_alpha) p.partial_alpha = sums.data();
    if (need_shift) {
      p.partial_shift = floats(call.hold(new_float32(call.like, {plan.tasks, p.k})));
    }
    const ElasticBinarizeKernels& kernels = elastic_binarize_kernels();
    torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
      kernels.backward(p, plan, begin, end);
    });
    if (need_shift) {
      const int64_t blocks = (p.k + kElasticColumns - 1) / kElasticColumns;
      const int64_t grain = 1 + 100 / plan.tasks;  // blocks worth another thread
      torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        kernels.reduce(p, plan, begin, end);
      });
    }
    if (need_alpha) {
      double sum = 0;
      for (const double each : sums) sum += each;
      const double elements = static_cast<double>(p.rows) * static_cast<double>(p.k);
      *floats(dalpha) = static_cast<float>(sum / std::sqrt(elements));
    }
  }
};

#ifdef FASTBB_WITH_CUDA
struct Cuda {
  static constexpr Backend kBackend = Backend::kCuda;

  static void forward(const Call& call) {
    const ElasticBinarizeCudaPlan plan = elastic_binarize_cuda_plan(call.params);
    if (plan.forward.grid == 0) return;
    launch_on_device_of(kOp, call.like, [&](void* stream) {
      return elastic_binarize_cuda(call.params, plan, stream);
    });
  }

  static void backward(Call& call, const Tensor& dalpha, bool need_alpha, bool need_shift) {
    ElasticBinarizeParams& p = call.params;
    check(reinterpret_cast<uintptr_t>(p.planes) % 16 == 0, kOp, "planes",
          "must be aligned to 16 bytes", "another address");
    const ElasticBinarizeCudaPlan plan = elastic_binarize_cuda_plan(p);
    if (plan.backward.grid == 0) return;
    if (need_shift) {
      p.partial_shift = floats(call.hold(new_float32(call.like, {plan.tasks, p.k})));
    }
    if (need_alpha) {
      const Tensor sums =
          torch::stable::new_empty(call.like, {plan.backward.grid}, ScalarType::Double);
      p.partial_alpha = static_cast<double*>(call.hold(sums).mutable_data_ptr());
    }
    launch_on_device_of(kOp, call.like, [&](void* stream) {
      return elastic_binarize_backward_cuda(p, plan, need_alpha ? floats(dalpha) : nullptr, stream);
    });
  }
};
#endif

// Of x: values and planes, either or both.
struct Forward {
  Tensor out, planes;
};

template <class Device>
Forward run_forward(const Tensor& x, const OptionalTensor& alpha, const OptionalTensor& shift,
                    const std::string& kind, const std::string& ste, bool values, bool save) {
  Call call = describe("x", x, alpha, shift, kind, ste, Device::kBackend);
  ElasticBinarizeParams& p = call.params;
  p.x = rows_of(call, x, p.x_row);
  const std::vector<int64_t> nothing{0};
  const Tensor out = torch::stable::new_empty(x, values ? shape_of(x) : nothing);
  const Tensor planes =
      torch::stable::new_empty(x, save ? planes_shape(x, p) : nothing, ScalarType::Byte);
  p.out = values ? out.mutable_data_ptr() : nullptr;
  p.planes = save ? static_cast<uint8_t*>(planes.mutable_data_ptr()) : nullptr;
  Device::forward(call);
  return {out, planes};
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& alpha,
                                   const OptionalTensor& shift, const std::string& kind,
                                   const std::string& ste, bool save) {
  const auto [out, planes] = run_forward<Device>(x, alpha, shift, kind, ste, true, save);
  return {out, planes};
}

template <class Device>
Tensor forward_planes(const Tensor& x, const OptionalTensor& alpha, const OptionalTensor& shift,
                      const std::string& kind, const std::string& ste) {
  return run_forward<Device>(x, alpha, shift, kind, ste, false, true).planes;
}

// What the backward pass knows of x: x itself or planes.
void saved(Call& call, const Tensor& grad, const OptionalTensor& x, const Tensor& planes) {
  ElasticBinarizeParams& p = call.params;
  if (needs_x(p.kind, p.ste)) {
    check(x.has_value(), kOp, "x", "must be given for unsigned values and bireal", "None");
    check_device(call, "x", *x);
    check(x->scalar_type() == grad.scalar_type(), kOp, "x", "must have grad's dtype",
          "another dtype");
    check(shape_of(*x) == shape_of(grad), kOp, "x", "must have grad's shape", shape_of(*x));
    p.x = rows_of(call, *x, p.x_row);
    return;
  }
  check_device(call, "planes", planes);
  const std::vector<int64_t> shape = planes_shape(grad, p);
  if (shape_of(planes) != shape) {
    fail(kOp, "planes", "must have shape " + printed(shape), shape_of(planes));
  }
  check(planes.scalar_type() == ScalarType::Byte && planes.is_contiguous(), kOp, "planes",
        "must be contiguous uint8", "another layout");
  p.planes = static_cast<uint8_t*>(call.hold(planes).mutable_data_ptr());
}

// dx, dalpha and dshift; the sums are empty when they are not needed.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <class Device>
Gradients backward(const Tensor& grad, const OptionalTensor& x, const Tensor& planes,
                   const OptionalTensor& alpha, const OptionalTensor& shift,
                   const std::string& kind, const std::string& ste, bool need_alpha,
                   bool need_shift) {
  Call call = describe("grad", grad, alpha, shift, kind, ste, Device::kBackend);
  ElasticBinarizeParams& p = call.params;
  saved(call, grad, x, planes);
  p.grad = rows_of(call, grad, p.grad_row);
  const Tensor dx = torch::stable::new_empty(grad, shape_of(grad));
  const Tensor dalpha = new_float32_zeros(grad, {need_alpha ? 1 : 0});
  const Tensor dshift = new_float32_zeros(grad, {need_shift ? p.k : 0});
  p.dx = dx.mutable_data_ptr();
  if (need_shift) p.dshift = floats(dshift);
  Device::backward(call, dalpha, need_alpha, need_shift);
  return {dx, dalpha, dshift};
}

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) {
  m.def(
      "elastic_binarize(Tensor x, Tensor? alpha, Tensor? shift, str kind, str ste, bool save) "
      "-> (Tensor out, Tensor planes)");
  m.def(
      "elastic_binarize_backward(Tensor grad, Tensor? x, Tensor planes, Tensor? alpha, "
      "Tensor? shift, str kind, str ste, bool need_alpha, bool need_shift) "
      "-> (Tensor dx, Tensor dalpha, Tensor dshift)");
  m.def("elastic_planes(Tensor x, Tensor? alpha, Tensor? shift, str kind, str ste) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) {
  m.impl("elastic_binarize", TORCH_BOX(&fastbb::forward<fastbb::Cpu>));
  m.impl("elastic_planes", TORCH_BOX(&fastbb::forward_planes<fastbb::Cpu>));
  m.impl("elastic_binarize_backward", TORCH_BOX(&fastbb::backward<fastbb::Cpu>));
}

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) {
  m.impl("elastic_binarize", TORCH_BOX(&fastbb::forward<fastbb::Cuda>));
  m.impl("elastic_planes", TORCH_BOX(&fastbb::forward_planes<fastbb::Cuda>));
  m.impl("elastic_binarize_backward", TORCH_BOX(&fastbb::backward<fastbb::Cuda>));
}
#endif
