// A soft cap, cap tanh(x / cap), without a branch, for loops over rows: within 2 ulp on a host, and
// on a device as exact as its approximate exponential and quotient. It is put together from its two
// ranges, where z = x / cap.
#pragma once

#include <cmath>

#include "host_device.h"

namespace eaft_ext {

constexpr float kNearZero = 0.625f;

// On a device rounded once and everywhere alike: a compiler that contracts a product and a sum in
// one place, and not in another, would have a label differ from the maximum that it is.
EAFT_HOST_DEVICE inline float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// |z| below that: an odd polynomial (Cephes' tanhf).
EAFT_HOST_DEVICE inline float soft_cap_near(float x, float z) {
  const float square = z * z;
  float p = -5.70498872745e-3f;
  p = multiply_add(p, square, 2.06390887954e-2f);
  p = multiply_add(p, square, -5.37397155531e-2f);
  p = multiply_add(p, square, 1.33314422036e-1f);
  p = multiply_add(p, square, -3.33332819422e-1f);
  return multiply_add(p * square, x, x);
}

// Beyond, the cap less what is missing: the product with the cap is then not a rounding of its own.
// exponential: exp(-2 |z|). NaN is beyond, and passes.
EAFT_HOST_DEVICE inline float soft_cap_far(float z, float cap, float exponential) {
#if defined(__CUDA_ARCH__)
  const float missing = __fdividef(2.0f * exponential, 1.0f + exponential);  // no call
#else
  const float missing = 2.0f * exponential / (1.0f + exponential);
#endif
  return std::copysign(multiply_add(-cap, missing, cap), z);
}

}  // namespace eaft_ext
