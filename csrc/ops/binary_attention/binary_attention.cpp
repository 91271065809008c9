// SPDX-License-Identifier: Apache-2.0
// Host code of binary attention: schema, memory-safety checks, allocation, launch.
#include "ops/binary_attention/binary_attention.h"

#include <algorithm>
#include <limits>

#include "core/torch_api.h"
#include "ops/binary_attention/binary_attention_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kOp = "binary_attention";
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

// The arguments in schema order.
struct Inputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &alphas, &mask, &est_q, &est_k, &v_p;
  double scale;
  const std::string &probs, &ste;
  double dropout_p;
  int64_t seed;
  bool save;
};

// out, lse, planes of q, k, v and the probabilities.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Parameters, and the float32 copies that its pointers lead to. All tensors are where k is.
struct Call {
  Backend backend;
  const Tensor& like;
  BinaryAttentionParams params{};
  std::vector<Tensor> keep{};
};

void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  if (shape_of(x) != shape) fail(kOp, name, "must have shape " + printed(shape), shape_of(x));
}

void check_device(const Call& call, const char* name, const Tensor& x) {
  check_backend(kOp, name, x, call.backend);
  check(x.is_cpu() || x.get_device_index() == call.like.get_device_index(), kOp, name,
        "must be on k's device", x.get_device_index());
}

