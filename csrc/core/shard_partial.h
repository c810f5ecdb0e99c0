// Vocabulary-parallel cross-entropy: what a shard of the vocabulary tells the others of one row x
// with label y: k + 3 numbers, over the columns of the shard alone,
//
//     y     sum_j exp(x_j - t_1) - 1     x_y     t_1 >= t_2 >= ... >= t_k
//
// and for the entropy of all logits one more, that of the shard's own, where t_1 is enough if no
// other entropy is asked for; with label smoothing one more, sum_j x_j.
//
// t: its k largest logits. NaN stands for what there is not: x_y where y is in another shard, t_i
// where the shard has fewer columns. The largest's own 1 is left out of the sum, which is rounded
// to the type of the partial: of a confident token the others are all there is.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"
#include "max_sum.h"
#include "token_loss.h"

namespace eaft_ext {

// y is there so that shards which were given different labels are noticed.
constexpr int kPartialLabel = 0;
constexpr int kPartialRest = 1;
constexpr int kPartialTarget = 2;
constexpr int kPartialTop = 3;  // and on

// How many of the largest logits are told.
EAFT_HOST_DEVICE inline int partial_top_size(const TokenLoss& loss) {
  return loss.k == 0 ? 1 : loss.k;
}

// The places of the shard's entropy and of its sum, if they are told.
EAFT_HOST_DEVICE inline int partial_entropy(const TokenLoss& loss) {
  return kPartialTop + partial_top_size(loss);
}
EAFT_HOST_DEVICE inline int partial_logits(const TokenLoss& loss) {
  return partial_entropy(loss) + (loss.sums_entropy() ? 1 : 0);
}

EAFT_HOST_DEVICE inline int partial_size(const TokenLoss& loss) {
  return partial_logits(loss) + (loss.label_smoothing != 0 ? 1 : 0);
}

// The column of a label in a shard; none of its columns where the label is in another one.
EAFT_HOST_DEVICE inline int64_t column_in_shard(int64_t label, int64_t vocab_start) {
  return label >= vocab_start ? label - vocab_start : -1;
}

// All but the k largest.
template <typename Real>
EAFT_HOST_DEVICE inline void write_partial_head(Real* partial, int64_t label, double sum,
                                                Real target_logit) {
  partial[kPartialLabel] = static_cast<Real>(label);
  partial[kPartialRest] = static_cast<Real>(sum - 1);
  partial[kPartialTarget] = target_logit;
}

// The softmax denominator of the shard.
template <typename Real>
EAFT_HOST_DEVICE inline MaxSum<double> max_sum_of_partial(const Real* partial) {
  const Real largest = partial[kPartialTop];
  const double max = largest == largest ? largest : -std::numeric_limits<double>::infinity();
  return {max, 1 + static_cast<double>(partial[kPartialRest])};
}

// Several shards tell of one row: the label's logit is that of the one that has it, and NaN where
// none has, or more than one, or where their labels differ.
template <typename Real>
struct TargetOfShards {
  Real label;  // y, as this process has it
  Real target = std::numeric_limits<Real>::quiet_NaN();
  int count = 0;
  bool differs = false;

  EAFT_HOST_DEVICE void add(const Real* partial) {
    differs |= partial[kPartialLabel] != label;
    if (partial[kPartialTarget] != partial[kPartialTarget]) return;
    target = partial[kPartialTarget];
    ++count;
  }
  EAFT_HOST_DEVICE Real get() const {
    return count == 1 && !differs ? target : std::numeric_limits<Real>::quiet_NaN();
  }
};

}  // namespace eaft_ext
