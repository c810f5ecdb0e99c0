// What opcodes.py cannot say in one expression of C++: shifts and bit fields at their limits,
// rounding, NaN, and the approximations, each as the PTX ISA has it.
#pragma once

#include <fenv.h>

#include <cmath>

#include "values.h"

namespace ptx_on_host {

// ---- Integers.

template <typename T>
constexpr u32 kBits = 8 * sizeof(T);

// "shl", "shr": a shift by more than there are bits is one by as many.
template <typename T>
T shift_left(T value, u32 by) {
  return by < kBits<T> ? static_cast<T>(value << by) : T{0};
}
template <typename T>
T shift_right(T value, u32 by) {
  if (by < kBits<T>) return static_cast<T>(value >> by);
  return value < T{0} ? static_cast<T>(-1) : T{0};
}

// "shf.l.wrap": the upper half of high:low, shifted to the left by five bits of `by`.
inline u32 funnel_shift_left(u32 low, u32 high, u32 by) {
  const u64 both = u64{high} << 32 | low;
  return static_cast<u32>(both << (by & 31) >> 32);
}

// "bfind.shiftamt": by how much to shift the highest 1 to the top.
inline u32 shift_of_highest(u32 value) {
  return value == 0 ? ~0u : static_cast<u32>(__builtin_clz(value));
}

// "bfi": `length` bits of `field` in those of `base` from `start` on. Both are bytes.
template <typename T>
T insert_bits(T field, T base, u32 start, u32 length) {
  start &= 255;
  length &= 255;
  for (u32 i = 0; i < length && start + i < kBits<T>; ++i) {
    const T bit = T{1} << (start + i);
    const bool set = i < kBits<T> && (field >> i & 1) != 0;
    base = set ? base | bit : base & ~bit;
  }
  return base;
}

// ---- Floating point. The device has one NaN for float32: 0x7fffffff.

inline f32 number(f32 value) {
  return __builtin_expect(value != value, 0) ? as<f32>(0x7fffffffu) : value;
}
inline f64 number(f64 value) { return value; }

template <typename T>
T flushed(T value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(T{0}, value) : value;
}

// "fma.rm"
__attribute__((noinline)) inline f32 fused_downward(f32 a, f32 b, f32 c) {
  volatile f32 first = a;  // not before the rounding is changed
  const int before = fegetround();
  fesetround(FE_DOWNWARD);
  volatile f32 result = std::fmaf(first, b, c);
  fesetround(before);
  return result;
}

// "cvt.sat.f32.f32": NaN becomes 0.
inline f32 saturated(f32 value) { return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f; }

// ---- Approximations: by how many units in the last place they may be off, either way. The same
// input has the same error, as on a device.

inline int approximation_ulps = 0;

inline f32 approximately(f32 exact, f32 input) {
  if (approximation_ulps == 0 || !std::isfinite(exact) || exact == 0) return exact;
  const u32 hash = as<u32>(input) * 0x9e3779b1u >> 16;
  const int off = static_cast<int>(hash % (2 * approximation_ulps + 1)) - approximation_ulps;
  return as<f32>(static_cast<u32>(as<s32>(exact) + off));
}

// "ex2.approx": two units in the last place; exact where the result is no number or 1.
inline f32 exp2_approximate(f32 x) {
  if (x != x) return number(x);
  const f32 exact = std::exp2f(x);
  return x == 0 ? exact : approximately(exact, x);
}
inline f32 exp2_approximate_flushed(f32 x) { return flushed(exp2_approximate(flushed(x))); }

// "rcp.approx.ftz.f64": the upper half of the reciprocal's bits.
inline f64 reciprocal_approximate(f64 x) {
  const f64 exact = flushed(1.0 / flushed(x));
  return as<f64>(as<u64>(exact) & 0xffffffff00000000u);
}

}  // namespace ptx_on_host
