// SPDX-License-Identifier: Apache-2.0
// Host code of window attention: schemas, memory-safety checks, allocation, launches.
#include "ops/window_attention/window_attention.h"

#include <limits>

#include "core/torch_api.h"
#include "ops/window_attention/window_attention_cuda.h"

namespace fastbb {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxWindowTokens = 65536;
constexpr int kSides = 5;  // bias_table, bias, scale, k_pad, v_pad: optional gradients

// q, k and v as views, however they were given: apart; k and v packed in k [.., 2, h, d]; or all
// three packed in q [.., 3, h, d]. Packed, they get packed gradients, which the projection before
// them takes without a copy.
struct Views {
  Tensor q, k, v;
};

Tensor part(const Tensor& packed, int64_t index) {
  return torch::stable::select(packed, packed.dim() - 3, index);
}

void check_packed(const char* name, const Tensor& x, int64_t parts) {
  if (x.dim() < 4 || x.size(x.dim() - 3) != parts) {
    fail(kOp, name, "must be packed [..., " + std::to_string(parts) + ", h, d]", shape_of(x));
  }
}

Views views_of(const Tensor& q, const OptionalTensor& k, const OptionalTensor& v) {
  check(k || !v, kOp, "v", "must not be given without k", "v alone");
  if (v) return {q, *k, *v};
  if (k) {
    check_packed("k", *k, 2);
    return {q, part(*k, 0), part(*k, 1)};
  }
  check_packed("q", q, 3);
  return {part(q, 0), part(q, 1), part(q, 2)};
}

// The arguments that forward and backward share, in schema order.
struct Inputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &bias_table, &bias, &mask, &scale_per_head, &k_pad, &v_pad;
  const std::vector<int64_t>&window, &shift;
  const std::string& pad_mode;
  const std::optional<double>& swin_mask_value;
  double scale;
  bool qk_l2norm, tf32;
};

// Parameters, and the float32 copies that its pointers lead to. All tensors are where `like` is.
struct Call {
  const Tensor& like;
  Backend backend;
  WindowAttentionParams params{};
  std::vector<Tensor> keep{};

  const float* hold(const Tensor& x) {
    keep.push_back(x);
    return floats(keep.back());
  }
};

PadMode pad_mode_of(const std::string& name) {
  if (name == "none") return PadMode::kNone;
  if (name == "pad_then_roll") return PadMode::kPadThenRoll;
  if (name == "roll_then_pad") return PadMode::kRollThenPad;
  fail(kOp, "pad_mode", "must be none, pad_then_roll or roll_then_pad", name);
}

void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  if (shape_of(x) != shape) fail(kOp, name, "must have shape " + printed(shape), shape_of(x));
}

void check_device(const char* name, const Tensor& x, const Tensor& like) {
  check_backend(kOp, name, x, like.is_cpu() ? Backend::kCpu : Backend::kCuda);
  check(x.is_cpu() || x.get_device_index() == like.get_device_index(), kOp, name,
        "must be on k's device", x.get_device_index());
}

// A tensor that kernels address through strides.
void check_main(const char* name, const Tensor& x, const Tensor& like,
                const std::vector<int64_t>& shape) {
  check_device(name, x, like);
  check_shape(name, x, shape);
  check(x.scalar_type() == like.scalar_type(), kOp, name, "must have k's dtype", "another dtype");
  check(shape.back() == 1 || x.numel() == 0 || x.stride(x.dim() - 1) == 1, kOp, name,
        "must have a contiguous last dimension, stride 1", x.stride(x.dim() - 1));
}

// [B, y, x, h, d] or, without a map, [B, tokens, h, d].
TokenMap token_map(const Tensor& x) {
  TokenMap map{};
  map.data = const_cast<void*>(x.const_data_ptr());
  const int64_t dims = x.dim();
  map.image = x.stride(0);
  map.row = dims == 5 ? x.stride(1) : 0;
  map.column = x.stride(dims - 3);
  map.head = x.stride(dims - 2);
  return map;
}

void check_side(const Call& call, const char* name, const Tensor& x,
                const std::vector<int64_t>& shape) {
  check_device(name, x, call.like);
  check_floating(kOp, name, x);
  check_shape(name, x, shape);
}

const float* side(Call& call, const char* name, const OptionalTensor& x,
                  const std::vector<int64_t>& shape) {
  if (!x) return nullptr;
  check_side(call, name, *x, shape);
  return call.hold(as_float32(*x));
}

