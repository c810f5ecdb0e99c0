// Warp reductions, by shuffles and redux, and the online softmax sums that they merge. Every lane
// gets the result, and the order of the additions is fixed: the same bits run after run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/entropy.h"
#include "device.cuh"

namespace eaft_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

__device__ inline uint32_t warp_and(uint32_t bits) { return __reduce_and_sync(kAllLanes, bits); }
__device__ inline uint32_t warp_or(uint32_t bits) { return __reduce_or_sync(kAllLanes, bits); }
__device__ inline uint64_t warp_and(uint64_t bits) {
  const uint64_t high = warp_and(static_cast<uint32_t>(bits >> 32));
  return high << 32 | warp_and(static_cast<uint32_t>(bits));
}
__device__ inline uint64_t warp_or(uint64_t bits) {
  const uint64_t high = warp_or(static_cast<uint32_t>(bits >> 32));
  return high << 32 | warp_or(static_cast<uint32_t>(bits));
}

// The online softmax sum of some elements, as in core/max_sum.h: sum = sum_j exp(x_j - max). In
// double, because next to the maximum's own 1 a float forgets what the others add, and close to
// p = 1 that is the nll.
struct SoftmaxSum {
  float max;
  double sum;

  __device__ double log_sum() const { return log1p(sum - 1); }
};

// The same with what the entropy of all logits takes (ExactSums of core/entropy.h): rest is the sum
// less the maximum's own 1, and weighted sum_j exp(x_j - max) (x_j - max).
struct WeightedSum : SoftmaxSum {
  double rest = -1;
  double weighted = 0;

  __device__ double entropy() const { return EntropySums<double>{rest, weighted}.entropy(); }
};

// And with the sum of the elements themselves, for label smoothing.
struct FamilySum : WeightedSum {
  double logits;
};

template <typename Loss>
using SumOf =
    std::conditional_t<Loss::kSumsEntropy,
                       std::conditional_t<Loss::kIsPlain, WeightedSum, FamilySum>, SoftmaxSum>;

// What an exponent is taken relative to: finite, also where there is no finite element.
__device__ inline float reference_of(float max) { return fmaxf(max, kLowest); }

// exp(x - reference). The difference comes before the change of base: folded into one multiply-add,
// logits near 1e4 would lose three digits.
__device__ inline float exp_relative(float x, float reference) {
  return exp2_approximate((x - reference) * kLog2E);
}

// Merges get(0) ... get(n - 1).
template <typename Get>
__device__ inline auto warp_merge(int n, const Get& get) {
  using Sum = decltype(get(0));
  float max = -INFINITY;
  for (int i = lane_index(); i < n; i += kWarpSize) max = fmaxf(max, get(i).max);
  max = warp_max(max);
  double sum = 0;
  for (int i = lane_index(); i < n; i += kWarpSize) {
    const Sum one = get(i);
    sum += one.sum * static_cast<double>(exp_relative(one.max, reference_of(max)));
  }
  Sum merged{};
  merged.max = max;
  merged.sum = warp_sum(sum);
  if constexpr (std::is_base_of_v<WeightedSum, Sum>) {
    // One of those with the maximum leaves its 1 out.
    int largest = -1;
    for (int i = lane_index(); i < n; i += kWarpSize) {
      if (get(i).max == max) largest = i;
    }
    const unsigned holders = __ballot_sync(kAllLanes, largest >= 0);
    if (lane_index() != __ffs(static_cast<int>(holders)) - 1) largest = -1;
    double rest = 0;
    double weighted = 0;
    for (int i = lane_index(); i < n; i += kWarpSize) {
      const Sum one = get(i);
      const float scale = exp_relative(one.max, reference_of(max));
      if (i == largest) {
        rest += one.rest;
        weighted += one.weighted;
      } else if (scale != 0) {  // else the maxima may be infinitely far apart
        const double moved = static_cast<double>(one.max - max) * (1 + one.rest);
        rest += static_cast<double>(scale) * (1 + one.rest);
        weighted += static_cast<double>(scale) * (one.weighted + moved);
      }
    }
    merged.rest = warp_sum(rest);
    merged.weighted = warp_sum(weighted);
  }
  if constexpr (std::is_same_v<Sum, FamilySum>) {
    double logits = 0;
    for (int i = lane_index(); i < n; i += kWarpSize) logits += get(i).logits;
    merged.logits = warp_sum(logits);
  }
  return merged;
}

}  // namespace eaft_ext::cuda