HeadMap head_map(const Call& call, const char* name, const Tensor& x,
                 const std::vector<int64_t>& shape) {
  check_device(call, name, x);
  check_shape(name, x, shape);
  check(x.scalar_type() == call.like.scalar_type(), kOp, name, "must have k's dtype",
        "another dtype");
  check(shape[3] == 1 || x.numel() == 0 || x.stride(3) == 1, kOp, name,
        "must have a contiguous last dimension, stride 1", x.stride(3));
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

const float* side(Call& call, const char* name, const OptionalTensor& x,
                  const std::vector<int64_t>& shape) {
  if (!x) return nullptr;
  check_device(call, name, *x);
  check_floating(kOp, name, *x);
  check_shape(name, *x, shape);
  call.keep.push_back(as_float32(*x));
  return floats(call.keep.back());
}

Ste ste_of(const std::string& name) {
  if (name == "clip") return Ste::kClip;
  if (name == "clip_open") return Ste::kClipOpen;
  if (name == "identity") return Ste::kIdentity;
  fail(kOp, "ste", "must be clip, clip_open or identity", name);
}

void describe_sides(const Inputs& in, Call& call) {
  BinaryAttentionParams& p = call.params;
  p.alphas = side(call, "alphas", in.alphas, {4});
  if (in.mask && in.mask->dim() == 2) {
    p.mask = side(call, "mask", in.mask, {p.batch, p.nk});
    p.mask_image = p.nk;
  } else {
    p.mask = side(call, "mask", in.mask, {p.batch, p.nq, p.nk});
    p.mask_image = p.nq * p.nk;
    p.mask_query = p.nk;
  }
  check(in.est_q.has_value() == in.est_k.has_value(), kOp, "est_q and est_k",
        "must be given together", "one of them");
  if (in.est_q) {
    p.rank = in.est_q->dim() == 3 ? in.est_q->size(2) : 0;
    check(p.rank >= 1, kOp, "est_q", "must be [B, Nq, R] with R at least 1", shape_of(*in.est_q));
    p.est_q = side(call, "est_q", in.est_q, {p.batch, p.nq, p.rank});
    p.est_k = side(call, "est_k", in.est_k, {p.batch, p.nk, p.rank});
  }
  p.v_p = side(call, "v_p", in.v_p, {p.batch, p.nk});
}

// Checks everything that memory safety rests on and fills all but results.
Call describe(const Inputs& in, Backend backend) {
  Call call{backend, in.k};
  BinaryAttentionParams& p = call.params;
  const auto shape = shape_of(in.k);
  check(shape.size() == 4, kOp, "k", "must be [B, Nk, h, d]", shape);
  check(shape[1] >= 1 && shape[1] <= kMaxTokens, kOp, "k", "must have 1 to 2^31-1 tokens", shape);
  check(shape[2] >= 1, kOp, "k", "must have at least one head", shape);
  check(shape[3] >= 1 && shape[3] <= kMaxHeadDim, kOp, "k", "must have a head dim of 1 to 256",
        shape);
  check(in.q.dim() == 4 && in.q.size(1) <= kMaxTokens, kOp, "q",
        "must be [B, Nq, h, d] with fewer than 2^31 tokens", shape_of(in.q));
  p.dtype = kernel_dtype(kOp, "k", in.k);
  p.batch = shape[0];
  p.nq = in.q.size(1);
  p.nk = shape[1];
  p.heads = shape[2];
  p.head_dim = shape[3];
  p.q = head_map(call, "q", in.q, {p.batch, p.nq, p.heads, p.head_dim});
  p.k = head_map(call, "k", in.k, shape);
  p.v = head_map(call, "v", in.v, shape);
  describe_sides(in, call);
  p.scale = static_cast<float>(in.scale);
  check(in.probs == "softmax" || in.probs == "bool", kOp, "probs", "must be softmax or bool",
        in.probs);
  p.bool_probs = in.probs == "bool";
  p.ste = ste_of(in.ste);
  p.dropout = static_cast<float>(in.dropout_p);
  check(p.dropout >= 0 && p.dropout < 1, kOp, "dropout_p", "must be at least 0 and below 1",
        in.dropout_p);
  p.seed = static_cast<uint64_t>(in.seed);
  return call;
}

// The results, to which the parameters point; what is not saved is empty.
Results allocate_results(const Inputs& in, Call& call) {
  BinaryAttentionParams& p = call.params;
  const auto empty = [&] { return torch::stable::new_empty(in.k, {0}, ScalarType::Byte); };
  const auto planes = [&](int64_t tokens, uint8_t*& pointer) {
    const std::vector<int64_t> shape{p.batch, tokens, p.heads, 3, bit_row_bytes(p.head_dim)};
    const Tensor x = torch::stable::new_empty(in.k, shape, ScalarType::Byte);
    pointer = static_cast<uint8_t*>(x.mutable_data_ptr());
    return x;
  };
  const Tensor out = torch::stable::new_empty(in.q, shape_of(in.q));
  p.out = out.mutable_data_ptr();
  if (!in.save) return {out, new_float32(in.k, {0}), empty(), empty(), empty(), empty()};

  Tensor lse = new_float32(in.k, {0});
  if (!p.bool_probs) {
    lse = new_float32(in.k, {p.batch, p.heads, p.nq});
    p.lse = floats(lse);
  }
  const Tensor q_planes = planes(p.nq, p.q_planes);
  const Tensor k_planes = planes(p.nk, p.k_planes);
  const Tensor v_planes = planes(p.nk, p.v_planes);
  const std::vector<int64_t> shape{p.batch, p.heads, p.nq, p.dropout > 0 ? 2 : 1,
                                   bit_row_bytes(p.nk)};
  const Tensor p_planes = torch::stable::new_empty(in.k, shape, ScalarType::Byte);
  p.p_planes = static_cast<uint8_t*>(p_planes.mutable_data_ptr());
  return {out, lse, q_planes, k_planes, v_planes, p_planes};
}

// Tasks worth handing to another thread: some 50 microseconds.
int64_t grain_of(int64_t steps_per_task) {
  constexpr int64_t kSteps = 32 * 1024;  // of a query and a key, or a token's channel
  return steps_per_task >= kSteps ? 1 : kSteps / (steps_per_task + 1) + 1;
}

Results forward_cpu(const Inputs& in) {
  Call call = describe(in, Backend::kCpu);
  const BinaryAttentionParams& p = call.params;
  const Results results = allocate_results(in, call);
  const BinaryAttentionPlan plan = binary_attention_plan(p);
  const Tensor memory = torch::stable::new_empty(in.k, {plan.workspace_bytes}, ScalarType::Byte);
  auto* workspace = static_cast<uint8_t*>(memory.mutable_data_ptr());
  const auto& kernels = binary_attention_kernels();
  torch::stable::parallel_for(
      0, plan.pack_tasks, grain_of(std::min(plan.key_block, p.nk) * p.head_dim),
      [&](int64_t begin, int64_t end) { kernels.pack(p, plan, workspace, begin, end); });
  torch::stable::parallel_for(
      0, plan.tasks, grain_of(plan.q_block * p.nk),
      [&](int64_t begin, int64_t end) { kernels.forward(p, plan, workspace, begin, end); });
  return results;
}

#ifdef FASTBB_WITH_CUDA
Results forward_cuda(const Inputs& in) {
  Call call = describe(in, Backend::kCuda);
  const BinaryAttentionParams& p = call.params;
  check(p.head_dim <= kBinaryAttentionCudaMaxHeadDim, kOp, "k",
        "must have a head dim of up to 128 on CUDA devices", p.head_dim);
  check(p.rank <= kBinaryAttentionCudaMaxRank, kOp, "est_q",
        "must have a rank of up to 64 on CUDA devices", p.rank);
  const Results results = allocate_results(in, call);
  const BinaryAttentionCudaPlan plan = binary_attention_cuda_plan(p);
  if (plan.launch.grid == 0) return results;
  launch_on_device_of(kOp, in.k,
                      [&](void* stream) { return binary_attention_cuda(p, plan, stream); });
  return results;
}
#endif

// What the dispatcher calls.
template <auto kRun>
Results forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& alphas,
                const OptionalTensor& mask, const OptionalTensor& est_q,
                const OptionalTensor& est_k, const OptionalTensor& v_p, double scale,
                const std::string& probs, const std::string& ste, double dropout_p, int64_t seed,
                bool save) {
  return kRun({q, k, v, alphas, mask, est_q, est_k, v_p, scale, probs, ste, dropout_p, seed, save});
}

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) {
  m.def(
      "binary_attention(Tensor q, Tensor k, Tensor v, Tensor? alphas, Tensor? mask, "
      "Tensor? est_q, Tensor? est_k, Tensor? v_p, float scale, str probs, str ste, "
      "float dropout_p, SymInt seed, bool save) "
      "-> (Tensor out, Tensor lse, Tensor q_planes, Tensor k_planes, Tensor v_planes, "
      "Tensor p_planes)");
}

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) {
  m.impl("binary_attention", TORCH_BOX(&fastbb::forward<fastbb::forward_cpu>));
}

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) {
  m.impl("binary_attention", TORCH_BOX(&fastbb::forward<fastbb::forward_cuda>));
}
#endif