// Key or value of a padded token: rounded as a computed one would be.
const float* pad(Call& call, const char* name, const OptionalTensor& x, int64_t channels) {
  if (!x) return nullptr;
  check_side(call, name, *x, {channels});
  return call.hold(as_float32(torch::stable::to(*x, call.like.scalar_type())));
}

// [(2wh-1)(2ww-1), h], for CPU kernels -> [h, rows] with rows reversed: see expand_bias_row.
const float* table_of(Call& call, const OptionalTensor& table) {
  if (!table) return nullptr;
  const WindowAttentionParams& p = call.params;
  const int64_t rows = int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1);
  check_side(call, "bias_table", *table, {rows, p.heads});
  const Tensor source = as_float32(*table);
  if (call.backend == Backend::kCuda) return call.hold(source);
  const Tensor flipped = new_float32(source, {p.heads, rows});
  const float* from = floats(source);
  float* to = floats(flipped);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t i = 0; i < rows; ++i) to[head * rows + i] = from[(rows - 1 - i) * p.heads + head];
  }
  return call.hold(flipped);
}

void describe_full(const Inputs& in, WindowAttentionParams& p) {
  const auto k_shape = shape_of(in.k);
  p.full = true;
  p.nk = k_shape[1];
  check(in.q.dim() == 4, kOp, "q", "must be [B, Nq, h, d]", shape_of(in.q));
  p.nq = in.q.size(1);
  check(p.nk >= 1, kOp, "k", "must have at least one token", k_shape);
  check(p.nq <= kMaxTokens && p.nk <= kMaxTokens, kOp, "q and k", "must have fewer tokens", p.nq);
  check(in.window.empty() && !in.bias_table && !in.k_pad && !in.v_pad && !in.swin_mask_value, kOp,
        "window, bias_table, k_pad, v_pad and swin_mask_value", "need 5-D k and v", k_shape);
  for (const int64_t s : in.shift) check(s == 0, kOp, "shift", "must be 0", in.shift);
  pad_mode_of(in.pad_mode);
  check_main("q", in.q, in.k, {p.batch, p.nq, p.heads, p.head_dim});
  p.windows_y = p.windows_x = 1;
}

void describe_windows(const Inputs& in, WindowAttentionParams& p) {
  const auto k_shape = shape_of(in.k);
  const int64_t h = k_shape[1], w = k_shape[2];
  check(in.window.size() == 2, kOp, "window", "must be two ints", in.window);
  const int64_t wh = in.window[0], ww = in.window[1];
  check(wh >= 1 && ww >= 1 && wh <= kMaxWindowTokens / ww, kOp, "window",
        "must have 1 to 65536 tokens", in.window);
  check(in.shift.size() == 2, kOp, "shift", "must be two ints", in.shift);
  check(in.shift[0] >= 0 && in.shift[0] < wh && in.shift[1] >= 0 && in.shift[1] < ww, kOp, "shift",
        "must satisfy 0 <= shift < window", in.shift);
  check(h >= 1 && w >= 1 && h <= kMaxTokens - wh && w <= kMaxTokens - ww &&
            h + wh <= kMaxTokens / (w + ww),
        kOp, "k", "must have a map of 1 to 2^31-1 padded tokens", k_shape);
  p.pad_mode = pad_mode_of(in.pad_mode);
  check(p.pad_mode != PadMode::kNone || (h % wh == 0 && w % ww == 0), kOp, "window",
        "must divide the map when pad_mode is none", in.window);
  p.map_h = static_cast<int>(h);
  p.map_w = static_cast<int>(w);
  p.window_h = static_cast<int>(wh);
  p.window_w = static_cast<int>(ww);
  p.shift_h = static_cast<int>(in.shift[0]);
  p.shift_w = static_cast<int>(in.shift[1]);
  p.windows_y = static_cast<int>((h + wh - 1) / wh);
  p.windows_x = static_cast<int>((w + ww - 1) / ww);
  p.nq = p.nk = wh * ww;
  p.q_shared = in.q.dim() == 4;
  if (p.q_shared) {
    check_main("q", in.q, in.k, {p.batch, p.nq, p.heads, p.head_dim});
  } else {
    check_main("q", in.q, in.k, k_shape);
  }
}

