// What the loss of a token is, as one thing from an operator's arguments to the loop over rows. The
// Python side is TokenLoss of eaft_ext/_options.py. Of a row x with label y:
//
//     x' = map(x)     nll = lse - x'_y     lse = ln sum_j exp(x'_j)
//     loss = g nll + z_loss lse^2
//     dL/dx'_j = u ((g + 2 z_loss lse) p_j - g [j = y])
//
// u: the upstream gradient. The gate g is not on the second term, which holds the logits and
// teaches nothing.
#pragma once

#include <cstdint>

#include "gates.h"
#include "host_device.h"
#include "logit_map.h"

namespace eaft_ext {

struct TokenLoss {
  int k = 0;  // the logits that the entropy is taken over, from 1 to kMaxTopK
  Gate gate;  // for that k
  int64_t ignore_index = 0;
  LogitMap<double> map;
  double z_loss = 0;

  // Whether it is the gated cross-entropy alone, of the logits as they are.
  bool is_plain() const { return map.is_identity() && z_loss == 0; }
};

// The same where a row has only so many logits.
inline TokenLoss for_vocab(TokenLoss loss, int64_t vocab_size) {
  if (vocab_size >= loss.k) return loss;
  loss.k = static_cast<int>(vocab_size);
  loss.gate = for_k(loss.gate, loss.k);
  return loss;
}

// dL/dx'_j = all p_j - target [j = y]
template <typename Real>
struct RowWeights {
  Real all;
  Real target;

  EAFT_HOST_DEVICE bool muted() const { return all == 0 && target == 0; }
};

// weight: upstream times gate.
template <typename Real>
EAFT_HOST_DEVICE inline RowWeights<Real> row_weights(double z_loss, Real upstream, Real weight,
                                                     Real row_max, Real log_sum) {
  // Without a z-loss nothing may come of an lse that is infinite.
  if (z_loss == 0) return {weight, weight};
  return {weight + static_cast<Real>(2 * z_loss) * (row_max + log_sum) * upstream, weight};
}

}  // namespace eaft_ext
