// The shared memory of a block: exactly as much as the launch asks for, 128-byte aligned and no
// more, poisoned before every block, between guards that must stay as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace cuda_on_host {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // of compute capability 9.0

class Arena {
 public:
  void resize(size_t bytes) {
    bytes_ = bytes;
    memory_.resize(bytes + 2 * kGuardBytes + 256);
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
    base_ = memory_.data() + kGuardBytes + (256 + 128 - first % 256) % 256;
    std::memcpy(base_ - kGuardBytes, guard(), kGuardBytes);
    std::memcpy(base_ + bytes_, guard(), kGuardBytes);
  }

  unsigned char* base() const { return base_; }
  size_t bytes() const { return bytes_; }

  // NaN, as floats of any size.
  void poison() { std::memset(base_, 0xff, bytes_); }

  bool holds(const void* pointer, size_t bytes) const {
    const size_t offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(base_);
    return offset <= bytes_ && bytes <= bytes_ - offset;
  }

  // A byte outside that was written to, or null.
  const unsigned char* overrun() const {
    for (const unsigned char* begin : {base_ + bytes_, base_ - kGuardBytes}) {
      if (std::memcmp(begin, guard(), kGuardBytes) == 0) continue;
      size_t i = 0;
      while (begin[i] == guard()[i]) ++i;
      return begin + i;
    }
    return nullptr;
  }

 private:
  static constexpr size_t kGuardBytes = 8 * 1024;

  // NaN too for who reads it, but another one than the poison.
  static const unsigned char* guard() {
    static unsigned char bytes[kGuardBytes];
    if (bytes[0] == 0) {
      for (size_t i = 0; i < kGuardBytes; ++i) bytes[i] = i % 2 ? 0x7f : 0xff;
    }
    return bytes;
  }

  std::vector<unsigned char> memory_;
  unsigned char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace cuda_on_host
