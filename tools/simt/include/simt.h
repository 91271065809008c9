// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a CUDA kernel on the host, one after the other, each thread a fiber.
//
// Fibers run until they meet a barrier or an instruction of their warp; who goes on is drawn at
// random from a seed. Under ThreadSanitizer every fiber is a thread of its own and barriers are the
// only synchronisation, so two accesses that no barrier separates are a race, in whatever order
// they ran. Instructions of a warp synchronise nothing, as in CUDA's memory model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

// Code that looks into other threads' stacks, which is no race of the kernel.
#define FASTBB_SIMT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

namespace simt {

struct Index {
  uint32_t x;
};

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxShared = 228 * 1024;

Index thread_index();
Index block_index();
Index block_size();

// Prints what is wrong, with block, thread and line, and ends the process with status 3.
[[noreturn]] void fail(const char* what);

// All threads of the block; `line` tells barriers apart.
void barrier(int line);

// Meets the other lanes of the warp. The last one to come calls work(operands), where operands[i]
// is what lane i gave; all return after that. `kind` tells instructions apart.
void meet(int kind, void* operand, void (*work)(void* const* operands));

// All lanes of the warp; orders their accesses.
void warp_barrier(uint32_t mask);

uint32_t exchange(uint32_t mask, uint32_t bits, int step);
uint32_t take(uint32_t mask, uint32_t bits, int lane);
bool any(uint32_t mask, bool x);
uint32_t ballot(uint32_t mask, bool x);

// Asynchronous copies. The destination is poisoned at once and written when their group was waited
// for.
void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int newest);

void seed(uint64_t value);
void run(int64_t grid, int64_t block, int64_t shared_bytes, void (*entry)(void*), void* argument);

// Calls body() in every thread of every block.
template <class Body>
void run(int64_t grid, int64_t block, int64_t shared_bytes, const Body& body) {
  run(
      grid, block, shared_bytes, [](void* argument) { (*static_cast<const Body*>(argument))(); },
      const_cast<Body*>(&body));
}

}  // namespace simt
