// SPDX-License-Identifier: Apache-2.0
// Instruction-set levels of the CPU kernels and the level in force.
//
// Every family compiles its kernels once per level and offers one table of function pointers per
// level; `select` picks a table. The probe runs once, in an object compiled for the baseline.
#pragma once

#include <cstdint>

#include "core/export.h"

namespace fastbb {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kIsaCount = 4;

// Name used in FASTBB_ISA and by Python, e.g. "avx512_bf16".
FASTBB_EXPORT const char* isa_name(Isa level);
// Whether this build has the level and this machine can run it.
FASTBB_EXPORT bool isa_available(Isa level);
// The level in force: the best available one, capped by FASTBB_ISA or by set_isa.
FASTBB_EXPORT Isa isa();
// Caps the level; false (and no change) when it is not available.
FASTBB_EXPORT bool set_isa(Isa level);

// The entry of the level in force. `tables` has one pointer per level, null where not built.
template <class Table>
const Table& select(const Table* const (&tables)[kIsaCount]) {
  int level = static_cast<int>(isa());
  while (level > 0 && tables[level] == nullptr) --level;
  return *tables[level];
}

}  // namespace fastbb
