// SPDX-License-Identifier: Apache-2.0
// Host code of products of packed bits: schemas, memory-safety checks, allocation, launches.
#include "ops/binary_linear/binary_linear.h"

#include <algorithm>
#include <limits>

#include "core/bit_names.h"
#include "core/torch_api.h"
#include "ops/binary_linear/binary_linear_cuda.h"
#include "ops/binary_pack/binary_pack.h"
#include "ops/binary_pack/binary_pack_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kGemm = "bgemm";
constexpr const char* kLinear = "binary_linear";
// Four times a count of ones must fit into 32 bits.
constexpr int64_t kMaxInner = int64_t{1} << 28;

// Parameters, and the tensors that its pointers lead to.
struct Call {
  const char* op;
  const Tensor& like;
  Backend backend;
  BinaryLinearParams params{};
  std::vector<Tensor> keep{};

  const Tensor& hold(const Tensor& x) {
    keep.push_back(x);
    return keep.back();
  }
};

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  fail(kLinear, "activation", "must be none, relu or gelu", name);
}

void check_device(const Call& call, const char* name, const Tensor& x) {
  check_backend(call.op, name, x, call.backend);
  check(x.is_cpu() || x.get_device_index() == call.like.get_device_index(), call.op, name,
        "must be on the first tensor's device", x.get_device_index());
}

void check_inner(const char* op, int64_t k) {
  check(k >= 0 && k <= kMaxInner, op, "k", "must be 0 to 2^28", k);
}

