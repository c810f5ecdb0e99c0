// What a model makes of its logits before the loss: a scale, as Cohere and Granite have it, and a
// soft cap, as Gemma 2 has it,
//
//     x' = scale x      or, with a cap,      x' = cap tanh(scale x / cap)
//
// Both rise with x, so the k largest x' are those of the k largest x.
#pragma once

#include <cmath>

#include "host_device.h"

namespace eaft_ext {

template <typename Real>
struct LogitMap {
  Real scale = 1;
  Real cap = 0;  // 0: none

  EAFT_HOST_DEVICE bool is_identity() const { return scale == 1 && cap == 0; }
  EAFT_HOST_DEVICE Real operator()(Real x) const {
    return cap == 0 ? scale * x : cap * std::tanh(scale * x / cap);
  }
  // dx'/dx, from x'.
  EAFT_HOST_DEVICE Real slope(Real mapped) const {
    if (cap == 0) return scale;
    const Real t = mapped / cap;
    return scale * ((1 - t) * (1 + t));
  }
};

}  // namespace eaft_ext
