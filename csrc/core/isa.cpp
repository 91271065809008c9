// SPDX-License-Identifier: Apache-2.0
#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastbb {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

bool machine_has(Isa level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (level) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
  }
  return false;
#else
  return level == Isa::kBaseline;
#endif
}

// The environment lowers the level and never raises it; an unknown name changes nothing here and
// is reported by fastbb at import.
int initial_level() {
  int best = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    if (machine_has(static_cast<Isa>(i))) best = i;
  }
  if (const char* cap = std::getenv("FASTBB_ISA")) {
    for (int i = 0; i < kIsaCount; ++i) {
      if (std::strcmp(cap, kNames[i]) == 0 && i < best) best = i;
    }
  }
  return best;
}

std::atomic<int>& level_in_force() {
  static std::atomic<int> level{initial_level()};
  return level;
}

}  // namespace

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

bool isa_available(Isa level) { return machine_has(level); }

Isa isa() { return static_cast<Isa>(level_in_force().load(std::memory_order_relaxed)); }

bool set_isa(Isa level) {
  if (!isa_available(level)) return false;
  level_in_force().store(static_cast<int>(level), std::memory_order_relaxed);
  return true;
}

}  // namespace fastbb
