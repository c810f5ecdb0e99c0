// The kernels of a library, by name: what the translator leaves of each, and its launch.
#pragma once

#include <cstddef>
#include <string>

#include "values.h"

namespace ptx_on_host {

constexpr size_t kMaxParameters = 4;

struct Entry {
  const char* name;  // mangled
  void (*run)(const cuda_on_host::Argument* parameters);
  int max_threads;  // of a block; 0: any
  size_t num_parameters;
  size_t parameter_bytes[kMaxParameters];
};

// Of the generated entries.cpp.
extern const Entry kEntries[];
extern const size_t kNumEntries;

}  // namespace ptx_on_host
