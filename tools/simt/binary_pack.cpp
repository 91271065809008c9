// SPDX-License-Identifier: Apache-2.0
// Packing. Option: which kernel: 0 packs, 1 adds rows, 2 makes means, 3 unpacks.
#include "case.h"
#include "ops/binary_pack/binary_pack_cuda.h"

const char* simt::run(const Case& given) {
  using namespace fastbb;
  switch (given.options.at(0)) {
    case 0: {
      const auto p = given.params<BinaryPackParams>();
      return binary_pack_cuda(p, binary_pack_cuda_plan(p.rows, p.k), nullptr);
    }
    case 1: {
      const auto p = given.params<BinaryStatsParams>();
      return binary_stats_cuda(p, binary_stats_cuda_plan(p.rows), nullptr);
    }
    case 2:
      return binary_means_cuda(given.params<BinaryMeansParams>(), nullptr);
    default: {
      const auto p = given.params<BinaryUnpackParams>();
      return binary_unpack_cuda(p, binary_pack_cuda_plan(p.rows, p.k), nullptr);
    }
  }
}
