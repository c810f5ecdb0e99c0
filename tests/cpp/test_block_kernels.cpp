// The hot loops of the CPU path, against the standard library and the compiler's own conversions.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/block_kernels.h"

using namespace eaft_ext::cpu;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float exp_of(float x) {
  float result;
  scaled_exp(&x, &result, 0.0f, 1.0f, 1);
  return result;
}

void exp_is_within_one_ulp() {
  double worst = 0;
  for (float x = -87.3f; x < -1e-30f; x *= 0.9999f) {
    const double exact = std::exp(static_cast<double>(x));
    const float rounded = static_cast<float>(exact);
    const double ulp = std::nextafter(rounded, 2.0f) - rounded;
    worst = std::max(worst, std::fabs(exp_of(x) - exact) / ulp);
  }
  CHECK_BELOW(worst, 1.0);
}

void exp_keeps_special_values() {
  CHECK_EQUAL(exp_of(0.0f), 1.0f);
  CHECK_EQUAL(exp_of(-kInfinity), 0.0f);
  CHECK_EQUAL(exp_of(-1e30f), 0.0f);
  CHECK_EQUAL(std::isnan(exp_of(std::nanf(""))), true);
}

void in_place_equals_out_of_place() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(kBlockSize), expected(kBlockSize);
  for (float& value : x) value = normal(random) - 5;
  scaled_exp(x.data(), expected.data(), 0.0f, 0.5f, kBlockSize);
  scaled_exp(x.data(), x.data(), 0.0f, 0.5f, kBlockSize);
  CHECK_EQUAL(x == expected, true);
}

void sums_and_maxima() {
  std::vector<float> x(2 * kGroupSize, -kInfinity);
  x[3] = 2.0f;
  x[kGroupSize + 7] = -1.0f;
  x[kGroupSize + 8] = std::nanf("");
  float maxima[2];
  group_maxima(x.data(), maxima, 2 * kGroupSize);
  CHECK_EQUAL(maxima[0], 2.0f);
  CHECK_EQUAL(maxima[1], -1.0f);
  const Ahead nothing{reinterpret_cast<const char*>(x.data()), 0};
  CHECK_EQUAL(std::isnan(exp_sum(x.data(), 2.0f, 2 * kGroupSize, nothing)), true);
  CHECK_EQUAL(any_nan(x.data(), 2 * kGroupSize), true);
  CHECK_EQUAL(any_nan(x.data(), kGroupSize), false);
  CHECK_EQUAL(exp_sum(x.data(), 2.0f, kGroupSize, nothing), 1.0f);
}

void weighted_sums() {
  std::vector<float> x(2 * kGroupSize, -kInfinity);
  x[3] = 2.0f;
  x[kGroupSize + 7] = -1.0f;
  x[kGroupSize + 8] = -1e30f;
  const Ahead nothing{reinterpret_cast<const char*>(x.data()), 0};
  const SumAndExact sums = sum_and_exact(x.data(), 2.0f, 2 * kGroupSize, nothing);
  CHECK_EQUAL(sums.sum, exp_sum(x.data(), 2.0f, 2 * kGroupSize, nothing));
  CHECK_BELOW(std::fabs(sums.exact.weighted + 3 * std::exp(-3.0)), 1e-7);
  CHECK_BELOW(std::fabs(sums.exact.rest - std::exp(-3.0)), 1e-8);
  x[5] = std::nanf("");
  CHECK_EQUAL(std::isnan(sum_and_exact(x.data(), 2.0f, 2 * kGroupSize, nothing).exact.rest), true);
}

#if defined(__FLT16_MAX__)
uint16_t bits_of(_Float16 value) {
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

void every_half_converts_exactly() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const Half half{static_cast<uint16_t>(i)};
    _Float16 native;
    std::memcpy(&native, &half, sizeof(native));
    float widened;
    widen(&half, &widened, 1);
    if (std::isnan(widened)) {
      CHECK_EQUAL(std::isnan(static_cast<float>(native)), true);
    } else {
      CHECK_EQUAL(widened, static_cast<float>(native));
      CHECK_EQUAL(from_real<Half>(widened).bits, half.bits);
    }
  }
}

void floats_round_to_half_like_the_compiler() {
  std::mt19937 random(2);
  for (int i = 0; i < 1000000; ++i) {
    // Every exponent that a half has, those around them, and any fraction.
    const uint32_t bits = ((100u + random() % 46u) << 23) | (random() & 0x807fffffu);
    const float value = bit_cast<float>(bits);
    CHECK_EQUAL(from_real<Half>(value).bits, bits_of(static_cast<_Float16>(value)));
  }
}
#endif

void bfloat16_rounds_to_nearest_even() {
  CHECK_EQUAL(from_real<BFloat16>(1.00390625f).bits, 0x3f80);  // half an ulp above 1: to even
  CHECK_EQUAL(from_real<BFloat16>(1.01171875f).bits, 0x3f82);  // one and a half: to even, up
  CHECK_EQUAL(from_real<BFloat16>(1.0039063692f).bits, 0x3f81);
  CHECK_EQUAL(from_real<BFloat16>(kInfinity).bits, 0x7f80);
  CHECK_EQUAL(from_real<BFloat16>(std::nanf("")).bits, 0x7fc0);
}

}  // namespace

int main() {
  exp_is_within_one_ulp();
  exp_keeps_special_values();
  in_place_equals_out_of_place();
  sums_and_maxima();
  weighted_sums();
#if defined(__FLT16_MAX__)
  every_half_converts_exactly();
  floats_round_to_half_like_the_compiler();
#endif
  bfloat16_rounds_to_nearest_even();
  return failures == 0 ? 0 : 1;
}
