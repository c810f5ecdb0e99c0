// What the loss of a token is, as one thing from an operator's arguments to the loop over rows. The
// Python side is TokenLoss of eaft_ext/_options.py. Of a row x with label y:
//
//     x' = map(x)     nll = lse - x'_y     lse = ln sum_j exp(x'_j)
//     ce = (1 - smoothing) nll + smoothing (lse - mean_j x'_j)
//     loss = g ce + z_loss lse^2
//     dL/dx'_j = u ((g + 2 z_loss lse) p_j - g (1 - smoothing) [j = y] - g smoothing / V)
//
// u: the upstream gradient. The gate g is of the nll, and not on the last term of the loss, which
// holds the logits and teaches nothing.
#pragma once

#include <cstdint>

#include "gates.h"
#include "host_device.h"
#include "logit_map.h"

namespace eaft_ext {

struct TokenLoss {
  int k = 0;  // the largest logits that H is taken over, from 1 to kMaxTopK, or 0: all
  Gate gate;  // for that k
  int64_t ignore_index = 0;
  LogitMap<double> map;
  double label_smoothing = 0;
  double z_loss = 0;
  int64_t num_words = 0;       // V, for label smoothing and the entropy of all: of all shards
  bool tells_entropy = false;  // of all logits, beside the one that the gate is of

  // Whether it is the gated cross-entropy alone, of the logits as they are.
  bool is_plain() const { return map.is_identity() && label_smoothing == 0 && z_loss == 0; }
  // Whether the entropy of all logits is asked for.
  EAFT_HOST_DEVICE bool sums_entropy() const { return k == 0 || tells_entropy; }
};

// The same for a vocabulary of so many words.
inline TokenLoss for_words(TokenLoss loss, int64_t num_words) {
  loss.num_words = num_words;
  if (loss.k == 0) loss.gate = for_k(loss.gate, num_words);
  return loss;
}

// And for rows of them all, which k may exceed.
inline TokenLoss for_vocab(TokenLoss loss, int64_t vocab_size) {
  loss = for_words(loss, vocab_size);
  if (vocab_size >= loss.k) return loss;
  loss.k = static_cast<int>(vocab_size);
  loss.gate = for_k(loss.gate, loss.k);
  return loss;
}

// dL/dx'_j = all p_j - target [j = y] - uniform
template <typename Real>
struct RowWeights {
  Real all;
  Real target;
  Real uniform;

  EAFT_HOST_DEVICE bool muted() const { return all == 0 && target == 0 && uniform == 0; }
};

// weight: upstream times gate.
template <typename Real>
EAFT_HOST_DEVICE inline RowWeights<Real> row_weights(const TokenLoss& loss, Real upstream,
                                                     Real weight, Real row_max, Real log_sum) {
  RowWeights<Real> weights{weight, weight, 0};
  if (loss.label_smoothing != 0) {
    weights.target = weight * static_cast<Real>(1 - loss.label_smoothing);
    weights.uniform = weight * static_cast<Real>(loss.label_smoothing / loss.num_words);
  }
  // Without a z-loss nothing may come of an lse that is infinite.
  if (loss.z_loss != 0) {
    weights.all += static_cast<Real>(2 * loss.z_loss) * (row_max + log_sum) * upstream;
  }
  return weights;
}

}  // namespace eaft_ext