// Checks everything that memory safety rests on and fills all but results and gradients.
Call describe(const Inputs& in, Backend backend) {
  check_backend(kOp, "k", in.k, backend);
  Call call{in.k, backend};
  WindowAttentionParams& p = call.params;
  const auto k_shape = shape_of(in.k);
  check(k_shape.size() == 4 || k_shape.size() == 5, kOp, "k",
        "must be [B, H, W, h, d] or [B, Nk, h, d]", k_shape);
  p.dtype = kernel_dtype(kOp, "k", in.k);
  p.batch = k_shape[0];
  const int64_t heads = k_shape[k_shape.size() - 2], head_dim = k_shape.back();
  check(heads >= 1 && heads <= kMaxTokens, kOp, "k", "must have at least one head", k_shape);
  check(head_dim >= 1 && head_dim <= kMaxHeadDim, kOp, "k", "must have a head dim of 1 to 128",
        k_shape);
  p.heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(head_dim);
  check_main("k", in.k, in.k, k_shape);
  check_main("v", in.v, in.k, k_shape);
  if (k_shape.size() == 4) {
    describe_full(in, p);
  } else {
    describe_windows(in, p);
  }
  p.q = token_map(in.q);
  p.k = token_map(in.k);
  p.v = token_map(in.v);
  p.table = table_of(call, in.bias_table);
  p.bias = side(call, "bias", in.bias, {heads, p.nq, p.nk});
  p.bias_ld = p.nk;
  check(p.table == nullptr || p.bias == nullptr, kOp, "bias", "must not come with bias_table",
        "both");
  if (in.mask) {
    p.mask_count = in.mask->dim() == 3 ? in.mask->size(0) : 0;
    check(p.mask_count >= 1, kOp, "mask", "must be [nM, Nq, Nk]", shape_of(*in.mask));
    p.mask = side(call, "mask", in.mask, {p.mask_count, p.nq, p.nk});
  }
  p.k_pad = pad(call, "k_pad", in.k_pad, heads * head_dim);
  p.v_pad = pad(call, "v_pad", in.v_pad, heads * head_dim);
  p.scale_per_head = side(call, "scale_per_head", in.scale_per_head, {heads});
  p.scale = static_cast<float>(in.scale);
  p.swin_mask = in.swin_mask_value.has_value();
  p.swin_mask_value = static_cast<float>(in.swin_mask_value.value_or(0.0));
  p.qk_l2norm = in.qk_l2norm;
  p.tf32 = in.tf32;
  return call;
}

void expand_bias(Call& call, const WindowAttentionPlan& plan, const Tensor& like) {
  if (!plan.expand_bias) return;
  WindowAttentionParams& p = call.params;
  const int64_t ld = window_attention_bias_ld(p);
  const Tensor dense = new_float32(like, {p.heads, p.nq, ld});
  window_attention_kernels().expand_bias(p, floats(dense), ld, 0, p.heads);
  p.bias = call.hold(dense);
  p.bias_ld = ld;
}

std::vector<int64_t> lse_shape(const WindowAttentionParams& p) {
  return {p.batch, int64_t{p.windows_y} * p.windows_x, p.heads, p.nq};
}

std::vector<int64_t> out_shape(const Inputs& in, const WindowAttentionParams& p) {
  return p.full ? shape_of(in.q) : shape_of(in.k);
}

// Tasks worth handing to another thread: some 50 microseconds of arithmetic.
int64_t grain_of(int64_t flops_per_task) {
  constexpr int64_t kFlops = 2'000'000;
  return flops_per_task >= kFlops ? 1 : kFlops / (flops_per_task + 1) + 1;
}

