// SPDX-License-Identifier: Apache-2.0
// fastbb._C: torch-free facts about the build and the machine, and launch plans.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "core/isa.h"
#include "ops/binary_attention/binary_attention_cuda.h"
#include "ops/binary_linear/binary_linear.h"
#include "ops/binary_linear/binary_linear_cuda.h"
#include "ops/binary_pack/binary_pack_cuda.h"
#include "ops/elastic_binarize/elastic_binarize_cuda.h"
#include "ops/null/null_cuda.h"
#include "ops/window_attention/window_attention_cuda.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> levels;
  for (int i = 0; i < fastbb::kIsaCount; ++i) {
    const auto level = static_cast<fastbb::Isa>(i);
    if (fastbb::isa_available(level)) levels.emplace_back(fastbb::isa_name(level));
  }
  return levels;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < fastbb::kIsaCount; ++i) {
    const auto level = static_cast<fastbb::Isa>(i);
    if (name == fastbb::isa_name(level) && fastbb::set_isa(level)) return;
  }
  throw py::value_error("set_isa: level must be available on this machine, got " + name);
}

// What CUDA kernels were built for, or false.
py::object cuda_build() {
#ifdef FASTBB_CUDA_TOOLKIT
  py::dict info;
  info["toolkit"] = FASTBB_CUDA_TOOLKIT;
  info["sm"] = std::vector<int>{FASTBB_CUDA_SM};
  info["ptx"] = FASTBB_CUDA_PTX;
  return info;
#else
  return py::bool_(false);
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTBB_VERSION;
  info["torch_built_with"] = FASTBB_TORCH_BUILD_VERSION;
  info["compiler"] = FASTBB_COMPILER;
  info["cuda"] = cuda_build();
  info["isa"] = fastbb::isa_name(fastbb::isa());
  info["isa_levels"] = isa_levels();
  return info;
}

py::dict launch_of(const fastbb::CudaLaunch& launch) {
  py::dict result;
  result["grid"] = launch.grid;
  result["block"] = launch.block;
  result["shared_bytes"] = launch.shared_bytes;
  return result;
}

py::dict null_cuda_plan(int64_t element_bytes, uintptr_t x, int64_t x_row, uintptr_t out,
                        int64_t rows, int64_t columns) {
  const auto dtype = element_bytes == 4 ? fastbb::Dtype::kFloat32 : fastbb::Dtype::kFloat16;
  const fastbb::NullParams p{
      dtype, reinterpret_cast<const void*>(x), x_row, reinterpret_cast<void*>(out), rows, columns};
  const auto plan = fastbb::null_cuda_plan(p);
  py::dict result;
  result["launch"] = launch_of(plan.launch);
  result["unit_bytes"] = plan.unit_bytes;
  result["units"] = plan.units;
  result["lanes"] = plan.lanes;
  result["chunks"] = plan.chunks;
  return result;
}

py::dict window_attention_plan(int64_t batch, int64_t heads, int64_t head_dim, int64_t nq,
                               int64_t nk, int64_t windows_y, int64_t windows_x, bool q_shared,
                               bool dense_bias_gradient) {
  fastbb::WindowAttentionParams p{};
  p.batch = batch;
  p.heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(head_dim);
  p.nq = nq;
  p.nk = nk;
  p.windows_y = static_cast<int>(windows_y);
  p.windows_x = static_cast<int>(windows_x);
  p.q_shared = q_shared;
  const auto plan = fastbb::window_attention_plan(p, dense_bias_gradient);
  py::dict result;
  result["forward_tasks"] = plan.forward_tasks;
  result["q_block_rows"] = plan.q_block_rows;
  result["key_block"] = plan.key_block;
  result["backward_tasks"] = plan.backward_tasks;
  result["windows_per_chunk"] = plan.windows_per_chunk;
  result["q_splits"] = plan.q_splits;
  result["partial_floats"] = plan.partial_dq + plan.partial_dkv;
  return result;
}

// Parameters as kernels get them, for whoever launches one without the package's launcher.
template <class Params>
Params params_of(const char* function, const std::string& params) {
  Params p;
  if (params.size() != sizeof(p)) {
    throw py::value_error(std::string(function) + ": params must have " +
                          std::to_string(sizeof(p)) + " bytes, got " +
                          std::to_string(params.size()));
  }
  std::memcpy(static_cast<void*>(&p), params.data(), sizeof(p));
  return p;
}

template <class Plan>
py::bytes bytes_of(const Plan& plan) {
  return py::bytes(reinterpret_cast<const char*>(&plan), sizeof(plan));
}

py::dict binary_attention_cuda_plan(const std::string& params) {
  const auto plan = fastbb::binary_attention_cuda_plan(
      params_of<fastbb::BinaryAttentionParams>("binary_attention_cuda_plan", params));
  py::dict result;
  result["bytes"] = bytes_of(plan);
  result["launch"] = launch_of(plan.launch);
  result["q_block"] = plan.q_block;
  result["chunk"] = plan.chunk;
  result["words"] = plan.words;
  result["training"] = plan.training;
  return result;
}

py::dict binary_linear_cuda_plan(const std::string& params, int64_t many_tiles) {
  const auto plan = fastbb::binary_linear_cuda_plan(
      params_of<fastbb::BinaryLinearParams>("binary_linear_cuda_plan", params), many_tiles);
  py::dict result;
  result["bytes"] = bytes_of(plan);
  result["launch"] = launch_of(plan.launch);
  result["rows"] = plan.rows;
  result["aligned"] = plan.aligned;
  return result;
}

