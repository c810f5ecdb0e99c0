// The loss as kernels are compiled for it. PlainLoss is the gated cross-entropy of the logits as
// they are, and its code has nothing of the options; ExactLoss is the same with the entropy of all
// logits in the gate, and without a selection; FamilyLoss has all of core/token_loss.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/host_device.h"
#include "../core/soft_cap.h"
#include "../core/token_loss.h"

namespace eaft_ext::cuda {

struct PlainLoss {
  static constexpr bool kIsPlain = true;       // of the logits as they are
  static constexpr bool kSumsEntropy = false;  // of all logits

  EAFT_HOST_DEVICE explicit PlainLoss(const TokenLoss&) {}
  EAFT_HOST_DEVICE float logit(float x) const { return x; }
  EAFT_HOST_DEVICE float slope(float) const { return 1; }
  EAFT_HOST_DEVICE RowWeights<float> weights(const float*, int64_t, float weight, float,
                                             float) const {
    return {weight, weight, 0};
  }
  // Whether the k largest logits are selected, and whether the entropy of all is summed.
  EAFT_HOST_DEVICE static constexpr bool selects(int) { return true; }
  EAFT_HOST_DEVICE static constexpr bool sums_entropy() { return false; }
};

struct ExactLoss : PlainLoss {
  using PlainLoss::PlainLoss;
  static constexpr bool kSumsEntropy = true;
  EAFT_HOST_DEVICE static constexpr bool selects(int) { return false; }
  EAFT_HOST_DEVICE static constexpr bool sums_entropy() { return true; }
};

// Of a number that is at most 0.
EAFT_HOST_DEVICE inline float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);  // without the branch for results that are not normal
#else
  return std::exp(x);
#endif
}

struct FamilyLoss {
  static constexpr bool kIsPlain = false;
  static constexpr bool kSumsEntropy = true;
  float scale;
  float cap;  // 0: none
  // Divided once, and not for each element.
  float scale_over_cap;
  float inverse_cap;
  const TokenLoss& loss;

  EAFT_HOST_DEVICE explicit FamilyLoss(const TokenLoss& of_kernel)
      : scale(static_cast<float>(of_kernel.map.scale)),
        cap(static_cast<float>(of_kernel.map.cap)),
        scale_over_cap(static_cast<float>(of_kernel.map.scale / of_kernel.map.cap)),
        inverse_cap(static_cast<float>(1 / of_kernel.map.cap)),
        loss(of_kernel) {}
  EAFT_HOST_DEVICE float logit(float x) const {
    const float scaled = multiply_add(scale, x, 0);
    if (cap == 0) return scaled;
    const float z = scale_over_cap * x;
    const float near = soft_cap_near(scaled, z);
    const float far = soft_cap_far(z, cap, exp_of(-2.0f * std::fabs(z)));
    return std::fabs(z) < kNearZero ? near : far;
  }
  // dx'/dx, from x'.
  EAFT_HOST_DEVICE float slope(float mapped) const {
    if (cap == 0) return scale;
    const float t = mapped * inverse_cap;
    return scale * ((1 - t) * (1 + t));
  }
  // upstream: [num_rows], read if there is a z-loss.
  EAFT_HOST_DEVICE RowWeights<float> weights(const float* upstream, int64_t row, float weight,
                                             float row_max, float log_sum) const {
    return row_weights(loss, loss.z_loss == 0 ? 0.0f : upstream[row], weight, row_max, log_sum);
  }
  EAFT_HOST_DEVICE static bool selects(int k) { return k > 0; }
  EAFT_HOST_DEVICE bool sums_entropy() const { return loss.sums_entropy(); }
};

enum class CompiledLoss { kPlain, kExact, kFamily };

// Which of them a forward takes.
inline CompiledLoss compiled_loss(const TokenLoss& loss) {
  if (!loss.is_plain() || (loss.tells_entropy && loss.k > 0)) return CompiledLoss::kFamily;
  return loss.k == 0 ? CompiledLoss::kExact : CompiledLoss::kPlain;
}

}  // namespace eaft_ext::cuda