// Packed rows [..., planes, bytes], contiguous, of `trailing` dimensions that are not of the batch.
// Kernels of CUDA copy 16 bytes at a time: views that start in between are copied.
Tensor check_bits(const Call& call, const char* name, const Tensor& bits, BitKind kind,
                  int64_t trailing, int64_t k) {
  check_device(call, name, bits);
  check(bits.scalar_type() == ScalarType::Byte, call.op, name, "must have dtype uint8",
        "another dtype");
  const int planes = bit_planes(kind);
  const int64_t dims = bits.dim();
  const int64_t least = trailing + (planes == 2 ? 2 : 1);
  check(dims >= least, call.op, name, "must have a dimension of rows before the bytes",
        shape_of(bits));
  check(bits.size(dims - 1) == bit_row_bytes(k), call.op, name,
        "must have 16 bytes for every 128 of k begun in its last dimension", shape_of(bits));
  check(planes == 1 || bits.size(dims - 2) == 2, call.op, name,
        "must have two planes in its last dimension but one", shape_of(bits));
  if (!bits.is_contiguous()) return torch::stable::contiguous(bits);
  const bool aligned = reinterpret_cast<uintptr_t>(bits.const_data_ptr()) % 16 == 0;
  return aligned || call.backend == Backend::kCpu ? bits : torch::stable::clone(bits);
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

#ifdef FASTBB_WITH_CUDA
void launch_cuda(const Call& call) {
  const BinaryLinearCudaPlan plan = binary_linear_cuda_plan(call.params);
  if (plan.launch.grid == 0) return;
  launch_on_device_of(call.op, call.like,
                      [&](void* stream) { return binary_linear_cuda(call.params, plan, stream); });
}

void launch_pack_cuda(const Call& call, const BinaryPackParams& p) {
  const BinaryPackCudaPlan plan = binary_pack_cuda_plan(p.rows, p.k);
  if (plan.launch.grid == 0) return;
  launch_on_device_of(call.op, call.like,
                      [&](void* stream) { return binary_pack_cuda(p, plan, stream); });
}
#endif

void launch(const Call& call) {
#ifdef FASTBB_WITH_CUDA
  if (call.backend == Backend::kCuda) return launch_cuda(call);
#endif
  const BinaryLinearParams& p = call.params;
  const BinaryLinearPlan plan = binary_linear_plan(p, torch::stable::get_num_threads());
  if (plan.tasks == 0) return;
  const BinaryLinearKernels& kernels = binary_linear_kernels();
  torch::stable::parallel_for(
      0, plan.tasks, 1, [&](int64_t begin, int64_t end) { kernels.forward(p, plan, begin, end); });
}

Tensor bgemm(const Tensor& a, const Tensor& b, int64_t k, const std::string& a_name,
             const std::string& b_name, Backend backend) {
  Call call{kGemm, a, backend};
  BinaryLinearParams& p = call.params;
  check_inner(kGemm, k);
  p.a_kind = value_kind(kGemm, "a_kind", a_name);
  p.b_kind = value_kind(kGemm, "b_kind", b_name);
  check(p.b_kind != BitKind::kTernary, kGemm, "b_kind", "must be signed or unsigned", b_name);
  const Tensor& left = call.hold(check_bits(call, "a", a, p.a_kind, 1, k));
  const Tensor right = check_bits(call, "b", b, p.b_kind, 1, k);

  const int planes = bit_planes(p.a_kind);
  std::vector<int64_t> shape = shape_of(left);
  shape.resize(shape.size() - static_cast<size_t>(planes == 2 ? 3 : 2));
  std::vector<int64_t> other = shape_of(right);
  other.resize(other.size() - 2);
  check(shape == other, kGemm, "b", "must have a's batch dimensions", shape_of(right));
  p.batch = product(shape);
  p.m = left.size(left.dim() - (planes == 2 ? 3 : 2));
  p.n = right.size(right.dim() - 2);
  p.k = k;
  shape.push_back(p.m);
  shape.push_back(p.n);
  const Tensor out = torch::stable::new_empty(left, shape, ScalarType::Int);

  const int64_t row = bit_row_bytes(k);
  p.a = static_cast<const uint8_t*>(left.const_data_ptr());
  p.a_row = planes * row;
  p.a_batch = p.m * p.a_row;
  p.b = static_cast<const uint8_t*>(right.const_data_ptr());
  p.b_batch = p.n * row;
  p.out_kind = BinaryOut::kInt32;
  p.out = out.mutable_data_ptr();
  launch(call);
  return out;
}

const float* side(Call& call, const char* name, const OptionalTensor& x,
                  const std::vector<int64_t>& sizes) {
  if (!x) return nullptr;
  check_device(call, name, *x);
  check_floating(call.op, name, *x);
  const bool fits = std::find(sizes.begin(), sizes.end(), x->numel()) != sizes.end();
  if (!fits)
    fail(call.op, name, "must have as many elements as one of " + printed(sizes), x->numel());
  return floats(call.hold(as_float32(*x)));
}

const float* alpha_of(Call& call, const char* name, const OptionalTensor& alpha, BitKind kind) {
  check(alpha || kind != BitKind::kUnsigned, call.op, name, "must be given for unsigned bits",
        "none");
  return side(call, name, alpha, {1});
}

void launch_pack([[maybe_unused]] const Call& call, const BinaryPackParams& p) {
#ifdef FASTBB_WITH_CUDA
  if (call.backend == Backend::kCuda) return launch_pack_cuda(call, p);
#endif
  const BinaryPackPlan plan = binary_pack_plan(p.rows, p.k);
  const BinaryPackKernels& kernels = binary_pack_kernels();
  torch::stable::parallel_for(
      0, plan.tasks, 1, [&](int64_t begin, int64_t end) { kernels.pack(p, plan, begin, end); });
}

// Bits of the rows of x [rows, k], by the kernels of packing.
Tensor pack_rows(Call& call, const Tensor& x, BitKind kind, const float* shift,
                 const float* alpha) {
  const int64_t k = call.params.k;
  check(k <= 1 || x.stride(1) == 1, call.op, "x", "must have a contiguous last dimension, stride 1",
        x.stride(1));
  const std::vector<int64_t> shape = {x.size(0), bit_planes(kind), bit_row_bytes(k)};
  const Tensor bits = torch::stable::new_empty(x, shape, ScalarType::Byte);
  BinaryPackParams p{};
  p.dtype = kernel_dtype(call.op, "x", x);
  p.kind = kind;
  p.x = x.const_data_ptr();
  p.x_row = x.stride(0);
  p.shift = shift;
  p.alpha = alpha;
  p.bits = static_cast<uint8_t*>(bits.mutable_data_ptr());
  p.rows = x.size(0);
  p.k = k;
  launch_pack(call, p);
  return bits;
}

// Leading dimensions of x, which is float [..., k] or packed already.
std::vector<int64_t> lead_of(const Tensor& x, bool packed, BitKind kind) {
  std::vector<int64_t> lead = shape_of(x);
  lead.resize(lead.size() - (packed && kind == BitKind::kTernary ? 2 : 1));
  return lead;
}

void set_weight(Call& call, const Tensor& weight, const Tensor& scale, const OptionalTensor& bias) {
  BinaryLinearParams& p = call.params;
  check(weight.dim() == 2, call.op, "weight_bits", "must be [N, bytes]", shape_of(weight));
  p.b_kind = BitKind::kPlus;
  const Tensor& bits = call.hold(check_bits(call, "weight_bits", weight, p.b_kind, 1, p.k));
  p.b = static_cast<const uint8_t*>(bits.const_data_ptr());
  p.n = bits.size(0);
  p.scale = side(call, "weight_scale", scale, {1, p.n});
  p.scale_column = scale.numel() == 1 ? 0 : 1;
  p.bias = side(call, "bias", bias, {p.n});
}

// The result's tensor, of floats or bits.
Tensor make_out(Call& call, std::vector<int64_t> shape, ScalarType dtype,
                const std::string& out_kind, const OptionalTensor& out_alpha,
                const OptionalTensor& out_shift) {
  BinaryLinearParams& p = call.params;
  if (out_kind == "float") {
    shape.push_back(p.n);
    const Tensor out = torch::stable::new_empty(call.like, shape, dtype);
    p.out_kind = BinaryOut::kFloat;
    p.out_dtype = kernel_dtype(call.op, "out_dtype", out);
    p.out = out.mutable_data_ptr();
    return out;
  }
  p.out_kind = BinaryOut::kBits;
  p.bit_kind = bit_kind(call.op, "out_kind", out_kind);
  p.bit_alpha = alpha_of(call, "out_alpha", out_alpha, p.bit_kind);
  p.bit_shift = side(call, "out_shift", out_shift, {p.n});
  if (p.bit_kind == BitKind::kTernary) shape.push_back(2);
  shape.push_back(bit_row_bytes(p.n));
  // Kernels write whole bytes of elements; padding beyond them is zero.
  const bool padded = p.n % kBitRowUnit != 0;
  const Tensor out = padded ? torch::stable::new_zeros(call.like, shape, ScalarType::Byte)
                            : torch::stable::new_empty(call.like, shape, ScalarType::Byte);
  p.out = out.mutable_data_ptr();
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
              const OptionalTensor& bias, int64_t k, const OptionalTensor& alpha,
              const OptionalTensor& shift, const std::string& kind, const std::string& activation,
              ScalarType out_dtype, const std::string& out_kind, const OptionalTensor& out_alpha,
              const OptionalTensor& out_shift, Backend backend) {
  Call call{kLinear, x, backend};
  BinaryLinearParams& p = call.params;
  check_inner(kLinear, k);
  p.k = k;
  p.batch = 1;
  p.a_kind = bit_kind(kLinear, "kind", kind);
  p.activation = activation_of(activation);
  check_device(call, "x", x);
  check(x.dim() >= 1, kLinear, "x", "must have at least one dimension", x.dim());
  const bool packed = x.scalar_type() == ScalarType::Byte;
  set_weight(call, weight, scale, bias);
  p.alpha = alpha_of(call, "alpha", alpha, p.a_kind);
  const float* offsets = side(call, "shift", shift, {k});
  check(!packed || shift == std::nullopt, kLinear, "shift", "must not be given for packed x",
        "a tensor");
  check(packed || x.size(x.dim() - 1) == k, kLinear, "x", "must have k in its last dimension",
        shape_of(x));
  const Tensor bits = packed ? check_bits(call, "x", x, p.a_kind, 0, k) : x;
  const std::vector<int64_t> lead = lead_of(x, packed, p.a_kind);
  p.m = product(lead);
  const Tensor out = make_out(call, lead, out_dtype, out_kind, out_alpha, out_shift);
  if (p.m == 0 || p.n == 0) return out;

  const Tensor& a = call.hold(
      packed ? bits
             : pack_rows(call, torch::stable::reshape(x, {p.m, k}), p.a_kind, offsets, p.alpha));
  p.a = static_cast<const uint8_t*>(a.const_data_ptr());
  p.a_row = bit_planes(p.a_kind) * bit_row_bytes(k);
  launch(call);
  return out;
}

// What the dispatcher calls, for either device.
template <Backend kBackend>
Tensor bgemm_on(const Tensor& a, const Tensor& b, int64_t k, const std::string& a_kind,
                const std::string& b_kind) {
  return bgemm(a, b, k, a_kind, b_kind, kBackend);
}

template <Backend kBackend>
Tensor linear_on(const Tensor& x, const Tensor& weight_bits, const Tensor& weight_scale,
                 const OptionalTensor& bias, int64_t k, const OptionalTensor& alpha,
                 const OptionalTensor& shift, const std::string& kind,
                 const std::string& activation, ScalarType out_dtype, const std::string& out_kind,
                 const OptionalTensor& out_alpha, const OptionalTensor& out_shift) {
  return linear(x, weight_bits, weight_scale, bias, k, alpha, shift, kind, activation, out_dtype,
                out_kind, out_alpha, out_shift, kBackend);
}

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) {
  m.def("bgemm(Tensor a, Tensor b, int k, str a_kind, str b_kind) -> Tensor");
  m.def(
      "binary_linear(Tensor x, Tensor weight_bits, Tensor weight_scale, Tensor? bias, int k, "
      "Tensor? alpha, Tensor? shift, str kind, str activation, ScalarType out_dtype, "
      "str out_kind, Tensor? out_alpha, Tensor? out_shift) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) {
  m.impl("bgemm", TORCH_BOX(&fastbb::bgemm_on<fastbb::Backend::kCpu>));
  m.impl("binary_linear", TORCH_BOX(&fastbb::linear_on<fastbb::Backend::kCpu>));
}

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) {
  m.impl("bgemm", TORCH_BOX(&fastbb::bgemm_on<fastbb::Backend::kCuda>));
  m.impl("binary_linear", TORCH_BOX(&fastbb::linear_on<fastbb::Backend::kCuda>));
}
#endif
