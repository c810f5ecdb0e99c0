// The SIMD loops of the CPU path, over one block of a row that fits the first-level cache: plain
// loops which the compiler vectorises, with function multiversioning: cloned per instruction set
// and chosen at load time.
//
// `count` is at most kBlockSize. exp(x - max) is 0 for x = -inf and NaN for x = NaN.
#pragma once

#include "../core/entropy.h"
#include "../core/logit_map.h"
#include "element_types.h"

namespace eaft_ext::cpu {

// 4096 floats are 16 KB: half of a 32 KB cache, the rest is for the block that comes in behind.
constexpr int kBlockSize = 4096;
// The maximum of every group is remembered for the selection of the top k.
constexpr int kGroupSize = 128;
constexpr int kGroupsPerBlock = kBlockSize / kGroupSize;
static_assert(kBlockSize % kGroupSize == 0, "a group lies in one block");

// Memory to bring in while a loop computes, element by element. It is never read here, so it may
// lie past the end of the tensor.
struct Ahead {
  const char* next;
  int element_size;
};

// target_i = source_i: exactly, and back, rounded. Passes of their own over the block: in one loop
// with the exponential, the long conversions of a half cost more than the passes do.
void widen(const BFloat16* source, float* target, int count);
void widen(const Half* source, float* target, int count);
void narrow(const float* source, BFloat16* target, int count);
void narrow(const float* source, Half* target, int count);

// target_j = map(x_j). target may be x.
void map_logits(const float* x, float* target, LogitMap<float> map, int count);
void map_logits(const double* x, double* target, LogitMap<double> map, int count);

// gradient_j *= dx'_j/dx_j, from mapped_j = x'_j.
void times_slope(float* gradient, const float* mapped, LogitMap<float> map, int count);
void times_slope(double* gradient, const double* mapped, LogitMap<double> map, int count);

// sum_j x_j
double sum(const float* x, int count);
double sum(const double* x, int count);

// group_max[g] = the largest of group g, NaN left out. count is a multiple of kGroupSize.
void group_maxima(const float* x, float* group_max, int count);
void group_maxima(const double* x, double* group_max, int count);

// reaching[i] = whether element i of a group is at least `threshold`; NaN is not.
void reaching_of_group(const float* group, float threshold, bool* reaching);
void reaching_of_group(const double* group, double threshold, bool* reaching);

bool any_nan(const float* x, int count);
bool any_nan(const double* x, int count);

// sum_j exp(x_j - max). count is a multiple of kGroupSize.
double exp_sum(const float* x, float max, int count, Ahead ahead);
double exp_sum(const double* x, double max, int count, Ahead ahead);

// The same sum, in every bit, and what the entropy of all logits takes, but for its maximum. A term
// of the weighted sum whose exponential is 0 is 0.
struct SumAndExact {
  double sum;
  ExactSums<double> exact;
};
SumAndExact sum_and_exact(const float* x, float max, int count, Ahead ahead);
SumAndExact sum_and_exact(const double* x, double max, int count, Ahead ahead);

// gradient_j -= uniform
void subtract(float* gradient, float uniform, int count);
void subtract(double* gradient, double uniform, int count);

// gradient_j = scale * exp(x_j - max). gradient may be x.
void scaled_exp(const float* x, float* gradient, float max, float scale, int count);
void scaled_exp(const double* x, double* gradient, double max, double scale, int count);

}  // namespace eaft_ext::cpu
