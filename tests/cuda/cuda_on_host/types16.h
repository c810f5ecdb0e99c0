// The 16-bit floating-point types of CUDA, as their bits, and their conversions: to the nearest,
// ties to even, all NaN becoming one.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  uint16_t bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x;
  __nv_bfloat16 y;
};

struct alignas(4) __half2 {
  __half x;
  __half y;
};

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

// A half's exponent and fraction in a float's place are its value times 2^-112, also if subnormal.
inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | magnitude);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000u;
  const uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit is a subnormal half's
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {  // from 65520 on this carries into the exponent, and gives infinity
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

namespace cuda_on_host {

// The number, if one is NaN; +0 is above -0.
template <typename T>
T maximum(T a, T b, float a_value, float b_value) {
  if (a_value != a_value && b_value != b_value) return {0x7fff};
  if (a_value != a_value) return b;
  if (b_value != b_value) return a;
  if (a_value == b_value) return (a.bits & 0x8000u) == 0 ? a : b;
  return a_value > b_value ? a : b;
}

}  // namespace cuda_on_host

inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) {
  return cuda_on_host::maximum(a, b, __bfloat162float(a), __bfloat162float(b));
}
inline __half __hmax(__half a, __half b) {
  return cuda_on_host::maximum(a, b, __half2float(a), __half2float(b));
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
