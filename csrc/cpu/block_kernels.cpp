#include "block_kernels.h"

#include <cmath>
#include <limits>

#include "../core/soft_cap.h"

// Clones of a function for each level of the instruction set, chosen by the loader (an ifunc),
// where compiler and platform have them; elsewhere the one version that the build's own flags give.
// The loader chooses before the thread sanitizer is there, which would then crash.
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__) || \
    defined(__SANITIZE_THREAD__)
#define EAFT_TARGET_CLONES
#elif __GNUC__ >= 12
#define EAFT_TARGET_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // does not know the levels by name
#define EAFT_TARGET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace eaft_ext::cpu {
namespace {

// Partial results are kept in this many lanes, so that a reduction has a fixed order, whatever the
// width of the vectors, and the compiler may vectorise it without leave to reorder sums.
constexpr int kLanes = 16;

EAFT_ALWAYS_INLINE void prefetch(Ahead& ahead) {
#if defined(__GNUC__)
  __builtin_prefetch(ahead.next);
#endif
  ahead.next += kLanes * ahead.element_size;
}

// exp(x) for x <= 0, within 1 ulp; 0 below -87.3, where the result leaves the normal range.
// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by a polynomial.
constexpr float kLowestExponent = -87.33654f;

EAFT_ALWAYS_INLINE float exp_nonpositive(float x) {
  constexpr float kLog2E = 1.44269504f;
  // ln 2 in two parts; the first has few bits, so that n times it is exact.
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  constexpr float kRound = 12582912.0f;
  const float clamped = x < kLowestExponent ? kLowestExponent : x;  // NaN passes
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < kLowestExponent ? 0.0f : p * power;
}

EAFT_ALWAYS_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// A number in the place of -inf, by which its exponential, 0, may be multiplied; NaN passes.
EAFT_ALWAYS_INLINE float finite(float x) { return x < kLowestExponent ? kLowestExponent : x; }
EAFT_ALWAYS_INLINE double finite(double x) { return x < -1e300 ? -1e300 : x; }

// Written so that NaN in x is passed over.
template <typename Real>
EAFT_ALWAYS_INLINE Real larger(Real x, Real largest) {
  return x > largest ? x : largest;
}

template <typename Real>
EAFT_ALWAYS_INLINE void scale_loop(const Real* x, Real* target, Real scale, int count) {
  for (int i = 0; i < count; ++i) target[i] = scale * x[i];
}

EAFT_ALWAYS_INLINE float capped(float x, float cap, float to_cap) {
  const float z = x * to_cap;
  const float near = soft_cap_near(x, z);
  const float far = soft_cap_far(z, cap, exp_nonpositive(-2.0f * std::fabs(z)));
  return std::fabs(z) < kNearZero ? near : far;  // NaN is far, and passes
}

// A group at a time: few have a logit that is not near 0, beside a cap.
EAFT_ALWAYS_INLINE void cap_loop(const float* x, float* target, LogitMap<float> map, int count) {
  const float to_cap = 1 / map.cap;
  const float* const end = x + count;
  for (; end - x >= kGroupSize; x += kGroupSize, target += kGroupSize) {
    float scaled[kGroupSize];
    for (int i = 0; i < kGroupSize; ++i) scaled[i] = map.scale * x[i];
    // Magnitudes are ordered as their bits are, and a maximum of integers is vectorised.
    uint32_t bits = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      const uint32_t magnitude = bit_cast<uint32_t>(scaled[i]) & 0x7fffffffu;
      bits = magnitude > bits ? magnitude : bits;
    }
    const auto largest = bit_cast<float>(bits);
    if (largest * to_cap < kNearZero) {
      for (int i = 0; i < kGroupSize; ++i) target[i] = soft_cap_near(scaled[i], scaled[i] * to_cap);
    } else {
      for (int i = 0; i < kGroupSize; ++i) target[i] = capped(scaled[i], map.cap, to_cap);
    }
  }
  for (; x != end; ++x, ++target) *target = capped(map.scale * *x, map.cap, to_cap);
}

EAFT_ALWAYS_INLINE void cap_loop(const double* x, double* target, LogitMap<double> map, int count) {
  for (int i = 0; i < count; ++i) target[i] = map(x[i]);
}

template <typename Real>
EAFT_ALWAYS_INLINE void map_logits_loop(const Real* x, Real* target, LogitMap<Real> map,
                                        int count) {
  if (map.cap == 0) {
    scale_loop(x, target, map.scale, count);
  } else {
    cap_loop(x, target, map, count);
  }
}

