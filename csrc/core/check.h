// SPDX-License-Identifier: Apache-2.0
// One message form for arguments that a kernel must not see: `op: argument rule, got value`.
//
// Python raises ValueError, TypeError or NotImplementedError for them first; these checks protect
// memory when an operator is called directly, and surface as RuntimeError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastbb {

template <class T>
std::string printed(const T& value) {
  std::ostringstream out;
  out << std::boolalpha << value;
  return out.str();
}

inline std::string printed(const std::vector<int64_t>& values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    out += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return out + "]";
}

template <class T>
[[noreturn]] void fail(const char* op, const std::string& argument, const std::string& rule,
                       const T& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + " " + rule + ", got " +
                           printed(got));
}

template <class T>
void check(bool ok, const char* op, const std::string& argument, const std::string& rule,
           const T& got) {
  if (!ok) fail(op, argument, rule, got);
}

}  // namespace fastbb
