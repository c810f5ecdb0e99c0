// Elementwise product in a grid-stride loop: gradient *= factor, unless the factor is 1: then the
// blocks end at once, and no host had to wait for the number.
//
// Work: as many persistent blocks as are resident take spans of rows in turn. Bytes: one read and
// one write, or none.
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
  const int64_t num_spans = Traits::num_spans(arguments.vocab_size);
  for (int64_t item = blockIdx.x; item < arguments.num_rows * num_spans; item += gridDim.x) {
    const int64_t begin = item % num_spans * Traits::kSpanLength;
    const int64_t rest = arguments.vocab_size - begin;
    Element* x = static_cast<Element*>(arguments.gradient) +
                 arguments.layout.offset(item / num_spans) + begin;
    const RowSpan<Element> span(
        x, static_cast<int>(rest < Traits::kSpanLength ? rest : Traits::kSpanLength));
    write_gradient<Traits::kThreads>(span, x, scaled);
  }
}

}  // namespace eaft_ext::cuda
