// Warp operations: shuffles, votes and reductions. One waits for all lanes of its mask that have
// not returned; all of them must come to the same line with the same mask. A lane that does not
// take part has poison for who asks for its value.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"
#include "types16.h"

namespace cuda_on_host {

constexpr int kLanes = 32;

inline int lane_of(const Thread& thread) { return thread.index % kLanes; }

inline Meeting warp_meeting(Thread& one) {
  Thread* first = &one - lane_of(one);
  const int in_block = machine.num_threads - first->index;
  return {first, in_block < kLanes ? in_block : kLanes, one.operation, one.mask, one.place};
}

// Ends the operation that a thread waits at if all lanes of its mask are there.
inline void try_warp_operation(Thread& one) {
  const Meeting meeting = warp_meeting(one);
  // From the next lane on: where lanes come in order, it is the one that is missing.
  for (int step = 1; step < kLanes; ++step) {
    const int lane = (lane_of(one) + step) % kLanes;
    if ((one.mask >> lane & 1) == 0 || lane >= meeting.count) continue;
    const Thread& other = meeting.first[lane];
    if (other.state != State::kReturned && !meeting.has(other)) return;
  }
  meeting.close();
}

// When a thread has returned, others need not wait for it.
inline void try_warp_operations_without(Thread& returned) {
  const Meeting warp = warp_meeting(returned);
  for (int lane = 0; lane < warp.count; ++lane) {
    Thread& other = warp.first[lane];
    if (other.state == State::kWaiting && other.mask != 0) try_warp_operation(other);
  }
}

inline uint64_t warp_operation(const Operation& operation, uint32_t mask, uint64_t value,
                               int source_lane, Place place) {
  Thread& self = *machine.current;
  if ((mask >> lane_of(self) & 1) == 0) {
    fail(place, "%s with the mask %08x, which does not have its own lane %d", operation.name, mask,
         lane_of(self));
  }
  self.value = value;
  self.source_lane = source_lane;
  begin_waiting(operation, place, mask);
  try_warp_operation(self);
  run_next();
  return self.result;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void resolve_shuffle(const Meeting& meeting) {
  meeting.for_each([&](Thread& thread) {
    const bool exists = thread.source_lane < meeting.count;
    const Thread* source = exists ? meeting.first + thread.source_lane : nullptr;
    thread.result = exists && meeting.has(*source) ? source->value : ~uint64_t{0};
  });
}

inline void resolve_ballot(const Meeting& meeting) {
  uint64_t ballot = 0;
  meeting.for_each([&](Thread& thread) { ballot |= thread.value << lane_of(thread); });
  meeting.for_each([&](Thread& thread) { thread.result = ballot; });
}

template <typename T, typename Combine>
void resolve_reduction(const Meeting& meeting, T first, const Combine& combine) {
  T result = first;
  meeting.for_each([&](Thread& thread) { result = combine(result, from_bits<T>(thread.value)); });
  meeting.for_each([&](Thread& thread) { thread.result = to_bits(result); });
}

inline void resolve_sum(const Meeting& meeting) {
  resolve_reduction<uint32_t>(meeting, 0, [](uint32_t a, uint32_t b) { return a + b; });
}
inline void resolve_bits_and(const Meeting& meeting) {
  resolve_reduction<uint32_t>(meeting, ~0u, [](uint32_t a, uint32_t b) { return a & b; });
}
inline void resolve_bits_or(const Meeting& meeting) {
  resolve_reduction<uint32_t>(meeting, 0, [](uint32_t a, uint32_t b) { return a | b; });
}
template <typename T>
void resolve_max(const Meeting& meeting) {
  resolve_reduction<T>(meeting, std::is_signed<T>::value ? INT32_MIN : 0,
                       [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
void resolve_min(const Meeting& meeting) {
  resolve_reduction<T>(meeting, std::is_signed<T>::value ? INT32_MAX : ~T{0},
                       [](T a, T b) { return a < b ? a : b; });
}

inline constexpr Operation kShuffle{"__shfl_sync", resolve_shuffle};
inline constexpr Operation kShuffleXor{"__shfl_xor_sync", resolve_shuffle};
inline constexpr Operation kShuffleUp{"__shfl_up_sync", resolve_shuffle};
inline constexpr Operation kShuffleDown{"__shfl_down_sync", resolve_shuffle};
inline constexpr Operation kWarpBarrier{"__syncwarp", nullptr};
inline constexpr Operation kBallot{"__ballot_sync", resolve_ballot};
inline constexpr Operation kAny{"__any_sync", resolve_ballot};
inline constexpr Operation kAll{"__all_sync", resolve_ballot};
inline constexpr Operation kReduceAdd{"__reduce_add_sync", resolve_sum};
inline constexpr Operation kReduceAnd{"__reduce_and_sync", resolve_bits_and};
inline constexpr Operation kReduceOr{"__reduce_or_sync", resolve_bits_or};
template <typename T>
inline constexpr Operation kReduceMax{"__reduce_max_sync", resolve_max<T>};
template <typename T>
inline constexpr Operation kReduceMin{"__reduce_min_sync", resolve_min<T>};

template <typename T>
T shuffle(const Operation& operation, uint32_t mask, T value, int source_lane, int width,
          Place place) {
  // What CUDA has overloads for. It would make an int of a smaller one.
  static_assert(
      sizeof(T) >= 4 || std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value,
      "a type that CUDA can shuffle");
  if (width != kLanes) fail(place, "%s with a width of %d", operation.name, width);
  return from_bits<T>(warp_operation(operation, mask, to_bits(value), source_lane, place));
}

// The lane of the current thread.
inline int own_lane() { return lane_of(*machine.current); }

}  // namespace cuda_on_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::shuffle(cuda_on_host::kShuffle, mask, value, lane & 31, width, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  cuda_on_host::Place place = cuda_on_host::Place::here()) {
  const int lane = (cuda_on_host::own_lane() ^ bits) & 31;
  return cuda_on_host::shuffle(cuda_on_host::kShuffleXor, mask, value, lane, width, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 cuda_on_host::Place place = cuda_on_host::Place::here()) {
  const int own = cuda_on_host::own_lane();
  const int lane = distance > unsigned(own) ? own : own - int(distance);
  return cuda_on_host::shuffle(cuda_on_host::kShuffleUp, mask, value, lane, width, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   cuda_on_host::Place place = cuda_on_host::Place::here()) {
  const int own = cuda_on_host::own_lane();
  const int lane = distance > unsigned(31 - own) ? own : own + int(distance);
  return cuda_on_host::shuffle(cuda_on_host::kShuffleDown, mask, value, lane, width, place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::warp_operation(cuda_on_host::kWarpBarrier, mask, 0, 0, place);
}

inline unsigned __ballot_sync(unsigned mask, int vote,
                              cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return static_cast<unsigned>(
      cuda_on_host::warp_operation(cuda_on_host::kBallot, mask, vote != 0, 0, place));
}
inline int __any_sync(unsigned mask, int vote,
                      cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::warp_operation(cuda_on_host::kAny, mask, vote != 0, 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return cuda_on_host::warp_operation(cuda_on_host::kAll, mask, vote == 0, 0, place) == 0;
}

// add, max and min of int or unsigned; and, or of unsigned.
template <typename T>
T __reduce_add_sync(unsigned mask, T value,
                    cuda_on_host::Place place = cuda_on_host::Place::here()) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "");
  return cuda_on_host::from_bits<T>(cuda_on_host::warp_operation(
      cuda_on_host::kReduceAdd, mask, cuda_on_host::to_bits(value), 0, place));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value,
                    cuda_on_host::Place place = cuda_on_host::Place::here()) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "");
  return cuda_on_host::from_bits<T>(cuda_on_host::warp_operation(
      cuda_on_host::kReduceMax<T>, mask, cuda_on_host::to_bits(value), 0, place));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value,
                    cuda_on_host::Place place = cuda_on_host::Place::here()) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "");
  return cuda_on_host::from_bits<T>(cuda_on_host::warp_operation(
      cuda_on_host::kReduceMin<T>, mask, cuda_on_host::to_bits(value), 0, place));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return static_cast<unsigned>(
      cuda_on_host::warp_operation(cuda_on_host::kReduceAnd, mask, value, 0, place));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 cuda_on_host::Place place = cuda_on_host::Place::here()) {
  return static_cast<unsigned>(
      cuda_on_host::warp_operation(cuda_on_host::kReduceOr, mask, value, 0, place));
}
