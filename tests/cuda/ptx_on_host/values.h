// The types of PTX (PTX ISA, "Fundamental Types"), and what a register holds as one of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch_on_host.h"

namespace ptx_on_host {

using pred = bool;
using b8 = uint8_t;
using u8 = uint8_t;
using s8 = int8_t;
using b16 = uint16_t;
using u16 = uint16_t;
using s16 = int16_t;
using b32 = uint32_t;
using u32 = uint32_t;
using s32 = int32_t;
using b64 = uint64_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using f16 = __half;
using bf16 = __nv_bfloat16;
using f16x2 = __half2;
using bf16x2 = __nv_bfloat162;

using cuda_on_host::fail;
using cuda_on_host::machine;
using cuda_on_host::Place;

// The same bits as another type of the same size.
template <typename To, typename From>
__attribute__((always_inline)) inline To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "an operand has the size of its instruction's type");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// A register that is wider than the type of a conversion or store gives its low bits; one that is
// wider than what is loaded is filled by its sign, or by zeros.
template <typename To, typename From>
__attribute__((always_inline)) inline To low(From value) {
  static_assert(sizeof(To) < sizeof(From), "for wider registers");
  return static_cast<To>(value);
}
template <typename To, typename From>
__attribute__((always_inline)) inline To widened(From value) {
  static_assert(sizeof(From) < sizeof(To), "for wider registers");
  static_assert(std::is_integral<From>::value, "a float is not widened by its bits");
  return static_cast<To>(static_cast<int64_t>(value));
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Several {
  T items[kCount];
};

template <typename T>
T from_bytes(const unsigned char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}
template <typename T>
void to_bytes(unsigned char* bytes, T value) {
  std::memcpy(bytes, &value, sizeof(value));
}

// A register that some way through the function leaves unwritten says so when it is read.
inline void need_written(bool written, const char* name, Place place = Place::here()) {
  if (!written) fail(place, "the register %s is read, and was not written", name);
}

}  // namespace ptx_on_host
