// The gates by the names and parameters that they have in the operators' schemas. The Python side
// is eaft_ext/gates.py.
#pragma once

#include <string_view>
#include <vector>

#include "core/gates.h"
#include "sentence.h"

namespace eaft_ext {

// For any k: for_k() makes it one for a k of its own.
inline Gate gate_from_name(std::string_view name, const std::vector<double>& parameters) {
  const auto expect = [&](size_t least, size_t most) {
    if (parameters.size() < least || parameters.size() > most) {
      fail("gate ", name, " takes from ", least, " to ", most, " parameters, got ",
           parameters.size());
    }
  };
  Gate gate;
  gate.normalizer_is_log_k = true;
  if (name == "none") {
    expect(0, 0);
    gate.kind = GateKind::kNone;
  } else if (name == "entropy") {  // alpha, or alpha and normalizer
    expect(1, 2);
    gate.kind = GateKind::kEntropy;
    gate.first = parameters[0];
    if (parameters.size() == 2) {
      gate.normalizer = parameters[1];
      gate.normalizer_is_log_k = false;
    }
  } else if (name == "sigmoid") {  // beta, slope
    expect(2, 2);
    gate.kind = GateKind::kSigmoid;
    gate.first = parameters[0];
    gate.second = parameters[1];
  } else if (name == "hard") {  // threshold
    expect(1, 1);
    gate.kind = GateKind::kHard;
    gate.first = parameters[0];
  } else if (name == "conflict") {  // entropy, probability
    expect(2, 2);
    gate.kind = GateKind::kConflict;
    gate.first = parameters[0];
    gate.second = parameters[1];
  } else if (name == "probability") {
    expect(0, 0);
    gate.kind = GateKind::kProbability;
  } else if (name == "power") {  // q
    expect(1, 1);
    gate.kind = GateKind::kPower;
    gate.first = parameters[0];
  } else if (name == "threshold") {  // threshold
    expect(1, 1);
    gate.kind = GateKind::kThreshold;
    gate.first = parameters[0];
  } else if (name == "focal") {  // gamma
    expect(1, 1);
    gate.kind = GateKind::kFocal;
    gate.first = parameters[0];
  } else {
    fail(
        "gate must be none, entropy, sigmoid, hard, conflict, probability, power, threshold or "
        "focal, got ",
        name);
  }
  return gate;
}

}  // namespace eaft_ext
