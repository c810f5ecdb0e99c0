// gradient *= factor, unless the factor is 1: then the blocks end at once, and no host had to wait
// for the number.
//
// Work: as many blocks as are resident take parts of rows in turn. Bytes: one read and one write,
// or none.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "gated_ce_backward.cuh"

namespace eaft_ext::cuda {

template <typename Element>
__global__ void __launch_bounds__(BackwardTraits<Element>::kThreads)
    scale_gradient_kernel(const __grid_constant__ ScaleGradientArguments arguments) {
  using Traits = BackwardTraits<Element>;
  const ScaledGradient scaled{*arguments.factor};
  if (scaled.factor == 1.0f) return;
  const int64_t num_parts = Traits::num_parts(arguments.vocab_size);
  for (int64_t item = blockIdx.x; item < arguments.num_rows * num_parts; item += gridDim.x) {
    const int64_t begin = item % num_parts * Traits::kPart;
    const int64_t rest = arguments.vocab_size - begin;
    Element* x = static_cast<Element*>(arguments.gradient) +
                 arguments.layout.offset(item / num_parts) + begin;
    const RowPart<Element> part(x, static_cast<int>(rest < Traits::kPart ? rest : Traits::kPart));
    write_gradient<Traits::kThreads>(part, x, scaled);
  }
}

}  // namespace eaft_ext::cuda
