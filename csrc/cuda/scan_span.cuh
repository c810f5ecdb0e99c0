// Online softmax and streaming top-k selection in one read of a span of a row:
//
//     max = max_j x_j       sum = sum_j exp(x_j - max)       the k largest x_j
//
// where the sum, and its maximum, are of what the loss makes of the logits, and the selection,
// since that rises with them, of the logits themselves. For the entropy of all logits, which takes
// sum_j exp(x_j - max) (x_j - max) besides, nothing need be selected.
//
// Work: a thread takes kVectorsPerThread vectors of 16 bytes at a time and keeps a maximum and a
// sum of its own, rescaled when the maximum rises. After the first tile the threads' maxima give
// the threshold of candidate_list.cuh; from then on an element is compared with it, and the few
// above it go to the list. After 2, 4, 8, ... tiles, as many as there were before, the threshold is
// raised if that pays. Between these barriers the warps drift apart, and the memory is never idle.
// At last the sums are merged, by shuffles within each warp and then by the first warp. A row in
// rising order overflows the list all the same: then the finished maxima give a threshold, and the
// span is read once more (select_span.cuh).
#pragma once

#include <cstdint>

#include "candidate_list.cuh"
#include "compiled_loss.h"
#include "row_span.cuh"
#include "select_span.cuh"

namespace eaft_ext::cuda {

template <int kThreads, typename Loss>
struct ScanStorage {
  CandidateList<uint32_t> list;
  uint32_t scratch[kMaxTopK];
  SumOf<Loss> warp_sums[kThreads / kWarpSize];
};

// A thread's online softmax. A tile's sum joins the others by compensated summation, the rounding
// error kept apart, so that thousands of small terms are not lost beside the maximum's 1. For the
// entropy of all logits they are summed once more without it: of a confident token the others are
// all there is.
struct ThreadSum {
  float max = -INFINITY;  // of the logits themselves
  float sum = 0;
  float error = 0;
  // If the loss sums the entropy: how many equal the maximum, the terms of those below it, and the
  // sum of the terms times their exponents.
  float ones = 0;
  float below = 0;
  float weighted = 0;
  double logits = 0;  // their sum, if the loss smooths labels

  // The elements of a tile, of which tile_max is the largest. size_of(v): how many of vector v are
  // no fillers, which a soft cap would make a number of.
  template <typename Element, typename Loss, typename SizeOf>
  __device__ void add(const Vector<Element> (&vectors)[kVectorsPerThread], float tile_max,
                      const Loss& loss, const SizeOf& size_of) {
    if (loss.sums_entropy()) {
      add_tile<true>(vectors, tile_max, loss, size_of);
    } else {
      add_tile<false>(vectors, tile_max, loss, size_of);
    }
  }

  template <bool kSumsEntropy, typename Element, typename Loss, typename SizeOf>
  __device__ void add_tile(const Vector<Element> (&vectors)[kVectorsPerThread], float tile_max,
                           const Loss& loss, const SizeOf& size_of) {
    const float old_reference = reference_of(loss.logit(max));
    max = fmaxf(max, tile_max);
    const float reference = reference_of(loss.logit(max));
    float tile = 0;
    float tile_ones = 0;
    float tile_below = 0;
    float tile_weighted = 0;
    float tile_logits = 0;
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      float vector_sum = 0;
      const int size = Loss::kIsPlain ? kVectorSize<Element> : size_of(v);
#pragma unroll
      for (int e = 0; e < kVectorSize<Element>; ++e) {
        if (!Loss::kIsPlain && e >= size) continue;
        const float x = loss.logit(to_float(vectors[v].elements[e]));
        const float term = exp_relative(x, reference);
        vector_sum += term;
        if (kSumsEntropy) {
          const bool is_largest = x == reference;
          if (!is_largest) tile_below += term;
          if (is_largest) tile_ones += 1.0f;
          // -inf as the lowest number, by which its term, 0, may be multiplied.
          tile_weighted += term * fmaxf(x - reference, kLowest);
        }
        if (!Loss::kIsPlain) tile_logits += x;
      }
      tile += vector_sum;
    }
    const float scale = exp_relative(old_reference, reference);
    if (kSumsEntropy) {
      const bool rises = reference != old_reference;
      const float before = rises ? below + ones : below;
      const float moved = weighted + (old_reference - reference) * before;
      ones = (rises ? 0.0f : ones) + tile_ones;
      below = before * scale + tile_below;
      // Where the scale is 0, the references may be infinitely far apart.
      weighted = (scale == 0 ? 0.0f : scale * moved) + tile_weighted;
    }
    const float scaled = sum * scale;
    const float total = scaled + tile;
    const float of_tile = total - scaled;
    error = error * scale + ((scaled - (total - of_tile)) + (tile - of_tile));
    sum = total;
    if (!Loss::kIsPlain) logits += static_cast<double>(tile_logits);
  }

