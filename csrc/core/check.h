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
#include <string_view>
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
[[noreturn]] void fail(std::string_view op, std::string_view argument, std::string_view rule,
                       const T& got) {
  std::string message;
  for (const std::string_view part : {op, std::string_view(": "), argument, std::string_view(" "),
                                      rule, std::string_view(", got ")}) {
    message += part;
  }
  throw std::runtime_error(message + printed(got));
}

// `rule` is text that exists already: a rule that must be put together calls for an if and a fail.
template <class T>
void check(bool ok, std::string_view op, std::string_view argument, std::string_view rule,
           const T& got) {
  if (!ok) fail(op, argument, rule, got);
}

}  // namespace fastbb
