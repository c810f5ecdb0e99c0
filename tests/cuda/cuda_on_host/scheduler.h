// Who runs next. A thread runs without interruption until it waits, returns, or comes to a yield
// point. With seed 0 threads take turns in order. With another the order is random, by turns in
// breadth (any thread that can run) and in depth (the one that could last, so that one warp runs
// far ahead of the others).
#pragma once

#include <time.h>

#include <cstdint>
#include <utility>

#include "machine.h"

namespace cuda_on_host {

constexpr int kMaxSeconds = 120;  // of a launch

// The threads that can run. Also a random choice from the whole takes constant time.
class RunQueue {
 public:
  bool empty() const { return size_ == 0; }
  void clear() { size_ = 0; }
  void push(Thread* thread) { at(size_++) = thread; }

  Thread* pop_first() {
    Thread* thread = at(0);
    ++head_;
    --size_;
    return thread;
  }

  Thread* pop_random(Random& random) {
    if (turns_ == 0) {
      turns_ = 16u << random.below(9);
      in_depth_ = random.below(2) != 0;
    }
    --turns_;
    if (!in_depth_) std::swap(at(random.below(size_)), at(size_ - 1));
    return at(--size_);
  }

  void shuffle_last(uint32_t count, Random& random) {
    const uint32_t begin = size_ - count;
    for (uint32_t i = count; i > 1; --i) {
      std::swap(at(begin + i - 1), at(begin + random.below(i)));
    }
  }

 private:
  Thread*& at(uint32_t i) { return threads_[(head_ + i) % kMaxFibers]; }

  Thread* threads_[kMaxFibers];  // a ring
  uint32_t head_ = 0;
  uint32_t size_ = 0;
  uint32_t turns_ = 0;
  bool in_depth_ = false;
};

inline RunQueue run_queue;

// Ends a launch that would never end, if its threads still come to the scheduler.
class Deadline {
 public:
  void start() {
    switches_ = 0;
    start_ = now();
  }
  bool passed() { return ++switches_ % 65536 == 0 && now() - start_ > kMaxSeconds; }

 private:
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
  }

  uint32_t switches_;
  int64_t start_;
};

inline Deadline deadline;

void thread_main();                        // of launch_on_host.h: a fiber's, for ever
void show_builtins(const Thread& thread);  // of builtins.h: the thread's threadIdx and blockIdx

// The current thread, or the host, stops here until somebody chooses it again.
inline void run_next() {
  Thread* self = machine.current;
  if (self != nullptr) {
    if (stack_end(static_cast<int>(self - machine.threads)) != kStackEnd) {
      fail({}, "thread %d needs more than the %zu bytes of its stack", self->index, kStackBytes);
    }
    if (deadline.passed()) fail({}, "the launch takes more than %d s", kMaxSeconds);
  }
  Thread* next = nullptr;
  if (!run_queue.empty()) {
    next = machine.shuffled ? run_queue.pop_random(machine.random) : run_queue.pop_first();
    show_builtins(*next);
  }
  if (next == self) return;
  machine.current = next;
  switch_fibers(self == nullptr ? machine.host : self->fiber,
                next == nullptr ? machine.host : next->fiber,
                next == nullptr ? 0 : static_cast<int>(next - machine.threads), thread_main);
}

// A place where a thread may be interrupted.
inline void yield() {
  if (!machine.shuffled || machine.random.below(4) != 0) return;
  run_queue.push(machine.current);
  run_next();
}

// The current thread waits at the operation; whoever ends that releases it.
inline void begin_waiting(const Operation& operation, Place place, uint32_t mask = 0) {
  Thread& self = *machine.current;
  self.state = State::kWaiting;
  self.operation = &operation;
  self.place = place;
  self.mask = mask;
}

// Lets those of `count` threads run that wait and are chosen.
template <typename Choose>
void release_all(Thread* threads, int count, const Choose& chosen) {
  uint32_t released = 0;
  for (int i = 0; i < count; ++i) {
    if (threads[i].state != State::kWaiting || !chosen(threads[i])) continue;
    threads[i].state = State::kRunnable;
    run_queue.push(threads + i);
    ++released;
  }
  if (machine.shuffled) run_queue.shuffle_last(released, machine.random);
}

// Threads that meet: those of a range that wait at the same operation.
struct Meeting {
  Thread* first;
  int count;
  const Operation* operation;
  uint32_t mask;
  Place place;

  bool has(const Thread& thread) const {
    return thread.state == State::kWaiting && thread.operation == operation &&
           thread.mask == mask && thread.place == place;
  }

  template <typename Function>
  void for_each(const Function& function) const {
    for (int i = 0; i < count; ++i) {
      if (has(first[i])) function(first[i]);
    }
  }

  // Gives everyone its result and lets it run.
  void close() const {
    if (operation->resolve != nullptr) operation->resolve(*this);
    release_all(first, count, [this](const Thread& thread) { return has(thread); });
  }
};

}  // namespace cuda_on_host
