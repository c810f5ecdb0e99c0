// The entropy, in nats, of the k largest logits of a row, renormalised among themselves:
//
//     Z = sum_i exp(t_i - t_1)      q_i = exp(t_i - t_1) / Z
//     H = ln Z - sum_i q_i (t_i - t_1)
//
// t_1 is the largest. A term with q_i = 0 is 0, also where t_i = -inf. The 1 that t_1 adds to Z is
// left to the end, where ln Z = log1p(Z - 1): of a confident token the others are all there is.
//
// Of all logits it is the same with Z the softmax sum, and needs no selection: ExactSums go along
// with the online softmax.
#pragma once

#include <cmath>
#include <limits>

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

// What the entropy of all logits takes of some elements, of which the largest's own 1 is left out:
// rest = sum_j exp(x_j - max) - 1. Two of these merge as if their elements had been seen together.
template <typename Real>
struct ExactSums {
  Real max = -std::numeric_limits<Real>::infinity();
  Real rest = -1;
  Real weighted = 0;  // sum_j exp(x_j - max) (x_j - max)

  EAFT_HOST_DEVICE Real entropy() const { return EntropySums<Real>{rest, weighted}.entropy(); }
};

template <typename Real>
EAFT_HOST_DEVICE inline ExactSums<Real> merge(ExactSums<Real> a, ExactSums<Real> b) {
  const ExactSums<Real>& large = a.max < b.max ? b : a;
  const ExactSums<Real>& small = a.max < b.max ? a : b;
  // Nothing but -inf, or nothing at all, adds its rest of -1 to the 1 that it is without.
  const Real shift = small.max == large.max ? Real(0) : small.max - large.max;
  const Real scale = std::exp(shift);
  const Real sum = 1 + small.rest;
  // Where the scale is 0, the maxima may be infinitely far apart.
  if (scale == 0) return large;
  return {large.max, large.rest + sum * scale,
          large.weighted + scale * (small.weighted + shift * sum)};
}

// The entropy of all logits from those of disjoint parts, such as shards of a vocabulary: of which
// part a word is in, and of which word of the part it is. A part's ratio is its probability over
// that of a large one, which is the first, and of which the others are all there is if it is 1.
template <typename Real>
struct EntropyOfParts {
  EntropySums<Real> between;
  Real within = 0;

  EAFT_HOST_DEVICE void add_first(Real entropy) { within += entropy; }
  EAFT_HOST_DEVICE void add(Real ratio, Real entropy) {
    if (ratio == 0) return;
    between.z += ratio;
    between.weighted += ratio * std::log(ratio);
    within += ratio * entropy;
  }
  EAFT_HOST_DEVICE Real get() const { return within / (1 + between.z) + between.entropy(); }
};

}  // namespace eaft_ext
