// SPDX-License-Identifier: Apache-2.0
// Host code of packing: schemas, checks, allocation, launches, in this order.
#include "ops/binary_pack/binary_pack.h"

#include <atomic>
#include <limits>

#include "core/bit_names.h"
#include "core/torch_api.h"
#include "ops/binary_pack/binary_pack_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kPack = "pack_bits";
constexpr const char* kWeight = "pack_weight";
constexpr const char* kUnpack = "unpack_bits";
constexpr const char* kEmbedding = "binary_embedding";

// What a call is about: for messages, and where its tensors must be.
struct Site {
  const char* op;
  const Tensor& like;
  Backend backend;
};

void check_device(const Site& site, const char* name, const Tensor& x) {
  check_backend(site.op, name, x, site.backend);
  check(x.is_cpu() || x.get_device_index() == site.like.get_device_index(), site.op, name,
        "must be on the device of the first tensor", x.get_device_index());
}

// A float argument that is used in float32; the tensor to keep alive goes to `keep`.
const float* side(const Site& site, const char* name, const OptionalTensor& x, Tensor& keep) {
  if (!x) return nullptr;
  check_device(site, name, *x);
  check_floating(site.op, name, *x);
  keep = as_float32(*x);
  return static_cast<const float*>(keep.const_data_ptr());
}

