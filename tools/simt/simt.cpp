// SPDX-License-Identifier: Apache-2.0
#include "simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastbb {
namespace cuda {
// What kernels declare as their dynamic shared memory.
alignas(128) thread_local unsigned char memory[simt::kMaxShared];
}  // namespace cuda
}  // namespace fastbb

namespace simt {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMaxCopies = 4096;

enum class State { kReady, kBarrier, kWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* tsan;
  void* fake_stack;
  State state;
  int line;  // of a barrier, or kind of instruction
  void* operand;
  Copy copies[kMaxCopies];
  int copy_count, group;
};

Fiber* fibers[kMaxThreads];
int thread_count, alive, current = -1;
int ready[kMaxThreads], ready_count;
uint32_t block;
uint64_t random_state = 1;
void* main_stack_pointer;
void* main_tsan;
void* main_fake_stack;
const void* main_stack;
size_t main_stack_size;
void (*entry_point)(void*);
void* entry_argument;
char start_tag, barrier_tag, end_tag, warp_tags[kMaxThreads / kLanes];

// Saves the registers that calls preserve, and the stack pointer, and takes others.
extern "C" void simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "simt: no switch of stacks for this processor"
#endif

FASTBB_SIMT_UNCHECKED uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

FASTBB_SIMT_UNCHECKED void make_ready(int thread) {
  fibers[thread]->state = State::kReady;
  ready[ready_count++] = thread;
}

// From the running fiber to the scheduler; returns when the fiber is chosen again.
FASTBB_SIMT_UNCHECKED void leave([[maybe_unused]] bool last = false) {
  Fiber& fiber = *fibers[current];
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, main_stack, main_stack_size);
#endif
  simt_switch(&fiber.stack_pointer, main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &main_stack, &main_stack_size);
#endif
}

FASTBB_SIMT_UNCHECKED void enter(int thread) {
  current = thread;
  Fiber& fiber = *fibers[thread];
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake_stack, fiber.stack, kStack);
#endif
  simt_switch(&main_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
}

FASTBB_SIMT_UNCHECKED void acquire([[maybe_unused]] char* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
}

FASTBB_SIMT_UNCHECKED void release([[maybe_unused]] char* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
}

// Where a fiber starts.
FASTBB_SIMT_UNCHECKED void begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
  acquire(&start_tag);
  entry_point(entry_argument);
  if (fibers[current]->copy_count != 0) fail("a thread ends with copies that it did not wait for");
  release(&end_tag);
  fibers[current]->state = State::kDone;
  --alive;
  leave(true);
  abort();
}

FASTBB_SIMT_UNCHECKED void prepare(int thread) {
  if (fibers[thread] == nullptr) {
    fibers[thread] = new Fiber{};
    fibers[thread]->stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#if defined(__SANITIZE_THREAD__)
    fibers[thread]->tsan = __tsan_create_fiber(0);
#endif
  }
  Fiber& fiber = *fibers[thread];
  fiber.copy_count = fiber.group = fiber.line = 0;
  auto** words = reinterpret_cast<void**>(fiber.stack + kStack - 64);
#if defined(__x86_64__)
  *--words = nullptr;  // where begin() would return to; keeps the stack's alignment
  *--words = reinterpret_cast<void*>(begin);
  for (int i = 0; i < kSavedWords; ++i) *--words = nullptr;
#else
  words -= 20;
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(begin);
#endif
  fiber.stack_pointer = words;
  make_ready(thread);
}

// With nobody ready: all wait at one barrier, or something is wrong.
FASTBB_SIMT_UNCHECKED void open_barrier() {
  int waiting = 0, line = 0;
  for (int i = 0; i < thread_count; ++i) {
    if (fibers[i]->state != State::kBarrier) continue;
    if (waiting++ > 0 && fibers[i]->line != line) fail("threads meet different barriers");
    line = fibers[i]->line;
  }
  if (waiting == 0 || waiting != alive)
    fail("a barrier or an instruction that not all lanes reach");
  if (alive != thread_count) fail("a barrier after some threads have ended");
  for (int i = 0; i < thread_count; ++i) make_ready(i);
}

FASTBB_SIMT_UNCHECKED void run_block() {
  ready_count = 0;
  alive = thread_count;
  release(&start_tag);
  for (int i = 0; i < thread_count; ++i) prepare(i);
  while (alive > 0) {
    if (ready_count == 0) open_barrier();
    const int at = static_cast<int>(draw() % static_cast<uint64_t>(ready_count));
    const int thread = ready[at];
    ready[at] = ready[--ready_count];
    enter(thread);
  }
  acquire(&end_tag);
}

}  // namespace

FASTBB_SIMT_UNCHECKED Index thread_index() { return {static_cast<uint32_t>(current)}; }
FASTBB_SIMT_UNCHECKED Index block_index() { return {block}; }
FASTBB_SIMT_UNCHECKED Index block_size() { return {static_cast<uint32_t>(thread_count)}; }

FASTBB_SIMT_UNCHECKED void fail(const char* what) {
  const int thread = current < 0 ? 0 : current;
  std::fprintf(stderr, "simt: %s (block %u, thread %d, line or instruction %d)\n", what, block,
               thread, fibers[thread]->line);
  std::_Exit(3);
}

FASTBB_SIMT_UNCHECKED void barrier(int line) {
  fibers[current]->state = State::kBarrier;
  fibers[current]->line = line;
  release(&barrier_tag);
  leave();
  acquire(&barrier_tag);
}