  template <typename Loss>
  __device__ SumOf<Loss> get(const Loss& loss) const {
    SumOf<Loss> result{};
    result.max = loss.logit(max);
    result.sum = static_cast<double>(sum) + static_cast<double>(error);
    if constexpr (Loss::kSumsEntropy) {
      result.rest = static_cast<double>(ones - 1) + static_cast<double>(below);
      result.weighted = weighted;
    }
    if constexpr (!Loss::kIsPlain) result.logits = logits;
    return result;
  }
};

// By all threads of the block, between two barriers. The first warp gets the maximum and the sum,
// and finds what the k largest can be in the list, if they are selected. k may exceed the span's
// length: fillers are -inf.
template <int kThreads, typename Span, typename Loss>
__device__ inline SumOf<Loss> scan_span(const Span& span, int k, const Loss& loss,
                                        ScanStorage<kThreads, Loss>& storage) {
  using Element = typename Span::Element;
  using Keys = ValueKeys<Element>;
  const int many = max(2 * k, kWarpSize);  // candidates, which make raising the threshold worth it
  const uint32_t lowest = key_of<Element>(-INFINITY);
  CandidateList<uint32_t>& list = storage.list;
  const bool selects = Loss::selects(k);

  ThreadSum sum;
  float threshold = INFINITY;
  bool crowded = false;  // this thread met a list of many
  // At least one, which may be empty.
  for (int tile = 0; tile == 0 || tile < num_tiles<kThreads>(span); ++tile) {
    Vector<Element> vectors[kVectorsPerThread];
    load_tile<kThreads>(span, tile, Keys::filler(), vectors);
    float tile_max = -INFINITY;
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) tile_max = fmaxf(tile_max, largest_of(vectors[v]));
    sum.add(vectors, tile_max, loss, [&](int v) {
      const int vector = vector_of_tile<kThreads>(tile, v);
      return vector < span.num_vectors() ? span.size(vector) : 0;
    });
    if (selects && tile == 0) {
      const uint32_t own = key_of<Element>(sum.max);
      threshold = value_of<Element>(threshold_of_threads<kThreads>(own, lowest, k, list));
    }
    if (selects && tile_max > threshold) {
#pragma unroll
      for (int v = 0; v < kVectorsPerThread; ++v) {
        recompute_from(vectors[v]);
        if (!(largest_of(vectors[v]) > threshold)) continue;
        unsigned above = 0;
#pragma unroll
        for (int e = 0; e < Span::kSize; ++e) {
          above |= (to_float(vectors[v].elements[e]) > threshold) << e;
        }
        for (; above != 0; above &= above - 1) {
          const Element x = element_at(vectors[v], __ffs(static_cast<int>(above)) - 1);
          crowded |= list.push(key_of<Element>(to_float(x))) >= many;
        }
      }
    }
    // After 2, 4, 8, ... tiles: what is above the threshold gets ever rarer.
    const bool ask = selects && tile > 0 && (tile & (tile + 1)) == 0;
    if (ask && __syncthreads_or(crowded)) {
      threshold = value_of<Element>(shrink(list, k, storage.scratch));
      crowded = false;
    }
  }

  if (selects) __syncthreads();  // all have pushed
  if (selects && list.overflew) {
    threshold_of_threads<kThreads>(key_of<Element>(sum.max), lowest, k, list);
    offer_span<Keys, kThreads>(span, 0, k, list, storage.scratch);
  }
  const SumOf<Loss> own = sum.get(loss);
  const SumOf<Loss> of_warp = warp_merge(kWarpSize, [&](int) { return own; });
  if (lane_index() == 0) storage.warp_sums[warp_index()] = of_warp;
  __syncthreads();  // sums and candidates of all warps are there
  if (warp_index() != 0) return of_warp;
  return warp_merge(kThreads / kWarpSize, [&](int i) { return storage.warp_sums[i]; });
}

}  // namespace eaft_ext::cuda