// [..., k] as [rows, k] with contiguous columns; a view where strides allow.
Tensor as_rows(const Tensor& x) {
  const int64_t k = x.size(x.dim() - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  const Tensor flat = x.dim() == 2 ? x : torch::stable::reshape(x, {rows, k});
  return k <= 1 || flat.stride(1) == 1 ? flat : torch::stable::contiguous(flat);
}

// Shape of x but for its last dimensions, `dropped` of them.
std::vector<int64_t> leading(const Tensor& x, int64_t dropped) {
  std::vector<int64_t> shape = shape_of(x);
  shape.resize(shape.size() - static_cast<size_t>(dropped));
  return shape;
}

// Weights have no threshold: they cannot be unsigned.
BitKind weight_kind(const std::string& name) {
  check(name == "plus" || name == "minus" || name == "ternary", kWeight, "zero_policy",
        "must be plus, minus or ternary", name);
  return bit_kind(kWeight, "zero_policy", name);
}

// Packed rows of x, uninitialised.
Tensor new_bits(const Tensor& x, BitKind kind, int64_t k) {
  std::vector<int64_t> shape = leading(x, 1);
  if (bit_planes(kind) == 2) shape.push_back(2);
  shape.push_back(bit_row_bytes(k));
  return torch::stable::new_empty(x, shape, ScalarType::Byte);
}

// Runs `task(begin, end)` on groups of rows.
template <class Task>
void for_groups(const BinaryPackPlan& plan, const Task& task) {
  if (plan.tasks > 0) torch::stable::parallel_for(0, plan.tasks, 1, task);
}

void launch_pack(const BinaryPackParams& p) {
  const BinaryPackPlan plan = binary_pack_plan(p.rows, p.k);
  const BinaryPackKernels& kernels = binary_pack_kernels();
  for_groups(plan, [&](int64_t begin, int64_t end) { kernels.pack(p, plan, begin, end); });
}

#ifdef FASTBB_WITH_CUDA
void launch_pack_cuda(const Site& site, const BinaryPackParams& p) {
  const BinaryPackCudaPlan plan = binary_pack_cuda_plan(p.rows, p.k);
  if (plan.launch.grid == 0) return;
  launch_on_device_of(site.op, site.like,
                      [&](void* stream) { return binary_pack_cuda(p, plan, stream); });
}
#endif

// ---- pack_bits ----

// A result, the parameters of its kernel, and the tensors that these point into.
struct PackCall {
  Tensor bits;
  BinaryPackParams params{};
  Tensor x, shift, alpha;
};

PackCall describe_pack(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& alpha,
                       const std::string& kind, Backend backend) {
  const Site site{kPack, x, backend};
  check_backend(kPack, "x", x, backend);
  check(x.dim() >= 1, kPack, "x", "must be [..., K]", shape_of(x));
  PackCall call;
  BinaryPackParams& p = call.params;
  p.dtype = kernel_dtype(kPack, "x", x);
  p.kind = bit_kind(kPack, "kind", kind);
  p.k = x.size(x.dim() - 1);
  if (shift) {
    const bool fits = shift->dim() == 1 && shift->size(0) == p.k;
    check(fits, kPack, "shift", "must have shape [K]", shape_of(*shift));
  }
  const bool needed = p.kind == BitKind::kUnsigned;
  check(alpha.has_value() == needed, kPack, "alpha", "must be given for unsigned bits alone",
        alpha.has_value());
  if (alpha) check(alpha->numel() == 1, kPack, "alpha", "must be [1] or 0-d", shape_of(*alpha));
  p.shift = side(site, "shift", shift, call.shift);
  p.alpha = side(site, "alpha", alpha, call.alpha);
  call.x = as_rows(x);
  p.x = call.x.const_data_ptr();
  p.x_row = call.x.stride(0);
  p.rows = call.x.size(0);
  call.bits = new_bits(x, p.kind, p.k);
  p.bits = static_cast<uint8_t*>(call.bits.mutable_data_ptr());
  return call;
}

Tensor pack_bits(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& alpha,
                 const std::string& kind) {
  const PackCall call = describe_pack(x, shift, alpha, kind, Backend::kCpu);
  launch_pack(call.params);
  return call.bits;
}

#ifdef FASTBB_WITH_CUDA
Tensor pack_bits_cuda(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& alpha,
                      const std::string& kind) {
  const PackCall call = describe_pack(x, shift, alpha, kind, Backend::kCuda);
  launch_pack_cuda({kPack, x, Backend::kCuda}, call.params);
  return call.bits;
}
#endif

// ---- pack_weight ----

// Which rows share a mean.
enum class Over { kNone, kTensor, kRow };

Over over_of(const char* argument, const std::string& name, bool optional) {
  if (name == "tensor") return Over::kTensor;
  if (name == "row") return Over::kRow;
  if (optional && name == "none") return Over::kNone;
  fail(kWeight, argument, optional ? "must be none, tensor or row" : "must be tensor or row", name);
}

// `pack` lacks its center, which comes from the sums.
struct WeightCall {
  Tensor bits, scale;
  Over center, scale_over;
  BinaryPackParams pack{};
  BinaryStatsParams stats{};
  Tensor x, sums;
};

WeightCall describe_weight(const Tensor& weight, const std::string& center,
                           const std::string& scale, const std::string& zero_policy,
                           Backend backend) {
  check_backend(kWeight, "weight", weight, backend);
  check(weight.dim() == 2, kWeight, "weight", "must be [N, K]", shape_of(weight));
  WeightCall call;
  call.center = over_of("center", center, true);
  call.scale_over = over_of("scale", scale, false);
  const Dtype dtype = kernel_dtype(kWeight, "weight", weight);
  const BitKind kind = weight_kind(zero_policy);
  const int64_t rows = weight.size(0), k = weight.size(1);
  call.x = as_rows(weight);
  call.bits = new_bits(weight, kind, k);
  call.scale = new_float32(weight, {call.scale_over == Over::kRow ? rows : 1});
  call.sums = torch::stable::new_empty(weight, {rows, 2}, ScalarType::Double);
  const void* x = call.x.const_data_ptr();
  const int64_t x_row = call.x.stride(0);
  call.stats = {dtype, x, x_row, static_cast<double*>(call.sums.mutable_data_ptr()), rows, k};
  auto* bits = static_cast<uint8_t*>(call.bits.mutable_data_ptr());
  call.pack = {dtype, kind, x, x_row, nullptr, nullptr, 0, nullptr, bits, rows, k};
  return call;
}

// Means of sums[row][column], in float64, rounded once: of each row, or of all of them.
void means_of(const BinaryStatsParams& p, int column, Over over, float* means) {
  double total = 0.0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const double sum = p.sums[2 * row + column];
    if (over == Over::kRow) means[row] = static_cast<float>(sum / static_cast<double>(p.k));
    total += sum;
  }
  if (over == Over::kTensor) {
    means[0] = static_cast<float>(total / static_cast<double>(p.rows * p.k));
  }
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& weight, const std::string& center,
                                       const std::string& scale, const std::string& zero_policy) {
  WeightCall call = describe_weight(weight, center, scale, zero_policy, Backend::kCpu);
  const BinaryStatsParams& stats = call.stats;
  const BinaryPackPlan plan = binary_pack_plan(stats.rows, stats.k);
  const BinaryPackKernels& kernels = binary_pack_kernels();
  for_groups(plan, [&](int64_t begin, int64_t end) { kernels.stats(stats, plan, begin, end); });

  means_of(stats, 1, call.scale_over, floats(call.scale));
  Tensor middle;
  if (call.center != Over::kNone) {
    middle = new_float32(weight, {call.center == Over::kRow ? stats.rows : 1});
    means_of(stats, 0, call.center, floats(middle));
    call.pack.center = floats(middle);
    call.pack.center_row = call.center == Over::kRow ? 1 : 0;
  }
  launch_pack(call.pack);
  return {call.bits, call.scale};
}

