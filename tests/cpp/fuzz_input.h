// What a fuzzer's bytes say: numbers in a range, one after the other; 0 where there are no more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  bool empty() const { return data_ == end_; }

  uint8_t byte() { return empty() ? uint8_t{0} : *data_++; }

  bool flag() { return byte() % 2 == 1; }

  // From `least` to `most`, both included, which are at most 2^16 apart.
  int64_t integer(int64_t least, int64_t most) {
    uint32_t number = byte();
    if (most - least > 255) number |= static_cast<uint32_t>(byte()) << 8;
    return least + number % (most - least + 1);
  }

  // From 0 to 1, both included.
  double fraction() { return byte() / 255.0; }

  // Any float: one that is known to be difficult, or what its bits say.
  float any_float() {
    using Limits = std::numeric_limits<float>;
    constexpr float kDifficult[] = {0.0f,
                                    -0.0f,
                                    1.0f,
                                    -1.0f,
                                    1e-3f,
                                    20.0f,
                                    -87.5f,
                                    88.5f,
                                    1e4f,
                                    -1e4f,
                                    65504.0f,
                                    1e30f,
                                    Limits::max(),
                                    -Limits::max(),
                                    Limits::min(),
                                    -1e30f,
                                    1e-40f,
                                    3.0e38f,
                                    Limits::infinity(),
                                    -Limits::infinity(),
                                    Limits::quiet_NaN()};
    constexpr size_t kCount = sizeof(kDifficult) / sizeof(float);
    const size_t which = byte();
    if (which < 3 * kCount) return kDifficult[which % kCount];
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = bits << 8 | byte();
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
};
