// SPDX-License-Identifier: Apache-2.0
// A case that main.cpp reads and a family's code runs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simt.h"

namespace simt {

// Ends the process with status 2.
[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "simt: %s\n", why);
  std::exit(2);
}

struct Case {
  std::vector<int64_t> options;  // whatever the family's code asks for
  std::vector<int64_t> words;    // the parameters

  // The parameters as the struct that they are.
  template <class Params>
  Params params() const {
    Params p;
    if (sizeof p != words.size() * sizeof words[0]) stop("the parameters are of another size");
    std::memcpy(&p, words.data(), sizeof p);
    return p;
  }
};

// Each program has the one of its family: launches kernels, returns an error's text or nullptr.
const char* run(const Case& given);

}  // namespace simt
