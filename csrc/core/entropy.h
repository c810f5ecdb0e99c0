// The entropy, in nats, of the k largest logits of a row, renormalised among themselves:
//
//     Z = sum_i exp(t_i - t_1)      q_i = exp(t_i - t_1) / Z
//     H = ln Z - sum_i q_i (t_i - t_1)
//
// t_1 is the largest. A term with q_i = 0 is 0, also where t_i = -inf.
#pragma once

#include <cmath>

#include "host_device.h"

namespace eaft_ext {

// values: k logits, the largest first.
template <typename Real>
EAFT_HOST_DEVICE inline Real topk_entropy(const Real* values, int k) {
  Real z = 0;
  Real weighted = 0;
  // From the smallest, next to whose sum the 1 of the largest comes last.
  for (int i = k - 1; i >= 0; --i) {
    const Real shifted = values[i] - values[0];
    const Real e = std::exp(shifted);
    z += e;
    if (e != 0) weighted += e * shifted;
  }
  return std::log(z) - weighted / z;
}

}  // namespace eaft_ext
