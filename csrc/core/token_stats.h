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
  Real entropy = 0;  // that the gate is of, nats
  Real gate = 0;
  Real row_max = 0;  // m = max_j x_j
  Real log_sum = 0;  // ln S = ln sum_j exp(x_j - m); NaN where the nll is: so is the gradient
  Real is_top = 0;   // 1 if no logit is larger than the label's
  Real entropy_of_all = 0;  // if asked for
};

// What an operator tells beside, as many of them as it is asked for: lse, is_top, entropy_of_all.
constexpr int kMaxExtra = 3;

template <typename Real>
EAFT_HOST_DEVICE inline Real extra_stat(const TokenStats<Real>& token, int i) {
  return i == 0 ? token.row_max + token.log_sum : i == 1 ? token.is_top : token.entropy_of_all;
}

// The entropies of a row: that of the gate, and that of all logits, if asked for, which may be one.
template <typename Real>
struct Entropies {
  Real of_gate;
  Real of_all = 0;
};

template <typename Real>
EAFT_HOST_DEVICE inline TokenStats<Real> token_stats(const Gate& gate, Real row_max, Real log_sum,
                                                     Real target_logit, Entropies<Real> entropy) {
  TokenStats<Real> token;
  token.row_max = row_max;
  token.nll = (row_max - target_logit) + log_sum;
  token.log_sum = token.nll == token.nll ? log_sum : token.nll;
  // A NaN logit, or the NaN that stands for a label outside the vocabulary, may be in no top k: the
  // whole row is NaN.
  token.entropy = token.nll == token.nll ? entropy.of_gate : token.nll;
  token.entropy_of_all = token.nll == token.nll ? entropy.of_all : token.nll;
  token.is_top = token.nll == token.nll && target_logit == row_max ? Real(1) : Real(0);
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
