// Barriers and warp operations (PTX ISA, "Parallel Synchronization and Communication
// Instructions"), on those of the shim: threads meet at one instruction.
#pragma once

#include "values.h"

namespace ptx_on_host {

// ---- Of a block. The only barrier is number 0, for all threads.

inline void barrier(u32 id, Place place = Place::here()) {
  if (id != 0) fail(place, "bar.sync with the barrier %u", id);
  cuda_on_host::block_barrier(cuda_on_host::kBlockBarrier, false, place);
}
inline pred barrier_or(u32 id, pred vote, Place place = Place::here()) {
  if (id != 0) fail(place, "bar.red with the barrier %u", id);
  return cuda_on_host::block_barrier(cuda_on_host::kBlockOr, vote, place) != 0;
}

// ---- Of a warp.

inline void warp_barrier(u32 mask, Place place = Place::here()) { __syncwarp(mask, place); }
inline u32 ballot(pred vote, u32 mask, Place place = Place::here()) {
  return __ballot_sync(mask, vote, place);
}
inline pred any(pred vote, u32 mask, Place place = Place::here()) {
  return __any_sync(mask, vote, place) != 0;
}

struct Shuffled {
  u32 value;
  pred in_range;
};

// "shfl.sync": segments of a warp by the upper half of `limits`, and the last lane in its lower.
enum class Shuffle { kUp, kDown, kXor, kIndex };

template <Shuffle kMode>
Shuffled shuffle(u32 value, u32 by, u32 limits, u32 mask, Place place = Place::here()) {
  using namespace cuda_on_host;
  const int lane = own_lane();
  const int distance = static_cast<int>(by & 31);
  const int last_of_segment = static_cast<int>(limits & 31);
  const int segment = static_cast<int>(limits >> 8 & 31);
  const int first = lane & segment;
  const int last = first | (last_of_segment & ~segment);
  int source = 0;
  bool in_range = false;
  const Operation* operation = nullptr;
  switch (kMode) {
    case Shuffle::kUp:
      source = lane - distance;
      in_range = source >= last;
      operation = &kShuffleUp;
      break;
    case Shuffle::kDown:
      source = lane + distance;
      in_range = source <= last;
      operation = &kShuffleDown;
      break;
    case Shuffle::kXor:
      source = lane ^ distance;
      in_range = source <= last;
      operation = &kShuffleXor;
      break;
    case Shuffle::kIndex:
      source = first | (distance & ~segment);
      in_range = source <= last;
      operation = &kShuffle;
      break;
  }
  if (!in_range) source = lane;
  const u64 found = warp_operation(*operation, mask, value, source, place);
  return {static_cast<u32>(found), in_range};
}

// ---- Of a cluster.

inline u32 cluster_size() { return static_cast<u32>(machine.cluster_size); }
inline u32 cluster_rank() { return static_cast<u32>(machine.current->block->rank); }

}  // namespace ptx_on_host
