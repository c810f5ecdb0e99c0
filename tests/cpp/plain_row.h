// One row by the definitions, in double, element after element: what the kernels are held to. The
// formulas are those of eaft_ext/reference.py, and share nothing with csrc/.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/token_loss.h"

namespace eaft_ext {

struct PlainRow {
  std::vector<double> logits;  // as the loss sees them
  double max;
  double sum;  // sum_j exp(x_j - max)
  double sum_of_logits;
  bool is_finite;  // a softmax can be taken: no NaN, no +inf, and not -inf alone

  // round: of the mapped logits, to the type that they are computed in.
  template <typename Round>
  PlainRow(const std::vector<double>& elements, const LogitMap<double>& map, const Round& round)
      : logits(elements), sum(0), sum_of_logits(0) {
    for (double& x : logits) {
      x = round(map.scale * x);
      if (map.cap != 0) x = map.cap * std::tanh(x / map.cap);
    }
    max = -std::numeric_limits<double>::infinity();
    bool any_nan = false;
    for (const double x : logits) {
      any_nan = any_nan || std::isnan(x);
      max = std::max(max, x);
      sum_of_logits += x;
    }
    is_finite = !any_nan && std::isfinite(max);
    long double total = 0;  // of thousands of terms, without what they round to
    for (const double x : logits) total += std::exp(x - max);
    sum = static_cast<double>(total);
  }

  double probability(size_t column) const { return std::exp(logits[column] - max) / sum; }

  double nll(size_t label) const { return max - logits[label] + std::log(sum); }

  // Of the k largest, of which there are as many, renormalised; of all for k = 0.
  double entropy(int k) const {
    std::vector<double> top = logits;
    if (k > 0) {
      std::partial_sort(top.begin(), top.begin() + k, top.end(), std::greater<double>());
      top.resize(k);
    }
    long double z = 0;
    for (const double x : top) z += std::exp(x - max);
    long double entropy = 0;
    for (const double x : top) {
      const long double q = std::exp(x - max) / z;
      if (q > 0) entropy -= q * ((x - max) - std::log(z));
    }
    return static_cast<double>(entropy);
  }
};

inline double plain_gate(const Gate& gate, double nll, double entropy) {
  const double normalized = entropy == 0 ? 0 : entropy / gate.normalizer;
  const double p = std::exp(-nll);
  switch (gate.kind) {
    case GateKind::kNone:
      return 1;
    case GateKind::kEntropy:
      return std::pow(normalized, gate.first);
    case GateKind::kSigmoid:
      return 1 / (1 + std::exp(-gate.second * (normalized - gate.first)));
    case GateKind::kHard:
      return normalized > gate.first;
    case GateKind::kConflict:
      return !(normalized < gate.first && p < gate.second);
    case GateKind::kProbability:
      return p;
    case GateKind::kPower:
      return gate.first == 0 ? 1 : std::exp(-gate.first * nll);
    case GateKind::kThreshold:
      return p > gate.first;
    case GateKind::kFocal:
      return std::pow(-std::expm1(-nll), gate.first);
  }
  return -1;
}

// g ((1 - smoothing) nll + smoothing (lse - mean x)) + z_loss lse^2
inline double plain_loss(const TokenLoss& loss, double gate, double nll, double lse, double mean) {
  const double smoothing = loss.label_smoothing;
  const double smooth = smoothing == 0 ? 0 : smoothing * (lse - mean);
  // As PyTorch has it, also where it is 0 * infinity.
  const double gated = gate == 0 ? 0 : gate * ((1 - smoothing) * nll + smooth);
  return gated + (loss.z_loss == 0 ? 0 : loss.z_loss * lse * lse);
}

}  // namespace eaft_ext
