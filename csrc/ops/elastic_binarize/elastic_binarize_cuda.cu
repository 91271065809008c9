// SPDX-License-Identifier: Apache-2.0
// Launches of elastic binarization by element type.
#include "core/launch.cuh"
#include "ops/elastic_binarize/elastic_binarize_cuda.cuh"

namespace fastbb {
namespace {

// Calls run(Element{}) with the type of p's elements.
template <class Run>
const char* with_element(const ElasticBinarizeParams& p, const Run& run) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kBFloat16:
      return run(__nv_bfloat16{});
    case Dtype::kFloat16:
      return run(__half{});
  }
  return "an element type without kernels";
}

}  // namespace

const char* elastic_binarize_cuda(const ElasticBinarizeParams& p,
                                  const ElasticBinarizeCudaPlan& plan, void* stream) {
  return with_element(p, [&](auto element) {
    return cuda::launch(cuda::elastic_binarize_forward<decltype(element)>, plan.forward, stream, p,
                        plan);
  });
}

const char* elastic_binarize_backward_cuda(const ElasticBinarizeParams& p,
                                           const ElasticBinarizeCudaPlan& plan, float* dalpha,
                                           void* stream) {
  const char* problem = nullptr;
  if (plan.backward.grid > 0) {
    problem = with_element(p, [&](auto element) {
      using Element = decltype(element);
      return cuda::launch(needs_x(p.kind, p.ste) ? cuda::elastic_binarize_backward<Element, true>
                                                 : cuda::elastic_binarize_backward<Element, false>,
                          plan.backward, stream, p, plan);
    });
  }
  if (problem != nullptr || (p.dshift == nullptr && dalpha == nullptr)) return problem;
  return cuda::launch(cuda::elastic_binarize_sums, plan.sums, stream, p, plan, dalpha);
}

}  // namespace fastbb
