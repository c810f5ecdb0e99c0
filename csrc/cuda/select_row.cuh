// The k largest keys of a part of a row by a block that does nothing else: for top-k, for merging
// what blocks selected each, and for rows whose order defeats the scan. One read, and one more of
// the first tile; a barrier after each tile, where what found no room in the list is offered again.
#pragma once

#include <cstdint>

#include "row_part.cuh"
#include "top_k.cuh"

namespace eaft_ext::cuda {

// Keys of values alone: equal ones need no order.
template <typename Element>
struct ValueKeys {
  using Key = uint32_t;
  __device__ static Key key(Element x, int) { return key_of<Element>(to_float(x)); }
  __device__ static bool may_exceed(Element x, Key floor) {
    return !(to_float(x) < value_of<Element>(floor));
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
  __device__ static bool may_exceed(Element x, Key floor) {
    return !(to_float(x) < value_of<Element>(static_cast<uint32_t>(floor >> 32)));
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
  __device__ static bool may_exceed(Key key, Key floor) { return key > floor; }
  __device__ static Key filler() { return 0; }
};

// The keys of one vector, 0 where it has no element; `first_index` is the place of the part's first
// element in its row.
template <typename Keys, typename Part>
__device__ inline typename Keys::Key key_of_vector(const Part& part, int vector, int e,
                                                   typename Part::Element x, int first_index) {
  const bool exists = vector < part.num_vectors() && e < part.size(vector);
  return exists ? Keys::key(x, first_index + part.begin(vector) + e) : 0;
}

// Offers every element of the part to the list, which is empty and has a floor. Ends with a
// barrier.
template <typename Keys, int kThreads, typename Part>
__device__ inline void offer_part(const Part& part, int first_index, int k,
                                  CandidateList<typename Keys::Key>& list,
                                  typename Keys::Key* scratch) {
  using Key = typename Keys::Key;
  constexpr int kSize = Part::kSize;
  static_assert(kVectorsPerThread * kSize <= 32, "a bit for each element of a tile");
  Key floor = list.floor;
  for (int tile = 0; tile < num_tiles<kThreads>(part); ++tile) {
    Vector<typename Part::Element> vectors[kVectorsPerThread];
    load_tile<kThreads>(part, tile, Keys::filler(), vectors);
    uint32_t pending = 0;  // bit v * kSize + e: that element is to be offered
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const bool may_exceed = Keys::may_exceed(vectors[v].elements[e], floor);
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
              key_of_vector<Keys>(part, vector, e, element_at(vectors[v], e), first_index);
          const bool kept_out = key > floor && list.push(key) >= list.kCapacity;
          if (!kept_out) pending &= ~(1u << (v * kSize + e));
        }
      }
      full = __syncthreads_or(pending != 0);  // all have pushed
      if (full) floor = shrink(list, k, scratch);
    } while (full);
  }
}

// Leaves what the k largest can be in the list. Of a part with fewer than k elements these are all
// of its own, and fillers below every key of an element. Ends with a barrier.
template <typename Keys, int kThreads, typename Part>
__device__ inline void select_part(const Part& part, int first_index, int k,
                                   CandidateList<typename Keys::Key>& list,
                                   typename Keys::Key* scratch) {
  using Key = typename Keys::Key;
  Vector<typename Part::Element> vectors[kVectorsPerThread];
  load_tile<kThreads>(part, 0, Keys::filler(), vectors);
  Key largest = 0;
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) largest = max(largest, Keys::reached_by(vectors[v]));
  floor_of_threads<kThreads>(largest, Key(0), k, list);
  offer_part<Keys, kThreads>(part, first_index, k, list, scratch);
}

}  // namespace eaft_ext::cuda
