// What a running kernel consists of: the threads, blocks and memory of the one cluster that runs,
// and how an error ends the launch.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fibers.h"
#include "shared_memory.h"

namespace cuda_on_host {

// A line of a kernel. As a default argument, here() is the caller's.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  const char* file_name() const {
    const char* slash = std::strrchr(file, '/');
    return slash == nullptr ? file : slash + 1;
  }
};

inline bool operator==(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

struct Meeting;

// What threads can wait at. Those that meet there leave values, of which resolve makes the results.
struct Operation {
  const char* name;
  void (*resolve)(const Meeting&);
};

enum class State { kRunnable, kWaiting, kReturned };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  int index;  // in its block
  State state;

  // While it waits.
  const Operation* operation;
  Place place;
  uint32_t mask;    // the lanes of a warp operation, else 0
  uint64_t value;   // what it brings
  int source_lane;  // whose value a shuffle asks for
  uint64_t result;  // what it gets

  // What it has come through.
  int block_barriers;
  int cluster_arrivals;
  int cluster_waits;
};

// The bulk copy whose bytes an Arrival counts.
struct BulkCopy {
  const void* arrival;
  const Thread* maker;
  int block_barriers_of_maker;    // when it was made
  int cluster_arrivals_of_maker;  // when it was made
  unsigned char* target;
  const void* source;
  uint32_t bytes;
  Place place;  // where it was started
  bool started;
  bool arrived;
  bool awaited;
};

struct Block {
  int64_t index;
  int rank;  // in its cluster
  Thread* threads;
  int at_barrier;
  int returned;
  Arena arena;
  std::vector<BulkCopy> copies;
};

struct Random {
  uint64_t state;

  uint32_t next() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t n) {
    return static_cast<uint32_t>((static_cast<uint64_t>(next()) * n) >> 32);
  }
};

struct Machine {
  const char* kernel;
  void (*body)(const void* arguments);
  const void* arguments;

  int num_threads;  // of a block
  int cluster_size;
  int cluster_arrived;  // threads, at the cluster barrier that is not complete
  int cluster_phases;   // cluster barriers that are complete

  bool shuffled;
  Random random;

  Fiber host;
  Thread* current;  // null: the host
  Thread threads[kMaxFibers];
  Block blocks[kMaxClusterSize];
  char error[2048];

  bool failed() const { return error[0] != '\0'; }
};

// One launch at a time.
inline Machine machine;

// Ends the launch with a sentence about the current thread or, where `place` has no line, about its
// block. The stacks of all fibers are given up.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(Place place, const char* format,
                                                                    ...) {
  const Thread& thread = *machine.current;
  char* end = machine.error + sizeof(machine.error);
  char* next = machine.error;
  next += std::snprintf(next, end - next, "%s, block %lld", machine.kernel,
                        static_cast<long long>(thread.block->index));
  if (place.line > 0) {
    next += std::snprintf(next, end - next, ", thread %d, %s:%d", thread.index, place.file_name(),
                          place.line);
  }
  next += std::snprintf(next, end - next, ": ");
  va_list values;
  va_start(values, format);
  std::vsnprintf(next, end - next, format, values);
  va_end(values);
  machine.current = nullptr;
  _longjmp(machine.host.registers, 1);
}

}  // namespace cuda_on_host
