// Element types on the device: 16 bytes at a time, computed in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace eaft_ext::cuda {

constexpr int kVectorBytes = 16;

template <typename Element>
constexpr int kVectorSize = kVectorBytes / sizeof(Element);

// What one load or store instruction moves.
template <typename Element>
struct alignas(kVectorBytes) Vector {
  Element elements[kVectorSize<Element>];
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

// To the nearest, ties to even.
template <typename Element>
__device__ Element from_float(float value);
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

// Elements from `pointer` to the next multiple of 16 bytes.
template <typename Element>
__device__ inline int elements_to_alignment(const Element* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<int>((kVectorBytes - address % kVectorBytes) % kVectorBytes / sizeof(Element));
}

}  // namespace eaft_ext::cuda
