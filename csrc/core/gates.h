// The built-in gates: the weight of a token's cross-entropy as a function of its nll = -ln p(y) and
// of its top-k entropy H, both in nats. The only home of these formulas in C++.
//
//     none         1
//     entropy      (H / normalizer)^alpha                      first = alpha
//     sigmoid      1 / (1 + exp(-slope (H / ln k - beta)))     first = beta, second = slope
//     hard         1 if H / ln k > threshold else 0            first = threshold
//     conflict     0 if H / ln k < entropy and p(y) < probability else 1
//                                     first = entropy, second = probability
//     probability  p(y)
//     power        p(y)^q                                      first = q
//     threshold    1 if p(y) > threshold else 0                first = threshold
//     focal        (1 - p(y))^gamma                            first = gamma
//
// H / normalizer is 0 where H is 0, also for k = 1, where ln k is 0 too. NaN stays NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace eaft_ext {

enum class GateKind : int {
  kNone,
  kEntropy,
  kSigmoid,
  kHard,
  kConflict,
  kProbability,
  kPower,
  kThreshold,
  kFocal
};

struct Gate {
  GateKind kind = GateKind::kNone;
  double first = 0;
  double second = 0;
  double normalizer = 1;
  bool normalizer_is_log_k = false;
};

// The same gate for an entropy over k logits.
EAFT_HOST_DEVICE inline Gate for_k(Gate gate, int64_t k) {
  if (gate.normalizer_is_log_k) gate.normalizer = std::log(static_cast<double>(k));
  return gate;
}

template <typename Real>
EAFT_HOST_DEVICE inline Real gate_weight(const Gate& gate, Real nll, Real entropy) {
  const Real first = static_cast<Real>(gate.first);
  const Real second = static_cast<Real>(gate.second);
  const Real normalized = entropy == 0 ? Real(0) : entropy / static_cast<Real>(gate.normalizer);
  switch (gate.kind) {
    case GateKind::kNone:
      return 1;
    case GateKind::kEntropy:
      return first == 1 ? normalized : std::pow(normalized, first);
    case GateKind::kSigmoid:
      return 1 / (1 + std::exp(-second * (normalized - first)));
    case GateKind::kHard:
      if (normalized != normalized) return normalized;
      return normalized > first ? Real(1) : Real(0);
    case GateKind::kConflict:
      if (normalized != normalized) return normalized;
      return normalized < first && std::exp(-nll) < second ? Real(0) : Real(1);
    case GateKind::kProbability:
      return std::exp(-nll);
    case GateKind::kPower:
      // Of the nll, since p(y) is 0 where p(y)^q may not be; and 1 for q = 0, also where p(y) is 0.
      return first == 0 ? Real(1) : std::exp(-first * nll);
    case GateKind::kThreshold:
      if (nll != nll) return nll;
      return std::exp(-nll) > first ? Real(1) : Real(0);
    case GateKind::kFocal:
      // -expm1(-nll) is 1 - p(y) without the cancellation near p(y) = 1.
      return std::pow(-std::expm1(-nll), first);
  }
  return 0;
}

}  // namespace eaft_ext
