// SPDX-License-Identifier: Apache-2.0
// Names of the kinds of bits in operators' arguments.
#pragma once

#include <string>

#include "core/bits.h"
#include "core/check.h"

namespace fastbb {

inline BitKind bit_kind(const char* op, const char* argument, const std::string& name) {
  if (name == "plus") return BitKind::kPlus;
  if (name == "minus") return BitKind::kMinus;
  if (name == "ternary") return BitKind::kTernary;
  if (name == "unsigned") return BitKind::kUnsigned;
  fail(op, argument, "must be plus, minus, ternary or unsigned", name);
}

// Of packed values, where plus and minus, which differ at zero alone, are both "signed".
inline BitKind value_kind(const char* op, const char* argument, const std::string& name) {
  if (name == "signed") return BitKind::kPlus;
  if (name == "unsigned") return BitKind::kUnsigned;
  if (name == "ternary") return BitKind::kTernary;
  fail(op, argument, "must be signed, unsigned or ternary", name);
}

}  // namespace fastbb
