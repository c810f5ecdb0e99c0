// Runs a kernel: its clusters one after the other, the blocks of a cluster together.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "barriers.h"
#include "builtins.h"
#include "bulk_copy.h"
#include "cluster.h"
#include "faults.h"
#include "scheduler.h"
#include "warp.h"

namespace cuda_on_host {

struct LaunchShape {
  int64_t grid;         // blocks
  int cluster_size;     // blocks
  int threads;          // of a block
  size_t shared_bytes;  // of a block
};

// The current thread has come to the end of the kernel.
inline void end_thread() {
  Thread& self = *machine.current;
  if (self.cluster_arrivals > self.cluster_waits) {
    fail({}, "thread %d returns between cluster_arrive and cluster_wait", self.index);
  }
  self.state = State::kReturned;
  Block& block = *self.block;
  ++block.returned;
  try_warp_operations_without(self);
  try_block_barrier(block);
  try_cluster_barrier();
  if (block.returned == machine.num_threads) {
    if (const unsigned char* byte = block.arena.overrun()) {
      fail({}, "it wrote outside of its %zu bytes of shared memory, at byte %td",
           block.arena.bytes(), byte - block.arena.base());
    }
    check_copies(block);
    block.arena.poison();
  }
  run_next();
}

// A fiber serves one block after the other.
inline void thread_main() {
  for (;;) {
    machine.body(machine.arguments);
    end_thread();
  }
}

// Threads of a block that are in the same state are told of together.
inline void report_deadlock() {
  char* end = machine.error + sizeof(machine.error);
  char* next = machine.error;
  const auto add = [&](auto... values) {
    const int length = std::snprintf(next, end - next, values...);
    next += length < end - next ? length : end - next - 1;
  };
  const auto alike = [](const Thread& a, const Thread& b) {
    return a.state == b.state &&
           (a.state == State::kReturned ||
            (a.operation == b.operation && a.place == b.place && a.mask == b.mask));
  };
  add("%s: no thread can go on", machine.kernel);
  for (int rank = 0; rank < machine.cluster_size; ++rank) {
    const Block& block = machine.blocks[rank];
    add("%s block %lld: ", rank == 0 ? ";" : " |", static_cast<long long>(block.index));
    for (int first = 0, last = 0; first < machine.num_threads; first = last + 1) {
      const Thread& thread = block.threads[first];
      last = first;
      while (last + 1 < machine.num_threads && alike(block.threads[last + 1], thread)) ++last;
      if (first > 0) add("%s", ", ");
      add(first == last ? "thread %d" : "threads %d to %d", first, last);
      if (thread.state == State::kReturned) {
        add("%s", " returned");
        continue;
      }
      add(" at %s", thread.operation->name);
      if (thread.mask != 0) add(" of the lanes %08x", thread.mask);
      add(" (%s:%d)", thread.place.file_name(), thread.place.line);
    }
  }
}

inline void run_cluster(int64_t first_block) {
  machine.cluster_arrived = 0;
  machine.cluster_phases = 0;
  const int total = machine.num_threads * machine.cluster_size;
  for (int i = 0; i < total; ++i) {
    Thread& thread = machine.threads[i];
    thread.block = &machine.blocks[i / machine.num_threads];
    thread.index = i % machine.num_threads;
    thread.block_barriers = 0;
    thread.cluster_arrivals = 0;
    thread.cluster_waits = 0;
    thread.state = State::kWaiting;
  }
  release_all(machine.threads, total, [](const Thread&) { return true; });
  for (int rank = 0; rank < machine.cluster_size; ++rank) {
    Block& block = machine.blocks[rank];
    block.index = first_block + rank;
    block.rank = rank;
    block.threads = machine.threads + rank * machine.num_threads;
    block.at_barrier = 0;
    block.returned = 0;
    block.copies.clear();
    block.arena.poison();
  }
  run_next();  // and come back when no thread can run
  if (machine.failed()) return;
  for (int i = 0; i < total; ++i) {
    if (machine.threads[i].state != State::kReturned) return report_deadlock();
  }
}

inline void run_grid(const LaunchShape& shape, uint64_t seed) {
  const auto refuse = [](const char* what, long long value) {
    std::snprintf(machine.error, sizeof(machine.error), "%s: the launch has %lld %s",
                  machine.kernel, value, what);
  };
  machine.error[0] = '\0';
  if (shape.threads < 1 || shape.threads > kMaxThreads) {
    return refuse("threads, not 1 to 1024", shape.threads);
  }
  if (shape.cluster_size < 1 || shape.cluster_size > kMaxClusterSize) {
    return refuse("blocks in a cluster, not 1 to 8", shape.cluster_size);
  }
  if (shape.grid < 1 || shape.grid > INT32_MAX || shape.grid % shape.cluster_size != 0) {
    return refuse("blocks, not a positive multiple of the cluster's below 2^31", shape.grid);
  }
  if (shape.shared_bytes > kMaxSharedBytes) {
    return refuse("bytes of shared memory, more than 227 KiB",
                  static_cast<long long>(shape.shared_bytes));
  }
  if (stack(0) == nullptr) return refuse("fibers without memory for their stacks", kMaxFibers);

  machine.num_threads = shape.threads;
  machine.cluster_size = shape.cluster_size;
  machine.host.started = true;
  machine.shuffled = seed != 0;
  machine.random.state = (seed + 1) * 0x9e3779b97f4a7c15u;
  for (int rank = 0; rank < shape.cluster_size; ++rank) {
    machine.blocks[rank].arena.resize(shape.shared_bytes);
  }
  blockDim = {static_cast<unsigned>(shape.threads), 1, 1};
  gridDim = {static_cast<unsigned>(shape.grid), 1, 1};
  deadline.start();
  const FaultCatcher catcher;

  std::vector<int64_t> clusters(static_cast<size_t>(shape.grid / shape.cluster_size));
  for (size_t i = 0; i < clusters.size(); ++i) {
    clusters[i] = static_cast<int64_t>(i);
    const auto other = machine.random.below(static_cast<uint32_t>(i + 1));
    if (machine.shuffled) std::swap(clusters[i], clusters[other]);
  }
  for (size_t i = 0; i < clusters.size() && !machine.failed(); ++i) {
    run_cluster(clusters[i] * shape.cluster_size);
  }
  if (!machine.failed()) return;
  run_queue.clear();
  for (Thread& thread : machine.threads) thread.fiber.started = false;
}

// A kernel's name without the namespaces that all of them are in.
inline std::string short_name(std::string name) {
  for (const char* part : {"&", "eaft_ext::cuda::", "{anonymous}::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, std::strlen(part));
  }
  return name;
}

template <auto kernel>
const char* function_with_name() {
  return __PRETTY_FUNCTION__;
}

template <auto kernel>
std::string kernel_name() {
  std::string name = std::strstr(function_with_name<kernel>(), "kernel = ") + 9;
  name.pop_back();  // the bracket
  return short_name(name);
}

// A parameter of a kernel, as the bytes of its launch.
struct Argument {
  const void* data;
  size_t bytes;
};

// Runs what nvcc made of the kernel of that name: of ptx_on_host, whose libraries have it.
std::string launch_compiled(const std::string& name, const LaunchShape& shape, uint64_t seed,
                            const Argument* arguments, size_t count);

// Runs kernel(arguments...). Returns an empty string, or what went wrong. Seed 0 is the plain
// order.
template <auto kernel, typename... Arguments>
std::string launch(const LaunchShape& shape, uint64_t seed, const Arguments&... arguments) {
  const std::string name = kernel_name<kernel>();
#ifdef CUDA_ON_HOST_COMPILED
  const Argument all[] = {{&arguments, sizeof(Arguments)}...};
  return launch_compiled(name, shape, seed, all, sizeof...(Arguments));
#else
  const std::tuple<const Arguments&...> all(arguments...);
  machine.kernel = name.c_str();
  machine.arguments = &all;
  machine.body = [](const void* given) {
    std::apply(kernel, *static_cast<const std::tuple<const Arguments&...>*>(given));
  };
  run_grid(shape, seed);
  return machine.error;
#endif
}

}  // namespace cuda_on_host