#ifdef FASTBB_WITH_CUDA
// Sums, means and bits follow each other on the stream; the host learns of none.
std::tuple<Tensor, Tensor> pack_weight_cuda(const Tensor& weight, const std::string& center,
                                            const std::string& scale,
                                            const std::string& zero_policy) {
  WeightCall call = describe_weight(weight, center, scale, zero_policy, Backend::kCuda);
  const bool rows = call.center == Over::kRow;
  const Tensor middle = new_float32(weight, {rows ? call.stats.rows : 1});
  const BinaryMeansParams means{call.stats.sums,
                                call.stats.rows,
                                call.stats.k,
                                call.center == Over::kNone ? nullptr : floats(middle),
                                rows,
                                floats(call.scale),
                                call.scale_over == Over::kRow};
  call.pack.center = means.center;
  call.pack.center_row = rows ? 1 : 0;
  launch_on_device_of(kWeight, weight, [&](void* stream) {
    const BinaryPackCudaPlan plan = binary_stats_cuda_plan(means.rows);
    const char* problem =
        plan.launch.grid == 0 ? nullptr : binary_stats_cuda(call.stats, plan, stream);
    return problem == nullptr ? binary_means_cuda(means, stream) : problem;
  });
  launch_pack_cuda({kWeight, weight, Backend::kCuda}, call.pack);
  return {call.bits, call.scale};
}
#endif

// ---- unpack_bits and binary_embedding ----

struct UnpackCall {
  Tensor out;
  BinaryUnpackParams params{};
  Tensor bits, ids, scale;
};

Dtype result_dtype(const char* op, ScalarType dtype) {
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::BFloat16) return Dtype::kBFloat16;
  if (dtype == ScalarType::Half) return Dtype::kFloat16;
  fail(op, "dtype", "must be float32, bfloat16 or float16", "another dtype");
}

// Checks bits of rows of k elements, sets all but the result, index and scale.
void describe_bits(const Site& site, const Tensor& bits, BitKind kind, int64_t k, ScalarType dtype,
                   UnpackCall& call) {
  constexpr int64_t kMostElements = std::numeric_limits<int64_t>::max() / 8;
  check_device(site, "bits", bits);
  check(bits.scalar_type() == ScalarType::Byte, site.op, "bits", "must have dtype uint8",
        "another dtype");
  check(k >= 0 && k <= kMostElements, site.op, "k", "must not be negative or too large", k);
  const int64_t planes = bit_planes(kind), dims = bits.dim(), row = bit_row_bytes(k);
  check(dims >= planes && (planes == 1 || bits.size(dims - 2) == 2), site.op, "bits",
        planes == 1 ? "must be [..., bytes]" : "must be [..., 2, bytes]", shape_of(bits));
  check(bits.size(dims - 1) == row, site.op, "bits",
        "must have 16 bytes for every 128 of k begun in its last dimension", shape_of(bits));
  call.bits = bits.is_contiguous() ? bits : torch::stable::contiguous(bits);
  // Kernels of CUDA read words: a view that starts in between is copied.
  const bool aligned = reinterpret_cast<uintptr_t>(call.bits.const_data_ptr()) % 4 == 0;
  if (site.backend == Backend::kCuda && !aligned) call.bits = torch::stable::clone(call.bits);
  BinaryUnpackParams& p = call.params;
  p.dtype = result_dtype(site.op, dtype);
  p.kind = kind;
  p.bits = static_cast<const uint8_t*>(call.bits.const_data_ptr());
  p.bits_row = planes * row;
  p.bit_rows = 1;
  for (int64_t i = 0; i < dims - planes; ++i) p.bit_rows *= bits.size(i);
  p.k = k;
}

void set_result(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype, int64_t rows,
                UnpackCall& call) {
  shape.push_back(call.params.k);
  call.out = torch::stable::new_empty(like, shape, dtype);
  call.params.out = call.out.mutable_data_ptr();
  call.params.rows = rows;
}

UnpackCall describe_unpack(const Tensor& bits, int64_t k, const std::string& kind, ScalarType dtype,
                           Backend backend) {
  const BitKind values = value_kind(kUnpack, "kind", kind);
  UnpackCall call;
  describe_bits({kUnpack, bits, backend}, bits, values, k, dtype, call);
  set_result(bits, leading(bits, bit_planes(values)), dtype, call.params.bit_rows, call);
  return call;
}