// The results of the forward pass, to which p points.
std::tuple<Tensor, Tensor> allocate_results(const Inputs& in, WindowAttentionParams& p) {
  const Tensor out = torch::stable::new_empty(in.q, out_shape(in, p));
  const Tensor lse = new_float32(in.q, lse_shape(p));
  p.out = token_map(out);
  p.lse = floats(lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> forward_cpu(const Inputs& in) {
  Call call = describe(in, Backend::kCpu);
  WindowAttentionParams& p = call.params;
  const auto results = allocate_results(in, p);
  const auto plan = window_attention_plan(p, false);
  expand_bias(call, plan, in.q);
  const auto& kernels = window_attention_kernels();
  const int64_t flops = 4 * plan.q_block_rows * p.nk * p.head_dim;
  torch::stable::parallel_for(
      0, plan.forward_tasks, grain_of(flops),
      [&](int64_t begin, int64_t end) { kernels.forward(p, plan, begin, end); });
  return results;
}

#ifdef FASTBB_WITH_CUDA
std::tuple<Tensor, Tensor> forward_cuda(const Inputs& in) {
  Call call = describe(in, Backend::kCuda);
  WindowAttentionParams& p = call.params;
  const auto results = allocate_results(in, p);
  const auto plan = window_attention_cuda_plan(p);
  if (plan.forward.grid == 0) return results;
  launch_on_device_of(kOp, in.k,
                      [&](void* stream) { return window_attention_forward_cuda(p, plan, stream); });
  return results;
}
#endif

// What the dispatcher calls, for either device.
template <auto kRun>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const OptionalTensor& k,
                                   const OptionalTensor& v, const OptionalTensor& bias_table,
                                   const OptionalTensor& bias, const OptionalTensor& mask,
                                   const OptionalTensor& scale_per_head,
                                   const OptionalTensor& k_pad, const OptionalTensor& v_pad,
                                   const std::vector<int64_t>& window,
                                   const std::vector<int64_t>& shift, const std::string& pad_mode,
                                   const std::optional<double>& swin_mask_value, double scale,
                                   bool qk_l2norm, bool tf32) {
  const Views views = views_of(q, k, v);
  return kRun({views.q, views.k, views.v, bias_table, bias, mask, scale_per_head, k_pad, v_pad,
               window, shift, pad_mode, swin_mask_value, scale, qk_l2norm, tf32});
}

// A side gradient and, when asked for, its pointer; not asked for: an empty tensor.
Tensor side_gradient(const Tensor& like, const OptionalTensor& x, bool need, float*& pointer) {
  if (!x || !need) return new_float32(like, {0});
  Tensor grad = new_float32_zeros(like, shape_of(*x));
  pointer = floats(grad);
  return grad;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Float workspaces of a call; null for none.
float* workspace(Call& call, int64_t count) {
  if (count == 0) return nullptr;
  return const_cast<float*>(call.hold(new_float32(call.like, {count})));
}

void backward_cpu(Call& call) {
  WindowAttentionParams& p = call.params;
  WindowAttentionGradients& g = p.grad;
  const auto plan = window_attention_plan(p, g.dbias != nullptr);
  expand_bias(call, plan, call.like);
  int64_t sums = 0;  // floats that the reduction reads
  const auto partial = [&](bool need, int64_t count) -> float* {
    sums += need ? count : 0;
    return workspace(call, need ? count : 0);
  };
  const int64_t groups = plan.backward_tasks;
  const int64_t rows = int64_t{2 * p.window_h - 1} * (2 * p.window_w - 1);
  g.partial_table = partial(g.dtable != nullptr, groups * rows);
  g.partial_scale = partial(g.dscale != nullptr, groups);
  g.partial_pads = partial(g.dk_pad != nullptr || g.dv_pad != nullptr, groups * 2 * p.head_dim);
  g.partial_dq = partial(true, plan.partial_dq);
  g.partial_dkv = partial(true, plan.partial_dkv);

  const auto& kernels = window_attention_kernels();
  torch::stable::parallel_for(
      0, groups, grain_of(10 * plan.q_split_rows * p.nk * p.head_dim * plan.windows_per_chunk),
      [&](int64_t begin, int64_t end) { kernels.backward(p, plan, begin, end); });
  if (sums > 0) {
    torch::stable::parallel_for(
        0, p.batch * p.heads, grain_of(sums / (p.batch * p.heads)),
        [&](int64_t begin, int64_t end) { kernels.reduce(p, plan, begin, end); });
  }
}

#ifdef FASTBB_WITH_CUDA
void backward_cuda(Call& call) {
  const WindowAttentionParams& p = call.params;
  const auto plan = window_attention_cuda_backward_plan(p);
  float* space = workspace(call, plan.workspace);
  launch_on_device_of(kOp, call.like, [&](void* stream) {
    return window_attention_backward_cuda(p, plan, space, stream);
  });
}
#endif

// What the dispatcher calls, for either device.
template <Backend kBackend, auto kRun>
Gradients backward(const Tensor& grad_out, const Tensor& q, const OptionalTensor& k,
                   const OptionalTensor& v, const Tensor& lse, const OptionalTensor& bias_table,
                   const OptionalTensor& bias, const OptionalTensor& mask,
                   const OptionalTensor& scale_per_head, const OptionalTensor& k_pad,
                   const OptionalTensor& v_pad, const std::vector<int64_t>& window,
                   const std::vector<int64_t>& shift, const std::string& pad_mode,
                   const std::optional<double>& swin_mask_value, double scale, bool qk_l2norm,
                   bool tf32, const std::vector<bool>& need_side) {
  const Views views = views_of(q, k, v);
  const Inputs in{views.q,         views.k, views.v,   bias_table, bias,  mask,
                  scale_per_head,  k_pad,   v_pad,     window,     shift, pad_mode,
                  swin_mask_value, scale,   qk_l2norm, tf32};
  Call call = describe(in, kBackend);
  WindowAttentionParams& p = call.params;
  WindowAttentionGradients& g = p.grad;
  check_main("grad_out", grad_out, in.k, out_shape(in, p));
  check_device("lse", lse, in.k);
  check_shape("lse", lse, lse_shape(p));
  check(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), kOp, "lse",
        "must be contiguous float32", "another layout");
  check(need_side.size() == kSides, kOp, "need_side", "must have 5 entries", need_side.size());
  p.lse = floats(lse);
  g.grad_out = token_map(grad_out);

  // With no query or no image nothing runs, and the gradients are the zeros allocated here.
  const bool none = p.nq == 0 || p.batch == 0;
  const auto gradient = [none](const Tensor& x) {
    return none ? torch::stable::new_zeros(x, shape_of(x))
                : torch::stable::new_empty(x, shape_of(x));
  };
  const Tensor dq = gradient(q);
  const Tensor dk = k ? gradient(*k) : new_float32(q, {0});
  const Tensor dv = v ? gradient(*v) : new_float32(q, {0});
  const Views gradients =
      views_of(dq, k ? OptionalTensor(dk) : std::nullopt, v ? OptionalTensor(dv) : std::nullopt);
  g.dq = token_map(gradients.q);
  g.dk = token_map(gradients.k);
  g.dv = token_map(gradients.v);
  const Tensor dtable = side_gradient(q, bias_table, need_side[0], g.dtable);
  const Tensor dbias = side_gradient(q, bias, need_side[1], g.dbias);
  const Tensor dscale = side_gradient(q, scale_per_head, need_side[2], g.dscale);
  const Tensor dk_pad = side_gradient(q, k_pad, need_side[3], g.dk_pad);
  const Tensor dv_pad = side_gradient(q, v_pad, need_side[4], g.dv_pad);
  if (!none) kRun(call);
  return {dq, dk, dv, dtable, dbias, dscale, dk_pad, dv_pad};
}

}  // namespace
}  // namespace fastbb

