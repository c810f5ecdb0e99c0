// Thread-block clusters: the cluster's barrier, and distributed shared memory.
#pragma once

#include "scheduler.h"

namespace cuda_on_host {

inline constexpr Operation kClusterWait{"cluster_wait", nullptr};

// Opens the barrier of the cluster if all threads have arrived that have not returned.
inline void try_cluster_barrier() {
  const int total = machine.num_threads * machine.cluster_size;
  int returned = 0;
  for (int rank = 0; rank < machine.cluster_size; ++rank) returned += machine.blocks[rank].returned;
  if (machine.cluster_arrived == 0 || machine.cluster_arrived + returned < total) return;
  machine.cluster_arrived = 0;
  ++machine.cluster_phases;
  release_all(machine.threads, total,
              [](const Thread& thread) { return thread.operation == &kClusterWait; });
}

}  // namespace cuda_on_host

namespace eaft_ext::cuda {

inline int cluster_size() { return cuda_on_host::machine.cluster_size; }
inline int cluster_rank() { return cuda_on_host::machine.current->block->rank; }

inline void cluster_arrive(cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::Thread& self = *cuda_on_host::machine.current;
  if (self.cluster_arrivals > self.cluster_waits) {
    cuda_on_host::fail(place, "cluster_arrive for the second time without cluster_wait");
  }
  ++self.cluster_arrivals;
  ++cuda_on_host::machine.cluster_arrived;
  cuda_on_host::try_cluster_barrier();
  cuda_on_host::yield();
}

inline void cluster_arrive_relaxed(cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cluster_arrive(place);
}

inline void cluster_wait(cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::Thread& self = *cuda_on_host::machine.current;
  if (self.cluster_arrivals == self.cluster_waits) {
    cuda_on_host::fail(place, "cluster_wait without cluster_arrive");
  }
  if (cuda_on_host::machine.cluster_phases < self.cluster_arrivals) {
    cuda_on_host::begin_waiting(cuda_on_host::kClusterWait, place);
    cuda_on_host::run_next();
  }
  ++self.cluster_waits;
}

// What the other block has not written yet is poison, and so is all after it has returned.
template <typename T>
const T* of_cluster_rank(const T* pointer, int rank,
                         cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::yield();
  cuda_on_host::Machine& machine = cuda_on_host::machine;
  const cuda_on_host::Arena& own = machine.current->block->arena;
  if (rank < 0 || rank >= machine.cluster_size) {
    cuda_on_host::fail(place, "of_cluster_rank with rank %d in a cluster of %d", rank,
                       machine.cluster_size);
  }
  if (!own.holds(pointer, sizeof(T))) {
    cuda_on_host::fail(place, "of_cluster_rank with a pointer that is not into shared memory");
  }
  const cuda_on_host::Block& other = machine.blocks[rank];
  if (other.returned == machine.num_threads) {
    cuda_on_host::fail(place, "of_cluster_rank with rank %d, whose block has returned", rank);
  }
  return reinterpret_cast<const T*>(other.arena.base() +
                                    (reinterpret_cast<const unsigned char*>(pointer) - own.base()));
}

}  // namespace eaft_ext::cuda
