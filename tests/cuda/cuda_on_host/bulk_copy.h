// TMA bulk copies, and the mbarriers that tell of their end. The bytes come when somebody first
// waits for them, or already at the start where the order is random; until then there is poison.
#pragma once

#include <cstdint>
#include <cstring>

#include "scheduler.h"

namespace eaft_ext::cuda {

struct alignas(8) Arrival {
  uint64_t state;
};

}  // namespace eaft_ext::cuda

namespace cuda_on_host {

using eaft_ext::cuda::Arrival;

inline constexpr Operation kWaitFor{"wait_for", nullptr};

// In the upper half of an Arrival's state; the lower is the place in the block's copies.
constexpr uint64_t kArrivalMark = 0xa441fa1u;

// Checks that it was made, and that a barrier makes it known to the current thread.
inline BulkCopy& copy_of(const Arrival* arrival, const char* operation, Place place) {
  const Thread& self = *machine.current;
  Block& block = *self.block;
  if (!block.arena.holds(arrival, sizeof(Arrival))) {
    fail(place, "%s with an Arrival that is not in the block's shared memory", operation);
  }
  const uint64_t index = arrival->state & 0xffffffffu;
  if (arrival->state >> 32 != kArrivalMark || index >= block.copies.size() ||
      block.copies[index].arrival != arrival) {
    fail(place, "%s with an Arrival that was not made, or that was overwritten since", operation);
  }
  BulkCopy& copy = block.copies[index];
  if (copy.maker != &self && self.block_barriers == copy.block_barriers_of_maker &&
      self.cluster_waits <= copy.cluster_arrivals_of_maker) {
    fail(place, "%s with an Arrival that thread %d made, and no barrier since", operation,
         copy.maker->index);
  }
  return copy;
}

inline void arrive(BulkCopy& copy) {
  std::memcpy(copy.target, copy.source, copy.bytes);
  copy.arrived = true;
}

// When a block has returned.
inline void check_copies(const Block& block) {
  for (const BulkCopy& copy : block.copies) {
    if (!copy.started || copy.awaited) continue;
    fail({}, "it returns, and nobody waited for the bulk copy that was started at %s:%d",
         copy.place.file_name(), copy.place.line);
  }
}

}  // namespace cuda_on_host

namespace eaft_ext::cuda {

inline void make_arrivals(Arrival* arrivals, int count,
                          cuda_on_host::Place place = cuda_on_host::Place::here()) {
  using namespace cuda_on_host;
  const Thread& self = *machine.current;
  Block& block = *self.block;
  if (count < 0 || !block.arena.holds(arrivals, count * sizeof(Arrival))) {
    fail(place, "make_arrivals of %d that are not in the block's shared memory", count);
  }
  if (reinterpret_cast<uintptr_t>(arrivals) % alignof(Arrival) != 0) {
    fail(place, "make_arrivals at an address that is not a multiple of 8");
  }
  for (int i = 0; i < count; ++i) {
    for (BulkCopy& copy : block.copies) {
      if (copy.arrival != arrivals + i) continue;
      if (copy.started && !copy.awaited) {
        fail(place, "make_arrivals of an Arrival whose bulk copy nobody waited for");
      }
      copy.arrival = nullptr;
    }
    arrivals[i].state = kArrivalMark << 32 | block.copies.size();
    BulkCopy copy{};
    copy.arrival = arrivals + i;
    copy.maker = &self;
    copy.block_barriers_of_maker = self.block_barriers;
    copy.cluster_arrivals_of_maker = self.cluster_arrivals;
    block.copies.push_back(copy);
  }
}

inline void start_bulk_copy(void* target, const void* source, uint32_t bytes, Arrival* arrival,
                            cuda_on_host::Place place = cuda_on_host::Place::here()) {
  using namespace cuda_on_host;
  Block& block = *machine.current->block;
  BulkCopy& copy = copy_of(arrival, "start_bulk_copy", place);
  if (copy.started) fail(place, "start_bulk_copy with an Arrival that was used before");
  if (bytes % 16 != 0 || bytes >= 1u << 20) {
    fail(place, "start_bulk_copy of %u bytes: not a multiple of 16 below 2^20", bytes);
  }
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fail(place, "start_bulk_copy from %p, which is not a multiple of 16", source);
  }
  if (!block.arena.holds(target, bytes)) {
    fail(place, "start_bulk_copy of %u bytes to what is not all in the block's shared memory",
         bytes);
  }
  copy.target = static_cast<unsigned char*>(target);
  if ((copy.target - block.arena.base()) % 16 != 0) {
    fail(place, "start_bulk_copy to %p, which is not a multiple of 16", target);
  }
  copy.source = source;
  copy.bytes = bytes;
  copy.place = place;
  copy.started = true;
  std::memset(target, 0xff, bytes);
  if (machine.shuffled && machine.random.below(2) == 0) arrive(copy);
  release_all(block.threads, machine.num_threads, [&](const Thread& thread) {
    return thread.operation == &kWaitFor && thread.value == reinterpret_cast<uintptr_t>(arrival);
  });
  yield();
}

inline void wait_for(const Arrival* arrival,
                     cuda_on_host::Place place = cuda_on_host::Place::here()) {
  using namespace cuda_on_host;
  yield();
  if (!copy_of(arrival, "wait_for", place).started) {
    machine.current->value = reinterpret_cast<uintptr_t>(arrival);
    begin_waiting(kWaitFor, place);
    run_next();
  }
  BulkCopy& copy = copy_of(arrival, "wait_for", place);
  if (!copy.arrived) arrive(copy);
  copy.awaited = true;
}

}  // namespace eaft_ext::cuda
