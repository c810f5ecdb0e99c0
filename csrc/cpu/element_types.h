// The 16-bit element types as plain bits, and the type that each element type is computed in.
#pragma once

#include <cstdint>

namespace eaft_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename Element>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};

template <typename Element>
using Compute = typename ComputeType<Element>::Type;

}  // namespace eaft_ext::cpu
