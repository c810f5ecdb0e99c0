// Fibers: threads of a kernel that take turns on one thread of the operating system. ucontext
// starts them; _setjmp and _longjmp switch between them, which takes no system call, unlike
// swapcontext. _longjmp to another stack needs _FORTIFY_SOURCE switched off.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_host {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxClusterSize = 8;
constexpr int kMaxFibers = kMaxThreads * kMaxClusterSize;

constexpr size_t kStackBytes = 64 * 1024;
// The stacks' ends lie at different places modulo a page, or they would all share a few cache
// lines.
constexpr size_t kStackStride = kStackBytes + 9 * 64;

struct Fiber {
  jmp_buf registers;  // while it is started and does not run
  bool started;
};

// Address space for all stacks, and some more below the first for one that runs over; the system
// gives memory to what is touched, and it is used again.
inline unsigned char* stack(int index) {
  static unsigned char* const stacks = [] {
    void* memory = mmap(nullptr, (kMaxFibers + 4) * kStackStride, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory) + 4 * kStackStride;
  }();
  return stacks == nullptr ? nullptr : stacks + index * kStackStride;
}

// The lowest word of a stack: changed when the fiber needed more than there is.
constexpr uint64_t kStackEnd = 0x5afe57ac5afe57acu;
inline uint64_t& stack_end(int index) { return *reinterpret_cast<uint64_t*>(stack(index)); }

// Goes on with `to` until somebody switches back to `from`. A fiber that is not started begins with
// main(), which never returns, on the stack of that index.
__attribute__((noinline)) inline void switch_fibers(Fiber& from, Fiber& to, int to_index,
                                                    void (*main)()) {
  if (_setjmp(from.registers) != 0) return;
  if (to.started) _longjmp(to.registers, 1);
  static ucontext_t context;  // setcontext has read it when the next fiber is started
  to.started = true;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that was given up, as at an error, has left its frames' guards there.
  ASAN_UNPOISON_MEMORY_REGION(stack(to_index), kStackBytes);
#endif
  stack_end(to_index) = kStackEnd;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(to_index);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
  setcontext(&context);
}

}  // namespace cuda_on_host
