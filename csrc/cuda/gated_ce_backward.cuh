// Cross-entropy backward that recomputes the probabilities: dL/dx = weight * (softmax(x) -
// onehot(y)) from the max and log-sum that the forward saved. The formula and its precision are in
// row_gradient.cuh.
//
// Work: a block takes one span of one row, as long as a tile; a thread takes 16 bytes at a time,
// several loads before the first use. Blocks need nothing of each other. Bytes: one read and one
// write of the row; a muted row is written only. The gradient may be the logits themselves,
// so neither is __restrict__.
#pragma once

#include <cstdint>

#include "../core/shard_partial.h"
#include "arguments.h"
#include "row_gradient.cuh"

namespace eaft_ext::cuda {

template <typename Element>
struct BackwardTraits {
  static constexpr int kThreads = 256;
  static constexpr int kSpanLength = kThreads * kVectorsPerThread * kVectorSize<Element>;

  __host__ __device__ static int64_t num_spans(int64_t vocab_size) {
    return (vocab_size + kSpanLength - 1) / kSpanLength;
  }
};

// A label's place in the span that begins there, or -1 far from any.
__device__ inline int label_in_span(int64_t label, int64_t begin) {
  const int64_t place = label - begin;
  return place >= 0 && place < INT32_MAX ? static_cast<int>(place) : -1;
}

// A block for each span of each row.
template <typename Element, typename Loss>
__global__ void __launch_bounds__(BackwardTraits<Element>::kThreads)
    gated_ce_backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Traits = BackwardTraits<Element>;
  const LogitsArguments& logits = arguments.logits;
  const auto num_spans = static_cast<unsigned>(Traits::num_spans(logits.vocab_size));
  const int64_t row = blockIdx.x / num_spans;
  const auto span_index = static_cast<int>(blockIdx.x % num_spans);
  const int64_t label = arguments.labels[row];
  const float row_weight = arguments.weight[row];  // at once, not after the label
  const Element* x = static_cast<const Element*>(logits.logits) + logits.layout.offset(row);
  Element* target =
      static_cast<Element*>(arguments.gradient) + arguments.gradient_layout.offset(row);
  // All spans but the first begin at an aligned address; the last may then be empty.
  const int64_t shift = elements_to_alignment(target);
  const int64_t begin = span_index == 0 ? 0 : span_index * int64_t{Traits::kSpanLength} + shift;
  const int64_t end =
      min((span_index + 1) * int64_t{Traits::kSpanLength} + shift, logits.vocab_size);
  if (begin >= end) return;
  const Loss loss(arguments.loss);
  const float row_max = arguments.row_max[row];
  const float log_sum = arguments.log_sum[row];
  RowWeights<float> weights = loss.weights(arguments.upstream, row, row_weight, row_max, log_sum);
  if (label == arguments.loss.ignore_index) weights = {0, 0, 0};
  const RowGradient<Loss> gradient(
      loss, row_max, log_sum, weights,
      label_in_span(column_in_shard(label, arguments.vocab_start), begin));
  write_gradient<Traits::kThreads>(RowSpan<Element>(x + begin, static_cast<int>(end - begin)),
                                   target + begin, gradient);
}

}  // namespace eaft_ext::cuda
