// SPDX-License-Identifier: Apache-2.0
// The only file that includes torch: its stable ABI. Host code uses the names defined here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"

namespace fastbb {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// Element type of a tensor that kernels take directly.
inline Dtype kernel_dtype(const char* op, const char* argument, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(op, argument, "must be float32, bfloat16 or float16", "another dtype");
  }
}

inline void check_floating(const char* op, const char* argument, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
            type == ScalarType::Double,
        op, argument, "must have a floating-point dtype", "another dtype");
}

// float32 and contiguous; copies only when it has to.
inline Tensor as_float32(const Tensor& x) {
  const Tensor converted =
      x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline Tensor new_float32(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

inline Tensor new_float32_zeros(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_zeros(like, shape, ScalarType::Float);
}

// Which device the memory of a call is on. The dispatcher looks at some arguments only, and
// operators can be called past it.
enum class Backend { kCpu, kCuda };

inline void check_backend(const char* op, const char* argument, const Tensor& x, Backend backend) {
  const bool cuda = backend == Backend::kCuda;
  check(cuda ? x.is_cuda() : x.is_cpu(), op, argument,
        cuda ? "must be a CUDA tensor" : "must be a CPU tensor", "another device");
}

// Calls `launch(stream)` with x's device current and torch's current stream on it. What it
// returns is the text of an error, or nullptr.
template <class Launch>
void launch_on_device_of(const char* op, const Tensor& x, const Launch& launch) {
  const auto device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto stream = torch::stable::accelerator::getCurrentStream(device);
  if (const char* problem = launch(stream.nativeHandle())) {
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + problem);
  }
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace fastbb
