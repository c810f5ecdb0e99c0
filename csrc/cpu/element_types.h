// The 16-bit element types as plain bits, the type that each element type is computed in, and the
// conversions: plain integer arithmetic, so that a loop over them vectorises on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define EAFT_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define EAFT_ALWAYS_INLINE inline
#endif

namespace eaft_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename Element>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};

template <typename Element>
using Compute = typename ComputeType<Element>::Type;

template <typename To, typename From>
EAFT_ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

EAFT_ALWAYS_INLINE float to_real(float value) { return value; }

EAFT_ALWAYS_INLINE double to_real(double value) { return value; }

EAFT_ALWAYS_INLINE float to_real(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// To the nearest, ties to even.
template <typename Element>
EAFT_ALWAYS_INLINE Element from_real(Compute<Element> value) {
  return value;
}

// A half's exponent and fraction, moved into a float's place, are its value times 2^-112; the
// product also turns subnormal halves into normal floats. Infinity and NaN take the highest
// exponent.
EAFT_ALWAYS_INLINE float to_real(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half.bits & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f);
  const uint32_t special = rest | 0x7f800000u;
  return bit_cast<float>(sign | (rest >= 0x0f800000u ? special : scaled));
}

// Adding a power of two whose last bit is the half's last bit rounds there, ties to even: 2^13 ulps
// above the value for a normal half, 2^-1 for a subnormal one.
template <>
EAFT_ALWAYS_INLINE Half from_real<Half>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 65536 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;    // NaN
  return {static_cast<uint16_t>(sign | half)};
}

template <>
EAFT_ALWAYS_INLINE BFloat16 from_real<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

}  // namespace eaft_ext::cpu
