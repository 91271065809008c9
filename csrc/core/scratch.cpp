// SPDX-License-Identifier: Apache-2.0
#include "core/scratch.h"

#include <new>

namespace fastbb {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { ::operator delete(data, kAlignment); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Block block;
  if (bytes > block.bytes) {
    ::operator delete(block.data, kAlignment);
    block.data = nullptr;
    block.bytes = 0;
    block.data = ::operator new(bytes, kAlignment);
    block.bytes = bytes;
  }
  return block.data;
}

}  // namespace fastbb
