// Online softmax: the running maximum and denominator of some of a row's elements,
//
//     max = max_j x_j          sum = sum_j exp(x_j - max)
//
// Two of these merge into one exactly as if their elements had been seen together, so blocks of a
// row, threads of a block and shards of a vocabulary all use this one rule. The maximum stays apart
// from the sum: ln(sum) + (max - x_y) is then shift-invariant in float32.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"

namespace eaft_ext {

template <typename Real>
struct MaxSum {
  Real max = -std::numeric_limits<Real>::infinity();
  Real sum = 0;
};

template <typename Real>
EAFT_HOST_DEVICE inline MaxSum<Real> merge(MaxSum<Real> a, MaxSum<Real> b) {
  const Real max = a.max > b.max ? a.max : b.max;
  // A sum whose maximum is the common one stays as it is. This also covers two sums without a
  // finite element, where exp(-inf - -inf) would be NaN.
  const Real scaled_a = a.max == max ? a.sum : a.sum * std::exp(a.max - max);
  const Real scaled_b = b.max == max ? b.sum : b.sum * std::exp(b.max - max);
  return {max, scaled_a + scaled_b};
}

}  // namespace eaft_ext