STABLE_TORCH_LIBRARY_FRAGMENT(fastbb, m) {
  m.def(
      "window_attention(Tensor q, Tensor? k, Tensor? v, Tensor? bias_table, Tensor? bias, "
      "Tensor? mask, Tensor? scale_per_head, Tensor? k_pad, Tensor? v_pad, int[] window, "
      "int[] shift, str pad_mode, float? swin_mask_value, float scale, bool qk_l2norm, "
      "bool tf32) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor q, Tensor? k, Tensor? v, Tensor lse, "
      "Tensor? bias_table, Tensor? bias, Tensor? mask, Tensor? scale_per_head, "
      "Tensor? k_pad, Tensor? v_pad, int[] window, int[] shift, str pad_mode, "
      "float? swin_mask_value, float scale, bool qk_l2norm, bool tf32, bool[] need_side) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias_table, Tensor dbias, Tensor dscale, "
      "Tensor dk_pad, Tensor dv_pad)");
}

STABLE_TORCH_LIBRARY_IMPL(fastbb, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&fastbb::forward<fastbb::forward_cpu>));
  m.impl("window_attention_backward",
         TORCH_BOX((&fastbb::backward<fastbb::Backend::kCpu, fastbb::backward_cpu>)));
}

#ifdef FASTBB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) {
  m.impl("window_attention", TORCH_BOX(&fastbb::forward<fastbb::forward_cuda>));
  m.impl("window_attention_backward",
         TORCH_BOX((&fastbb::backward<fastbb::Backend::kCuda, fastbb::backward_cuda>)));
}
#endif
