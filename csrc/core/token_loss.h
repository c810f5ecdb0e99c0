// What the loss of a token is, as one thing from an operator's arguments to the loop over rows. The
// Python side is TokenLoss of eaft_ext/_options.py.
#pragma once

#include <cstdint>

#include "gates.h"
#include "host_device.h"

namespace eaft_ext {

struct TokenLoss {
  int k = 0;  // the logits that the entropy is taken over, from 1 to kMaxTopK
  Gate gate;  // for that k
  int64_t ignore_index = 0;
};

// The same where a row has only so many logits.
inline TokenLoss for_vocab(TokenLoss loss, int64_t vocab_size) {
  if (vocab_size >= loss.k) return loss;
  loss.k = static_cast<int>(vocab_size);
  loss.gate = for_k(loss.gate, loss.k);
  return loss;
}

}  // namespace eaft_ext
