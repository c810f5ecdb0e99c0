// Streaming top-k selection of a span of a row by a block that does nothing else: for top-k, for
// combining what blocks selected each, and for rows whose order defeats scan_span.cuh. One read,
// and one more of the first tile; a barrier after each tile, where what found no room in the list
// of candidates is offered again.
#pragma once

#include <cstdint>

#include "candidate_list.cuh"
#include "row_span.cuh"

namespace eaft_ext::cuda {

// Keys of values alone: equal ones need no order.
template <typename Element>
struct ValueKeys {
  using Key = uint32_t;
  __device__ static Key key(Element x, int) { return key_of<Element>(to_float(x)); }
  __device__ static bool may_exceed(Element x, Key threshold) {
    return !(to_float(x) < value_of<Element>(threshold));
  }
  __device__ static Element filler() { return from_float<Element>(-INFINITY); }
};

// Keys of values and places: among equals the lowest index is the largest key.
template <typename Element>
struct PairKeys {
  using Key = uint64_t;
  __device__ static Key key(Element x, int index) {
    const float value = to_float(x) + 0.0f;  // -0 equals 0
    return static_cast<Key>(key_of<Element>(value)) << 32 | ~static_cast<uint32_t>(index);
  }
  __device__ static int index_of(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
  // At most the largest key: as if no element had a higher index.
  __device__ static Key reached_by(const Vector<Element>& x) {
    return static_cast<Key>(key_of<Element>(largest_of(x))) << 32;
  }
  __device__ static bool may_exceed(Element x, Key threshold) {
    return !(to_float(x) < value_of<Element>(static_cast<uint32_t>(threshold >> 32)));
  }
  __device__ static Element filler() { return from_float<Element>(-INFINITY); }
};

// Keys that are there already.
template <typename Key_>
struct ReadyKeys {
  using Key = Key_;
  __device__ static Key key(Key key, int) { return key; }
  __device__ static Key reached_by(const Vector<Key>& x) {
    Key largest = 0;
#pragma unroll
    for (int e = 0; e < kVectorSize<Key>; ++e) largest = max(largest, x.elements[e]);
    return largest;
  }
  __device__ static bool may_exceed(Key key, Key threshold) { return key > threshold; }
  __device__ static Key filler() { return 0; }
};

// The keys of one vector, 0 where it has no element; `first_index` is the place of the span's first
// element in its row.
template <typename Keys, typename Span>
__device__ inline typename Keys::Key key_of_vector(const Span& span, int vector, int e,
                                                   typename Span::Element x, int first_index) {
  const bool exists = vector < span.num_vectors() && e < span.size(vector);
  return exists ? Keys::key(x, first_index + span.begin(vector) + e) : 0;
}

// Offers every element of the span to the list, which is empty and has a threshold. Ends with a
// barrier.
template <typename Keys, int kThreads, typename Span>
__device__ inline void offer_span(const Span& span, int first_index, int k,
                                  CandidateList<typename Keys::Key>& list,
                                  typename Keys::Key* scratch) {
  using Key = typename Keys::Key;
  constexpr int kSize = Span::kSize;
  static_assert(kVectorsPerThread * kSize <= 32, "a bit for each element of a tile");
  Key threshold = list.threshold;
  for (int tile = 0; tile < num_tiles<kThreads>(span); ++tile) {
    Vector<typename Span::Element> vectors[kVectorsPerThread];
    load_tile<kThreads>(span, tile, Keys::filler(), vectors);
    uint32_t pending = 0;  // bit v * kSize + e: that element is to be offered
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const bool may_exceed = Keys::may_exceed(vectors[v].elements[e], threshold);
        pending |= static_cast<uint32_t>(may_exceed) << (v * kSize + e);
      }
    }
    bool full;
    do {
#pragma unroll
      for (int v = 0; v < kVectorsPerThread; ++v) {
        const int vector = vector_of_tile<kThreads>(tile, v);
        uint32_t offered = pending >> (v * kSize) & (~0u >> (32 - kSize));
        for (; offered != 0; offered &= offered - 1) {
          const int e = __ffs(static_cast<int>(offered)) - 1;
          const Key key =
              key_of_vector<Keys>(span, vector, e, element_at(vectors[v], e), first_index);
          const bool kept_out = key > threshold && list.push(key) >= list.kCapacity;
          if (!kept_out) pending &= ~(1u << (v * kSize + e));
        }
      }
      full = __syncthreads_or(pending != 0);  // all have pushed
      if (full) threshold = shrink(list, k, scratch);
    } while (full);
  }
}

// Leaves what the k largest can be in the list. Of a span with fewer than k elements these are all
// of its own, and fillers below every key of an element. Ends with a barrier.
template <typename Keys, int kThreads, typename Span>
__device__ inline void select_span(const Span& span, int first_index, int k,
                                   CandidateList<typename Keys::Key>& list,
                                   typename Keys::Key* scratch) {
  using Key = typename Keys::Key;
  Vector<typename Span::Element> vectors[kVectorsPerThread];
  load_tile<kThreads>(span, 0, Keys::filler(), vectors);
  Key largest = 0;
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) largest = max(largest, Keys::reached_by(vectors[v]));
  threshold_of_threads<kThreads>(largest, Key(0), k, list);
  offer_span<Keys, kThreads>(span, first_index, k, list, scratch);
}

}  // namespace eaft_ext::cuda
