// What the forward leaves of one row of logits x with label y.
#pragma once

#include <cmath>

#include "host_device.h"
#include "token_loss.h"

namespace eaft_ext {

template <typename Real>
struct TokenStats {
  Real loss = 0;     // gate * nll, and 0 where the gate is 0; or with_family()
  Real nll = 0;      // -ln p(y) = (m - x_y) + ln S
  Real entropy = 0;  // of the k largest logits, nats
  Real gate = 0;
  Real row_max = 0;  // m = max_j x_j
  Real log_sum = 0;  // ln S = ln sum_j exp(x_j - m); NaN where the nll is: so is the gradient
};

template <typename Real>
EAFT_HOST_DEVICE inline TokenStats<Real> token_stats(const Gate& gate, Real row_max, Real log_sum,
                                                     Real target_logit, Real entropy) {
  TokenStats<Real> token;
  token.row_max = row_max;
  token.nll = (row_max - target_logit) + log_sum;
  token.log_sum = token.nll == token.nll ? log_sum : token.nll;
  // A NaN logit, or the NaN that stands for a label outside the vocabulary, may be in no top k: the
  // whole row is NaN.
  token.entropy = token.nll == token.nll ? entropy : token.nll;
  token.gate = gate_weight(gate, token.nll, token.entropy);
  // A muted token adds nothing, also where its nll is infinite.
  token.loss = token.gate == 0 ? Real(0) : token.gate * token.nll;
  return token;
}

// The same with what the loss has besides; sum_of_logits is for label smoothing.
template <typename Real>
EAFT_HOST_DEVICE inline TokenStats<Real> with_family(TokenStats<Real> token, const TokenLoss& loss,
                                                     Real sum_of_logits) {
  if (loss.label_smoothing != 0 && token.gate != 0) {
    const auto smoothing = static_cast<Real>(loss.label_smoothing);
    const Real mean = sum_of_logits / static_cast<Real>(loss.num_words);
    const Real of_all = (token.row_max - mean) + token.log_sum;
    token.loss = token.gate * ((1 - smoothing) * token.nll + smoothing * of_all);
  }
  const Real lse = token.row_max + token.log_sum;
  if (loss.z_loss != 0) token.loss += static_cast<Real>(loss.z_loss) * lse * lse;
  return token;
}

}  // namespace eaft_ext