FASTBB_SIMT_UNCHECKED void meet(int kind, void* operand, void (*work)(void* const*)) {
  const int first = current / kLanes * kLanes;
  Fiber& own = *fibers[current];
  own.state = State::kWarp;
  own.line = kind;
  own.operand = operand;
  if (first + kLanes > thread_count) fail("an instruction of a warp that is not whole");
  for (int i = first; i < first + kLanes; ++i) {
    if (fibers[i]->state != State::kWarp) return leave();
    if (fibers[i]->line != kind) fail("lanes of a warp meet different instructions");
  }
  void* operands[kLanes];
  for (int i = 0; i < kLanes; ++i) operands[i] = fibers[first + i]->operand;
  work(operands);
  for (int i = first; i < first + kLanes; ++i) {
    if (i != current) make_ready(i);
  }
  own.state = State::kReady;
}

namespace {

struct Exchange {
  uint32_t in, out;
  int step;
};

FASTBB_SIMT_UNCHECKED void exchange_lanes(void* const* lanes) {
  for (int i = 0; i < kLanes; ++i) {
    auto* own = static_cast<Exchange*>(lanes[i]);
    own->out = static_cast<Exchange*>(lanes[i ^ own->step])->in;
  }
}

FASTBB_SIMT_UNCHECKED void take_lanes(void* const* lanes) {
  for (int i = 0; i < kLanes; ++i) {
    auto* own = static_cast<Exchange*>(lanes[i]);
    own->out = static_cast<Exchange*>(lanes[own->step % kLanes])->in;
  }
}

FASTBB_SIMT_UNCHECKED void do_nothing(void* const*) {}

FASTBB_SIMT_UNCHECKED void gather_votes(void* const* lanes) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<Exchange*>(lanes[i])->in << i;
  for (int i = 0; i < kLanes; ++i) static_cast<Exchange*>(lanes[i])->out = found;
}

FASTBB_SIMT_UNCHECKED void any_lane(void* const* lanes) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<Exchange*>(lanes[i])->in;
  for (int i = 0; i < kLanes; ++i) static_cast<Exchange*>(lanes[i])->out = found;
}

}  // namespace

FASTBB_SIMT_UNCHECKED uint32_t exchange(uint32_t mask, uint32_t bits, int step) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  Exchange lane{bits, 0, step};
  meet(1, &lane, exchange_lanes);
  return lane.out;
}

FASTBB_SIMT_UNCHECKED bool any(uint32_t mask, bool x) {
  if (mask != 0xffffffffu) fail("a vote of a part of a warp");
  Exchange lane{x, 0, 0};
  meet(2, &lane, any_lane);
  return lane.out != 0;
}

FASTBB_SIMT_UNCHECKED void warp_barrier(uint32_t mask) {
  if (mask != 0xffffffffu) fail("a barrier of a part of a warp");
  char* tag = &warp_tags[current / kLanes];
  release(tag);
  meet(5, nullptr, do_nothing);
  acquire(tag);
}

FASTBB_SIMT_UNCHECKED uint32_t take(uint32_t mask, uint32_t bits, int lane) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  Exchange own{bits, 0, lane};
  meet(3, &own, take_lanes);
  return own.out;
}

FASTBB_SIMT_UNCHECKED uint32_t ballot(uint32_t mask, bool x) {
  if (mask != 0xffffffffu) fail("a vote of a part of a warp");
  Exchange lane{x, 0, 0};
  meet(4, &lane, gather_votes);
  return lane.out;
}

// Not marked: these writes and reads are the kernel's, and sanitizers must see them.
void copy_async(void* to, const void* from, int bytes) {
  Fiber& fiber = *fibers[current];
  if (fiber.copy_count == kMaxCopies) fail("too many copies under way");
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  fiber.copies[fiber.copy_count++] = {to, from, bytes, fiber.group};
}

FASTBB_SIMT_UNCHECKED void copy_commit() { ++fibers[current]->group; }

void copy_wait(int newest) {
  Fiber& fiber = *fibers[current];
  int kept = 0;
  for (int i = 0; i < fiber.copy_count; ++i) {
    const Copy copy = fiber.copies[i];
    if (copy.group >= fiber.group - newest) {
      fiber.copies[kept++] = copy;
    } else if (copy.from == nullptr) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    } else {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
  }
  fiber.copy_count = kept;
}

void seed(uint64_t value) { random_state = value * 2 + 1; }

FASTBB_SIMT_UNCHECKED void run(int64_t grid, int64_t threads, int64_t shared_bytes,
                               void (*entry)(void*), void* argument) {
  if (threads > kMaxThreads || shared_bytes > kMaxShared) fail("a block beyond the limits");
  thread_count = static_cast<int>(threads);
  entry_point = entry;
  entry_argument = argument;
#if defined(__SANITIZE_THREAD__)
  main_tsan = __tsan_get_current_fiber();
#endif
  unsigned char* shared = fastbb::cuda::memory;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(shared + shared_bytes,
                              static_cast<size_t>(kMaxShared - shared_bytes));
#endif
  for (int64_t i = 0; i < grid; ++i) {
    block = static_cast<uint32_t>(i);
    for (int64_t at = 0; at < shared_bytes; ++at) shared[at] = 0xff;
    run_block();
  }
  current = -1;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared, kMaxShared);
#endif
}

}  // namespace simt
