// The entropy, in nats, of the k largest logits of a row, renormalised among themselves:
//
//     Z = sum_i exp(t_i - t_1)      q_i = exp(t_i - t_1) / Z
//     H = ln Z - sum_i q_i (t_i - t_1)
//
// t_1 is the largest. A term with q_i = 0 is 0, also where t_i = -inf. The 1 that t_1 adds to Z is
// left to the end, where ln Z = log1p(Z - 1): of a confident token the others are all there is.
#pragma once

#include <cmath>

#include "host_device.h"

namespace eaft_ext {

// Sums over the values but the largest. Those of disjoint sets of values add up.
template <typename Real>
struct EntropySums {
  Real z = 0;         // sum_{i > 1} exp(t_i - t_1)
  Real weighted = 0;  // sum_{i > 1} exp(t_i - t_1) (t_i - t_1)

  // shifted: t_i - t_1
  EAFT_HOST_DEVICE void add(Real shifted) {
    const Real e = std::exp(shifted);
    z += e;
    if (e != 0) weighted += e * shifted;
  }

  EAFT_HOST_DEVICE Real entropy() const { return std::log1p(z) - weighted / (1 + z); }
};

// values: k logits, the largest first.
template <typename Real>
EAFT_HOST_DEVICE inline Real topk_entropy(const Real* values, int k) {
  EntropySums<Real> sums;
  for (int i = k - 1; i > 0; --i) sums.add(values[i] - values[0]);  // from the smallest
  return sums.entropy();
}

}  // namespace eaft_ext
