// SPDX-License-Identifier: Apache-2.0
// How a CUDA kernel is launched. Plans fill it from sizes alone and compile without a CUDA toolkit,
// so that tests execute PTX with the launches that the package makes.
#pragma once

#include <cstdint>

namespace fastbb {

struct CudaLaunch {
  int64_t grid;          // blocks, along x alone
  int64_t block;         // threads
  int64_t shared_bytes;  // dynamic shared memory
};

}  // namespace fastbb
