// dL/dx = weight * (softmax(x) - onehot(y)) from the max and log-sum that the forward saved:
//
//     p_j = exp(x_j - max - log_sum)        dx_j = weight * p_j,   dx_y = weight * (p_y - 1)
//
// Work: a block takes one chunk of one row, a thread 16 bytes at a time, several loads before the
// first use. Blocks need nothing of each other. Bytes: one read and one write of the row; a row of
// weight 0 is written only. `gradient` may be the logits themselves, so neither is __restrict__.
#pragma once

#include <cstdint>

#include "elements.cuh"
#include "launch.h"

namespace eaft_ext::cuda {

template <typename Element>
struct BackwardTraits {
  static constexpr int kThreads = 256;
  static constexpr int kVectorsPerThread = 4;  // loads in flight
  static constexpr int kChunk = kThreads * kVectorsPerThread * kVectorSize<Element>;
};

template <typename Element>
__host__ __device__ int64_t num_chunks_of_row(int64_t vocab_size) {
  constexpr int64_t kChunk = BackwardTraits<Element>::kChunk;
  return (vocab_size + kChunk - 1) / kChunk;
}

// The gradient of one row, as a function of a logit and its place in the chunk.
struct RowGradient {
  float max;
  float log_sum;
  float weight;
  float scale;   // weight / sum
  int at_label;  // the label's place in the chunk, -1 if it lies elsewhere

  __device__ bool muted() const { return weight == 0.0f; }

  __device__ float operator()(float x, int place) const {
    constexpr float kLog2E = 1.44269504f;
    if (muted()) return 0.0f;
    // p - 1 before any rounding, to the logits' type or to p: close to p = 1 it is all there is.
    if (place == at_label) return weight * expm1f((x - max) - log_sum);
    // The maximum is subtracted before the change of base: folded into one FMA, logits near 1e4
    // would lose three digits.
    return scale * exp2f((x - max) * kLog2E);
  }
};

__device__ inline RowGradient row_gradient(const BackwardArguments& arguments, int64_t row,
                                           int64_t begin, int length) {
  const int64_t label = arguments.labels[row];
  const bool in_range = label >= 0 && label < arguments.vocab_size;
  RowGradient gradient;
  gradient.max = arguments.row_max[row];
  gradient.log_sum = arguments.log_sum[row];
  // A label outside the vocabulary spoils its own row, and nothing is read out of bounds.
  gradient.weight = label == arguments.ignore_index ? 0.0f
                    : in_range                      ? arguments.weight[row]
                                                    : nanf("");
  gradient.scale = gradient.weight * expf(-gradient.log_sum);
  gradient.at_label =
      label >= begin && label < begin + length ? static_cast<int>(label - begin) : -1;
  return gradient;
}

template <typename Element>
__global__ void __launch_bounds__(BackwardTraits<Element>::kThreads)
    gated_ce_backward_kernel(BackwardArguments arguments) {
  using Traits = BackwardTraits<Element>;
  constexpr int kSize = kVectorSize<Element>;
  const int64_t num_chunks = num_chunks_of_row<Element>(arguments.vocab_size);
  const int64_t num_items = arguments.num_rows * num_chunks;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t row = item / num_chunks;
    const int64_t begin = item % num_chunks * Traits::kChunk;
    const int64_t rest = arguments.vocab_size - begin;
    const int length = rest < Traits::kChunk ? static_cast<int>(rest) : Traits::kChunk;
    const Element* x =
        static_cast<const Element*>(arguments.logits) + arguments.logits_layout.offset(row) + begin;
    Element* dx =
        static_cast<Element*>(arguments.gradient) + arguments.gradient_layout.offset(row) + begin;
    const RowGradient gradient = row_gradient(arguments, row, begin, length);

    // Vectors need both rows aligned at the same element; else the chunk goes one by one.
    const bool aligned = elements_to_alignment(x) == elements_to_alignment(dx);
    const int head = aligned ? min(elements_to_alignment(dx), length) : length;
    const int num_vectors = (length - head) / kSize;
    const int tail = head + num_vectors * kSize;
    const auto write_one = [&](int i) {
      // A muted row is not read.
      const float value = gradient.muted() ? 0.0f : to_float(x[i]);
      dx[i] = from_float<Element>(gradient(value, i));
    };
    for (int i = threadIdx.x; i < head; i += Traits::kThreads) write_one(i);
    for (int i = tail + threadIdx.x; i < length; i += Traits::kThreads) write_one(i);

    const auto* source = reinterpret_cast<const Vector<Element>*>(x + head);
    auto* target = reinterpret_cast<Vector<Element>*>(dx + head);
    Vector<Element> vectors[Traits::kVectorsPerThread] = {};
    if (!gradient.muted()) {
#pragma unroll
      for (int v = 0; v < Traits::kVectorsPerThread; ++v) {
        const int index = v * Traits::kThreads + threadIdx.x;
        if (index < num_vectors) vectors[v] = source[index];
      }
    }
#pragma unroll
    for (int v = 0; v < Traits::kVectorsPerThread; ++v) {
      const int index = v * Traits::kThreads + threadIdx.x;
      if (index >= num_vectors) continue;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        Element& element = vectors[v].elements[e];
        element = from_float<Element>(gradient(to_float(element), head + index * kSize + e));
      }
      target[index] = vectors[v];
    }
  }
}

}  // namespace eaft_ext::cuda
