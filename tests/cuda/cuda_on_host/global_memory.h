// The global memory that a kernel may touch, as its launcher tells of it. Compiled kernels
// (ptx_on_host) are held to it; those in C++ find NaN beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_on_host {

struct GlobalRange {
  uint64_t begin;
  uint64_t bytes;
  bool writable;

  bool holds(uint64_t address, size_t count) const {
    const uint64_t offset = address - begin;
    return offset <= bytes && count <= bytes - offset;
  }
};

class GlobalMemory {
 public:
  void clear() {
    ranges_.clear();
    read_ = written_ = GlobalRange{};
  }
  void add(const void* begin, size_t bytes, bool writable) {
    ranges_.push_back({reinterpret_cast<uintptr_t>(begin), bytes, writable});
  }

  bool holds(uint64_t address, size_t count, bool writes) {
    GlobalRange& recent = writes ? written_ : read_;
    if (__builtin_expect(recent.holds(address, count), 1)) return true;
    for (const GlobalRange& range : ranges_) {
      if (!range.holds(address, count) || (writes && !range.writable)) continue;
      recent = range;
      return true;
    }
    return false;
  }

 private:
  std::vector<GlobalRange> ranges_;
  GlobalRange read_{};  // the last that was found: the next access is often to the same
  GlobalRange written_{};
};

inline GlobalMemory global_memory;

}  // namespace cuda_on_host
