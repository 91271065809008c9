// SPDX-License-Identifier: Apache-2.0
// Elastic binarization. Option: backward. The parameters end with the address of dalpha.
#include "ops/elastic_binarize/elastic_binarize_cuda.h"

#include "case.h"

const char* simt::run(const Case& given) {
  struct Parameters {
    fastbb::ElasticBinarizeParams p;
    float* dalpha;
  };
  const auto [p, dalpha] = given.params<Parameters>();
  const auto plan = fastbb::elastic_binarize_cuda_plan(p);
  if (given.options.at(0) != 0) {
    return fastbb::elastic_binarize_backward_cuda(p, plan, dalpha, nullptr);
  }
  return fastbb::elastic_binarize_cuda(p, plan, nullptr);
}