py::dict binary_pack_cuda_plan(int64_t rows, int64_t k) {
  const auto words = fastbb::binary_pack_cuda_plan(rows, k);
  const auto stats = fastbb::binary_stats_cuda_plan(rows);
  py::dict result;
  result["bytes"] = bytes_of(words);
  result["launch"] = launch_of(words.launch);
  result["stats_bytes"] = bytes_of(stats);
  result["stats"] = launch_of(stats.launch);
  result["means"] = launch_of(fastbb::binary_means_cuda_launch());
  return result;
}

py::dict elastic_binarize_cuda_plan(const std::string& params) {
  const auto plan = fastbb::elastic_binarize_cuda_plan(
      params_of<fastbb::ElasticBinarizeParams>("elastic_binarize_cuda_plan", params));
  py::dict result;
  result["bytes"] = bytes_of(plan);
  result["forward"] = launch_of(plan.forward);
  result["backward"] = launch_of(plan.backward);
  result["sums"] = launch_of(plan.sums);
  result["rows_per_task"] = plan.rows_per_task;
  result["tasks"] = plan.tasks;
  return result;
}

fastbb::WindowAttentionParams window_attention_params(const std::string& params,
                                                      int64_t many_blocks) {
  const auto p = params_of<fastbb::WindowAttentionParams>("window_attention_cuda_plan", params);
  if (many_blocks < 1) {
    throw py::value_error("window_attention_cuda_plan: many_blocks must be positive, got " +
                          std::to_string(many_blocks));
  }
  return p;
}

// What plans have in common, and the plan as kernels get it.
template <class Plan>
py::dict plan_of(const Plan& plan) {
  py::dict result;
  result["bytes"] = bytes_of(plan);
  result["dim"] = plan.dim;
  result["pack"] = plan.pack;
  result["walk"] = plan.walk;
  result["aligned"] = plan.aligned;
  result["table_shared"] = plan.table_shared;
  return result;
}

py::dict window_attention_cuda_plan(const std::string& params, int64_t many_blocks) {
  const auto p = window_attention_params(params, many_blocks);
  const auto plan = fastbb::window_attention_cuda_plan(p, many_blocks);
  py::dict result = plan_of(plan);
  result["forward"] = launch_of(plan.forward);
  return result;
}

py::dict window_attention_cuda_backward_plan(const std::string& params, int64_t many_blocks) {
  const auto p = window_attention_params(params, many_blocks);
  const auto plan = fastbb::window_attention_cuda_backward_plan(p, many_blocks);
  py::dict result = plan_of(plan);
  result["one_kernel"] = plan.one_kernel;
  result["q_splits"] = plan.q_splits;
  result["workspace"] = plan.workspace;
  result["dense_bias"] = plan.dense_bias;
  result["queries"] = launch_of(plan.queries);
  result["keys"] = launch_of(plan.keys);
  py::list sums;
  for (int i = 0; i < plan.sum_count; ++i) sums.append(launch_of(plan.sums[i].launch));
  result["sums"] = sums;
  result["collapse"] = launch_of(plan.collapse);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, instruction-set levels and launch plans of fastbb (no torch inside).";
  m.def("build_info", &build_info, "What was built, and what runs here.");
  m.def("isa", [] { return fastbb::isa_name(fastbb::isa()); }, "Level in force.");
  m.def("isa_levels", &isa_levels, "Levels of this build that this machine runs, weakest first.");
  m.def("set_isa", &set_isa, py::arg("level"), "Process-wide level of the CPU kernels.");
  m.def("binary_attention_cuda_plan", &binary_attention_cuda_plan, py::arg("params"),
        "How the CUDA kernel of binary_attention is launched; params: the C++ struct.");
  m.def("binary_linear_cuda_plan", &binary_linear_cuda_plan, py::arg("params"),
        py::arg("many_tiles") = fastbb::kBinaryCudaManyTiles,
        "How the CUDA kernel of binary_linear is launched; params: the C++ struct.");
  m.def("binary_pack_cuda_plan", &binary_pack_cuda_plan, py::arg("rows"), py::arg("k"),
        "How the CUDA kernels of binary_pack are launched.");
  m.def(
      "bit_peak", [](int64_t steps) { return fastbb::binary_linear_kernels().peak(steps); },
      py::arg("steps"), py::call_guard<py::gil_scoped_release>(),
      "Counts ones of ANDs in registers for a while, at the level in force; returns how many "
      "bits.");
  m.def("elastic_binarize_cuda_plan", &elastic_binarize_cuda_plan, py::arg("params"),
        "How the CUDA kernels of elastic_binarize are launched; params: the C++ struct.");
  m.def("null_cuda_plan", &null_cuda_plan, py::kw_only(), py::arg("element_bytes"), py::arg("x"),
        py::arg("x_row"), py::arg("out"), py::arg("rows"), py::arg("columns"),
        "How the CUDA kernel of null is launched; x and out are addresses.");
  m.def("window_attention_plan", &window_attention_plan, py::kw_only(), py::arg("batch"),
        py::arg("heads"), py::arg("head_dim"), py::arg("nq"), py::arg("nk"),
        py::arg("windows_y") = 1, py::arg("windows_x") = 1, py::arg("q_shared") = false,
        py::arg("dense_bias_gradient") = false,
        "How window_attention cuts its work; depends on sizes only.");
  m.def("window_attention_cuda_plan", &window_attention_cuda_plan, py::arg("params"),
        py::arg("many_blocks") = fastbb::kWindowCudaManyBlocks,
        "How the CUDA kernels of window_attention are launched; params: the C++ struct.");
  m.def("window_attention_cuda_backward_plan", &window_attention_cuda_backward_plan,
        py::arg("params"), py::arg("many_blocks") = fastbb::kWindowCudaBackwardBlocks,
        "The same for its gradients: pointers in params say which are wanted.");
}