template <typename Real>
EAFT_ALWAYS_INLINE void times_slope_loop(Real* gradient, const Real* mapped, LogitMap<Real> map,
                                         int count) {
  for (int i = 0; i < count; ++i) gradient[i] *= map.slope(mapped[i]);
}

template <typename Real>
EAFT_ALWAYS_INLINE void group_maxima_loop(const Real* x, Real* group_max, int count) {
  for (int group = 0; group < count / kGroupSize; ++group, x += kGroupSize) {
    Real lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      Real largest = -std::numeric_limits<Real>::infinity();
      for (int i = 0; i < kGroupSize; i += kLanes) largest = larger(x[i + lane], largest);
      lanes[lane] = largest;
    }
    for (int lane = 0; lane < 8; ++lane) lanes[lane] = larger(lanes[lane + 8], lanes[lane]);
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = larger(lanes[lane + 4], lanes[lane]);
    for (int lane = 0; lane < 2; ++lane) lanes[lane] = larger(lanes[lane + 2], lanes[lane]);
    group_max[group] = larger(lanes[1], lanes[0]);
  }
}

template <typename Real>
EAFT_ALWAYS_INLINE void reaching_of_group_loop(const Real* group, Real threshold, bool* reaching) {
  for (int i = 0; i < kGroupSize; ++i) reaching[i] = group[i] >= threshold;
}

template <typename Real>
EAFT_ALWAYS_INLINE bool any_nan_loop(const Real* x, int count) {
  int found = 0;
  for (int i = 0; i < count; ++i) found |= x[i] != x[i];
  return found != 0;
}