UnpackCall describe_embedding(const Tensor& ids, const Tensor& bits, const Tensor& scale, int64_t k,
                              ScalarType dtype, Backend backend) {
  const Site site{kEmbedding, ids, backend};
  check_backend(kEmbedding, "ids", ids, backend);
  const ScalarType type = ids.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, kEmbedding, "ids",
        "must have dtype int64 or int32", "another dtype");
  check(bits.dim() == 2, kEmbedding, "bits", "must be [V, bytes]", shape_of(bits));
  UnpackCall call;
  BinaryUnpackParams& p = call.params;
  describe_bits(site, bits, BitKind::kPlus, k, dtype, call);
  const bool fits = scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == p.bit_rows);
  check(fits, kEmbedding, "scale", "must be [V] or [1]", shape_of(scale));
  p.scale = side(site, "scale", scale, call.scale);
  p.scale_row = scale.size(0) == 1 ? 0 : 1;
  const Tensor wide = type == ScalarType::Long ? ids : torch::stable::to(ids, ScalarType::Long);
  call.ids = wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
  p.index = static_cast<const int64_t*>(call.ids.const_data_ptr());
  set_result(bits, shape_of(ids), dtype, ids.numel(), call);
  return call;
}

void launch_unpack(const BinaryUnpackParams& p) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  const BinaryPackPlan plan = binary_pack_plan(p.rows, p.k);
  const BinaryPackKernels& kernels = binary_pack_kernels();
  for_groups(plan, [&](int64_t begin, int64_t end) {
    const int64_t bad = kernels.unpack(p, plan, begin, end);
    if (bad < 0) return;
    int64_t known = first_bad.load();
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  const int64_t bad = first_bad.load();
  if (bad == kNone) return;
  const std::string rule = "must be at least 0 and less than V = " + std::to_string(p.bit_rows);
  fail(kEmbedding, "ids", rule, p.index[bad]);
}

Tensor unpack_bits(const Tensor& bits, int64_t k, const std::string& kind, ScalarType dtype) {
  const UnpackCall call = describe_unpack(bits, k, kind, dtype, Backend::kCpu);
  launch_unpack(call.params);
  return call.out;
}

Tensor binary_embedding(const Tensor& ids, const Tensor& bits, const Tensor& scale, int64_t k,
                        ScalarType dtype) {
  const UnpackCall call = describe_embedding(ids, bits, scale, k, dtype, Backend::kCpu);
  launch_unpack(call.params);
  return call.out;
}

#ifdef FASTBB_WITH_CUDA
void launch_unpack_cuda(const Site& site, const BinaryUnpackParams& p) {
  const BinaryPackCudaPlan plan = binary_pack_cuda_plan(p.rows, p.k);
  if (plan.launch.grid == 0) return;
  launch_on_device_of(site.op, site.like,
                      [&](void* stream) { return binary_unpack_cuda(p, plan, stream); });
}

Tensor unpack_bits_cuda(const Tensor& bits, int64_t k, const std::string& kind, ScalarType dtype) {
  const UnpackCall call = describe_unpack(bits, k, kind, dtype, Backend::kCuda);
  launch_unpack_cuda({kUnpack, bits, Backend::kCuda}, call.params);
  return call.out;
}

// Rows of ids beyond the table are NaN: nobody waits for the device here.
Tensor binary_embedding_cuda(const Tensor& ids, const Tensor& bits, const Tensor& scale, int64_t k,
                             ScalarType dtype) {
  const UnpackCall call = describe_embedding(ids, bits, scale, k, dtype, Backend::kCuda);
  launch_unpack_cuda({kEmbedding, ids, Backend::kCuda}, call.params);
  return call.out;
}
#endif

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) {
  m.def("pack_bits(Tensor x, Tensor? shift, Tensor? alpha, str kind) -> Tensor");
  m.def("pack_weight(Tensor weight, str center, str scale, str zero_policy) -> (Tensor, Tensor)");
  m.def("unpack_bits(Tensor bits, SymInt k, str kind, ScalarType dtype) -> Tensor");
  m.def(
      "binary_embedding(Tensor ids, Tensor bits, Tensor scale, int k, ScalarType dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&fastbb::pack_bits));
  m.impl("pack_weight", TORCH_BOX(&fastbb::pack_weight));
  m.impl("unpack_bits", TORCH_BOX(&fastbb::unpack_bits));
  m.impl("binary_embedding", TORCH_BOX(&fastbb::binary_embedding));
}

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&fastbb::pack_bits_cuda));
  m.impl("pack_weight", TORCH_BOX(&fastbb::pack_weight_cuda));
  m.impl("unpack_bits", TORCH_BOX(&fastbb::unpack_bits_cuda));
  m.impl("binary_embedding", TORCH_BOX(&fastbb::binary_embedding_cuda));
}
#endif
