// __syncthreads and its kin. They wait for all threads of the block that have not returned; all of
// them must come to the same line.
#pragma once

#include "scheduler.h"

namespace cuda_on_host {

template <typename Combine>
void resolve_votes(const Meeting& meeting, uint64_t first, const Combine& combine) {
  uint64_t result = first;
  meeting.for_each([&](Thread& thread) { result = combine(result, thread.value); });
  meeting.for_each([&](Thread& thread) { thread.result = result; });
}

inline void resolve_and(const Meeting& meeting) {
  resolve_votes(meeting, 1, [](uint64_t a, uint64_t vote) { return a & vote; });
}
inline void resolve_or(const Meeting& meeting) {
  resolve_votes(meeting, 0, [](uint64_t a, uint64_t vote) { return a | vote; });
}
inline void resolve_count(const Meeting& meeting) {
  resolve_votes(meeting, 0, [](uint64_t a, uint64_t vote) { return a + vote; });
}

inline constexpr Operation kBlockBarrier{"__syncthreads", nullptr};
inline constexpr Operation kBlockAnd{"__syncthreads_and", resolve_and};
inline constexpr Operation kBlockOr{"__syncthreads_or", resolve_or};
inline constexpr Operation kBlockCount{"__syncthreads_count", resolve_count};

// Opens the barrier if all are there. Called when one more comes to it or returns.
inline void try_block_barrier(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier + block.returned < machine.num_threads) return;
  const Thread* one = block.threads;
  while (one->state == State::kReturned) ++one;
  const Meeting meeting{block.threads, machine.num_threads, one->operation, 0, one->place};
  int present = 0;
  meeting.for_each([&](Thread&) { ++present; });
  if (present < block.at_barrier) return;  // they wait at different barriers: for ever
  meeting.for_each([](Thread& thread) { ++thread.block_barriers; });
  block.at_barrier = 0;
  meeting.close();
}

inline int block_barrier(const Operation& operation, bool vote, Place place) {
  Thread& self = *machine.current;
  self.value = vote ? 1 : 0;
  begin_waiting(operation, place);
  ++self.block->at_barrier;
  try_block_barrier(*self.block);
  run_next();
  return static_cast<int>(self.result);
}

}  // namespace cuda_on_host

inline void __syncthreads(cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::block_barrier(cuda_on_host::kBlockBarrier, false, place);
}
inline int __syncthreads_and(int vote, cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::kBlockAnd, vote != 0, place);
}
inline int __syncthreads_or(int vote, cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::kBlockOr, vote != 0, place);
}
inline int __syncthreads_count(int vote, cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::kBlockCount, vote != 0, place);
}
