// A thread that touches memory that is not there ends the launch with a sentence, and not the
// process.
#pragma once

#include <signal.h>

#include "machine.h"

namespace cuda_on_host {

// Catches such faults as long as it lives.
class FaultCatcher {
 public:
  FaultCatcher() {
    stack_t stack{};
    stack.ss_sp = memory_;
    stack.ss_size = sizeof(memory_);
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = fault;
    // Not deferred, since fault() does not return.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
  }
  ~FaultCatcher() {
    for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultCatcher(const FaultCatcher&) = delete;
  FaultCatcher& operator=(const FaultCatcher&) = delete;

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
  static constexpr int kNumSignals = 3;

  static void fault(int number, siginfo_t* information, void*) {
    if (machine.current == nullptr) {  // not a kernel's
      signal(number, SIG_DFL);
      return;
    }
    const int thread = machine.current->index;
    if (number == SIGFPE) fail({}, "thread %d divides an integer by zero", thread);
    fail({}, "thread %d reads or writes at %p, where there is no memory", thread,
         information->si_addr);
  }

  inline static unsigned char memory_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_actions_[kNumSignals];
};

}  // namespace cuda_on_host
