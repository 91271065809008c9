// SPDX-License-Identifier: Apache-2.0
// Per-thread working memory of kernels.
#pragma once

#include <cstddef>

namespace fastbb {

// At least `bytes` of 64-byte aligned, uninitialised memory that belongs to the calling thread
// until it asks again. It only grows, so that steady calls allocate nothing.
// Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

}  // namespace fastbb
