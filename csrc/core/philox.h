// SPDX-License-Identifier: Apache-2.0
// Philox-4x32-10 (Salmon et al. 2011): random numbers by position, for dropout that needs no state
// and is the same on every device. Element e of stream `seed` is word e % 4 of block e / 4.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTBB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTBB_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastbb {
namespace {

struct PhiloxBlock {
  uint32_t word[4];
};

FASTBB_HOST_DEVICE PhiloxBlock philox(uint64_t seed, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Whether dropout with probability p keeps the element: its 24-bit uniform number is at least p.
FASTBB_HOST_DEVICE bool philox_keeps(uint32_t word, float p) {
  return static_cast<float>(word >> 8) * 0x1p-24f >= p;
}

}  // namespace
}  // namespace fastbb
