// Softmax cross-entropy gradient of a span of a row; the probabilities are recomputed from the max
// and log-sum of the row:
//
//     p_j = exp(x_j - max - log_sum)        dx_j = weight p_j,   dx_y = weight (p_y - 1)
//
// or, with the options of core/token_loss.h, what RowWeights says, times dx'/dx.
// In float until the one rounding to the logits' type.
#pragma once

#include <cstdint>

#include "compiled_loss.h"
#include "reduce.cuh"
#include "row_span.cuh"

namespace eaft_ext::cuda {

template <typename Loss>
struct RowGradient {
  Loss loss;
  float max;
  float log_sum;
  RowWeights<float> weights;
  float scale;  // of all words: their weight / sum
  int label;    // its place in the span, or outside of it

  __device__ RowGradient(const Loss& loss_, float row_max, float row_log_sum,
                         RowWeights<float> row_weights, int label_in_span)
      : loss(loss_),
        max(row_max),
        log_sum(row_log_sum),
        weights(row_weights),
        scale(row_weights.all * expf(-row_log_sum)),
        label(label_in_span) {}

  __device__ bool muted() const { return Loss::kIsPlain ? weights.all == 0.0f : weights.muted(); }

  // Of `size` elements that begin at that place of the span.
  template <typename Element>
  __device__ void apply(Vector<Element>& vector, int begin, int size) const {
    const auto at_label = static_cast<unsigned>(label - begin);
    const bool has_label = at_label < static_cast<unsigned>(size);
    // p - 1 before any rounding, to the logits' type or to p: close to p = 1 it is all there is.
    // Beside the loop, where it would be compiled once for each element.
    float label_gradient = 0;
    if (has_label) {
      const float x = loss.logit(to_float(element_at(vector, static_cast<int>(at_label))));
      const float log_p = (x - max) - log_sum;
      label_gradient = weights.target * expm1f(log_p);
      if (!Loss::kIsPlain) {
        label_gradient += (weights.all - weights.target) * expf(log_p) - weights.uniform;
        label_gradient *= loss.slope(x);
      }
    }
#pragma unroll
    for (int e = 0; e < kVectorSize<Element>; ++e) {
      const float x = loss.logit(to_float(vector.elements[e]));
      float gradient = scale * exp_relative(x, max);
      if (!Loss::kIsPlain) gradient = (gradient - weights.uniform) * loss.slope(x);
      vector.elements[e] = from_float<Element>(gradient);
    }
    if (!has_label) return;
#pragma unroll
    for (unsigned e = 0; e < kVectorSize<Element>; ++e) {
      if (e == at_label) vector.elements[e] = from_float<Element>(label_gradient);
    }
  }
};

template <typename Element>
__device__ inline void store_vector(Element* target, const Vector<Element>& vector, int size) {
  if (size == kVectorSize<Element>) {
    store_once(reinterpret_cast<uint4*>(target), bit_cast<uint4>(vector));
    return;
  }
#pragma unroll
  for (int e = 0; e < kVectorSize<Element>; ++e) {
    if (e < size) target[e] = vector.elements[e];
  }
}

// Every element times a factor.
struct ScaledGradient {
  float factor;

  __device__ bool muted() const { return false; }

  template <typename Element>
  __device__ void apply(Vector<Element>& vector, int, int) const {
#pragma unroll
    for (int e = 0; e < kVectorSize<Element>; ++e) {
      vector.elements[e] = from_float<Element>(factor * to_float(vector.elements[e]));
    }
  }
};

// Writes the gradient of the span to `target`, which may be where the span was read from. A row of
// weights 0 is written without being read. By all threads of the block; needs no barrier.
template <int kThreads, typename Span, typename Gradient>
__device__ inline void write_gradient(const Span& span, typename Span::Element* target,
                                      const Gradient& gradient) {
  using Element = typename Span::Element;
  const RowSpan<Element> to(target, span.length());
  const bool muted = gradient.muted();
  // Whole vectors come and go where both rows are aligned at the same element. Else the target's
  // are gathered one element at a time; then it is no row that is read here.
  const bool same_alignment = to.head() == span.head();
  for (int tile = 0; tile < num_tiles<kThreads>(to); ++tile) {
    Vector<Element> vectors[kVectorsPerThread] = {};
    if (!muted && same_alignment) {
      load_tile<kThreads>(span, tile, Element{}, vectors);
    } else if (!muted) {
#pragma unroll
      for (int v = 0; v < kVectorsPerThread; ++v) {
        const int vector = vector_of_tile<kThreads>(tile, v);
        if (vector >= to.num_vectors()) continue;
#pragma unroll
        for (int e = 0; e < Span::kSize; ++e) {
          if (e < to.size(vector)) vectors[v].elements[e] = span.element(to.begin(vector) + e);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int vector = vector_of_tile<kThreads>(tile, v);
      if (vector >= to.num_vectors()) continue;
      const int begin = to.begin(vector);
      const int size = to.size(vector);
      if (!muted) gradient.apply(vectors[v], begin, size);
      store_vector(target + begin, vectors[v], size);
    }
  }
}

}  // namespace eaft_ext::cuda