// A group is summed by itself, and joins the rest in double: next to exp(0) = 1, terms below half
// an ulp of 1 would vanish one by one, and those are what is left to learn of a confident token.
// The sum over all lanes, in a fixed order.
EAFT_ALWAYS_INLINE double sum_of_lanes(double (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename Real>
EAFT_ALWAYS_INLINE double exp_sum_loop(const Real* x, Real max, int count, Ahead ahead) {
  double total[kLanes] = {};
  // A moving pointer, not an index: indices that may wrap (-fwrapv, in Python's flags) turn into
  // gathers.
  for (const Real* const end = x + count; x != end;) {
    Real group[kLanes] = {};
    for (int i = 0; i < kGroupSize / kLanes; ++i, x += kLanes) {
      prefetch(ahead);
      for (int lane = 0; lane < kLanes; ++lane) group[lane] += exp_nonpositive(x[lane] - max);
    }
    for (int lane = 0; lane < kLanes; ++lane) total[lane] += group[lane];
  }
  return sum_of_lanes(total);
}

// What the elements below the maximum add, however little beside its 1.
template <typename Real>
EAFT_ALWAYS_INLINE double sum_below_loop(const Real* x, Real max, int count) {
  double total[kLanes] = {};
  for (const Real* const end = x + count; x != end;) {
    Real group[kLanes] = {};
    for (int i = 0; i < kGroupSize / kLanes; ++i, x += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const Real shifted = x[lane] - max;
        group[lane] += exp_nonpositive(shifted) - (shifted == 0 ? Real(1) : Real(0));
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) total[lane] += group[lane];
  }
  return sum_of_lanes(total);
}

template <typename Real>
EAFT_ALWAYS_INLINE SumAndExact sum_and_exact_loop(const Real* x, Real max, int count, Ahead ahead) {
  double total[kLanes] = {};
  double total_weighted[kLanes] = {};
  const Real* const begin = x;
  for (const Real* const end = x + count; x != end;) {
    Real group[kLanes] = {};
    Real weighted[kLanes] = {};
    for (int i = 0; i < kGroupSize / kLanes; ++i, x += kLanes) {
      prefetch(ahead);
      for (int lane = 0; lane < kLanes; ++lane) {
        const Real shifted = x[lane] - max;
        const Real e = exp_nonpositive(shifted);
        group[lane] += e;
        weighted[lane] += e * finite(shifted);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      total[lane] += group[lane];
      total_weighted[lane] += weighted[lane];
    }
  }
  SumAndExact result;
  result.sum = sum_of_lanes(total);
  result.exact.rest = result.sum - 1;
  // Few blocks have a maximum that all others are so small beside.
  constexpr double kSmall = 1.0 / 64;
  if (result.exact.rest < kSmall && result.sum > 0) {
    result.exact.rest = sum_below_loop(begin, max, count);
  }
  result.exact.weighted = sum_of_lanes(total_weighted);
  return result;
}

template <typename Real>
EAFT_ALWAYS_INLINE double sum_loop(const Real* x, int count) {
  double total = 0;
  const Real* const end = x + count;
  while (end - x >= kGroupSize) {
    Real lanes[kLanes] = {};
    for (int i = 0; i < kGroupSize / kLanes; ++i, x += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  for (; x != end; ++x) total += *x;
  return total;
}

template <typename Real>
EAFT_ALWAYS_INLINE void scaled_exp_loop(const Real* x, Real* gradient, Real max, Real scale,
                                        int count) {
  // In place is exact: an element is read before it is written, and by no other. Without this word
  // the compiler would take its scalar version there, for fear of an overlap.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int i = 0; i < count; ++i) gradient[i] = scale * exp_nonpositive(x[i] - max);
}

}  // namespace

EAFT_TARGET_CLONES
void widen(const BFloat16* source, float* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = to_real(source[i]);
}

EAFT_TARGET_CLONES
void widen(const Half* source, float* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = to_real(source[i]);
}

EAFT_TARGET_CLONES
void narrow(const float* source, BFloat16* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = from_real<BFloat16>(source[i]);
}

EAFT_TARGET_CLONES
void narrow(const float* source, Half* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = from_real<Half>(source[i]);
}

EAFT_TARGET_CLONES
void map_logits(const float* x, float* target, LogitMap<float> map, int count) {
  map_logits_loop(x, target, map, count);
}
EAFT_TARGET_CLONES
void map_logits(const double* x, double* target, LogitMap<double> map, int count) {
  map_logits_loop(x, target, map, count);
}

EAFT_TARGET_CLONES
void times_slope(float* gradient, const float* mapped, LogitMap<float> map, int count) {
  times_slope_loop(gradient, mapped, map, count);
}
EAFT_TARGET_CLONES
void times_slope(double* gradient, const double* mapped, LogitMap<double> map, int count) {
  times_slope_loop(gradient, mapped, map, count);
}

EAFT_TARGET_CLONES
void group_maxima(const float* x, float* group_max, int count) {
  group_maxima_loop(x, group_max, count);
}

EAFT_TARGET_CLONES
void group_maxima(const double* x, double* group_max, int count) {
  group_maxima_loop(x, group_max, count);
}

EAFT_TARGET_CLONES
void reaching_of_group(const float* group, float threshold, bool* reaching) {
  reaching_of_group_loop(group, threshold, reaching);
}

EAFT_TARGET_CLONES
void reaching_of_group(const double* group, double threshold, bool* reaching) {
  reaching_of_group_loop(group, threshold, reaching);
}

EAFT_TARGET_CLONES
double sum(const float* x, int count) { return sum_loop(x, count); }
EAFT_TARGET_CLONES
double sum(const double* x, int count) { return sum_loop(x, count); }

EAFT_TARGET_CLONES
void subtract(float* gradient, float uniform, int count) {
  for (int i = 0; i < count; ++i) gradient[i] -= uniform;
}
EAFT_TARGET_CLONES
void subtract(double* gradient, double uniform, int count) {
  for (int i = 0; i < count; ++i) gradient[i] -= uniform;
}

EAFT_TARGET_CLONES
bool any_nan(const float* x, int count) { return any_nan_loop(x, count); }

EAFT_TARGET_CLONES
bool any_nan(const double* x, int count) { return any_nan_loop(x, count); }

EAFT_TARGET_CLONES
double exp_sum(const float* x, float max, int count, Ahead ahead) {
  return exp_sum_loop(x, max, count, ahead);
}

EAFT_TARGET_CLONES
double exp_sum(const double* x, double max, int count, Ahead ahead) {
  return exp_sum_loop(x, max, count, ahead);
}

EAFT_TARGET_CLONES
SumAndExact sum_and_exact(const float* x, float max, int count, Ahead ahead) {
  return sum_and_exact_loop(x, max, count, ahead);
}

EAFT_TARGET_CLONES
SumAndExact sum_and_exact(const double* x, double max, int count, Ahead ahead) {
  return sum_and_exact_loop(x, max, count, ahead);
}

EAFT_TARGET_CLONES
void scaled_exp(const float* x, float* gradient, float max, float scale, int count) {
  scaled_exp_loop(x, gradient, max, scale, count);
}

EAFT_TARGET_CLONES
void scaled_exp(const double* x, double* gradient, double max, double scale, int count) {
  scaled_exp_loop(x, gradient, max, scale, count);
}

}  // namespace eaft_ext::cpu
