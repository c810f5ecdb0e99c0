// Vectorised access to the element types, 16 bytes at a time: conversions, computed in float, and
// the order-preserving integer keys of a radix select.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace eaft_ext::cuda {

constexpr int kVectorBytes = 16;

template <typename Element>
constexpr int kVectorSize = kVectorBytes / sizeof(Element);

// What one load or store instruction moves.
template <typename Element>
struct alignas(kVectorBytes) Vector {
  Element elements[kVectorSize<Element>];
};

template <typename To, typename From>
__device__ inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename Element>
using PairOf = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;

// To the nearest, ties to even.
template <typename Element>
__device__ inline Element from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// recompute_from() for a vector.
template <typename Element>
__device__ inline void recompute_from(Vector<Element>& vector) {
  uint4 bits = bit_cast<uint4>(vector);
  recompute_from(bits);
  vector = bit_cast<Vector<Element>>(bits);
}

// The largest element; NaN is passed over.
template <typename Element>
__device__ inline float largest_of(const Vector<Element>& vector) {
  if constexpr (sizeof(Element) == 4) {
    const auto& x = vector.elements;
    return fmaxf(fmaxf(to_float(x[0]), to_float(x[1])), fmaxf(to_float(x[2]), to_float(x[3])));
  } else {
    using Pair = PairOf<Element>;
    struct Pairs {
      Pair p[4];
    };
    const auto pairs = bit_cast<Pairs>(vector);
    const Pair pair = __hmax2(__hmax2(pairs.p[0], pairs.p[1]), __hmax2(pairs.p[2], pairs.p[3]));
    return fmaxf(to_float(pair.x), to_float(pair.y));
  }
}

// The element at a place that is known only at run time, without an array in local memory.
template <typename Element>
__device__ inline Element element_at(const Vector<Element>& vector, int place) {
  const uint4 words = bit_cast<uint4>(vector);
  const int word = place * static_cast<int>(sizeof(Element)) / 4;
  const uint32_t low = word & 1 ? words.y : words.x;
  const uint32_t high = word & 1 ? words.w : words.z;
  const uint32_t bits = word & 2 ? high : low;
  if constexpr (sizeof(Element) == 8) {
    return place == 0 ? uint64_t{words.y} << 32 | words.x : uint64_t{words.w} << 32 | words.z;
  } else if constexpr (sizeof(Element) == 4) {
    return bit_cast<Element>(bits);
  } else {
    return bit_cast<Element>(static_cast<uint16_t>(place & 1 ? bits >> 16 : bits));
  }
}

// Elements from `pointer` to the next multiple of 16 bytes.
template <typename Element>
__device__ inline int elements_to_alignment(const Element* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<int>((kVectorBytes - address % kVectorBytes) % kVectorBytes / sizeof(Element));
}

// ---- Order keys: unsigned integers in the order of the values, NaN above all. -0 is just below
// +0. A value that came from 16 bits has that many zeros at its end as a float; the key drops them,
// and a search bit by bit is so much shorter.

template <typename Element>
constexpr int kZeroBits = 0;
template <>
constexpr int kZeroBits<__nv_bfloat16> = 16;
template <>
constexpr int kZeroBits<__half> = 13;

template <typename Element>
constexpr int kKeyBits = 32 - kZeroBits<Element>;

template <typename Element>
__device__ inline uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t ordered = value != value ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ordered >> kZeroBits<Element>;
}

template <typename Element>
__device__ inline float value_of(uint32_t key) {
  const bool negative = (key >> (kKeyBits<Element> - 1)) == 0;
  const uint32_t bits = negative ? ~key : key ^ (1u << (kKeyBits<Element> - 1));
  return __uint_as_float(bits << kZeroBits<Element>);
}

}  // namespace eaft_ext::cuda
