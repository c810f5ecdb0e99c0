// A stretch of one row as the threads of a block share it out: vectors of 16 aligned bytes, and two
// more for what lies before the first aligned address and behind the last. Thread t takes vectors
// t, t + kThreads, ..., kVectorsPerThread of them at a time, which is a tile of the part.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace eaft_ext::cuda {

constexpr int kVectorsPerThread = 4;  // loads in flight
// So many threads are to be resident at least: 48 KB of loads in flight, three times what latency
// times bandwidth asks of a multiprocessor, and 80 registers for each.
constexpr int kThreadsPerMultiprocessor = 768;

template <typename Element_>
class RowPart {
 public:
  using Element = Element_;
  static constexpr int kSize = kVectorSize<Element>;

  // `length` elements at x, in global memory.
  __device__ RowPart(const Element* x, int length)
      : x_(x), length_(length), head_(min(elements_to_alignment(x), length)) {
    num_aligned_ = (length - head_) / kSize;
    tail_ = head_ + num_aligned_ * kSize;
  }

  __device__ int length() const { return length_; }
  // The aligned vectors, then that of the head, then that of the tail; either may be empty.
  __device__ int num_aligned() const { return num_aligned_; }
  __device__ int num_vectors() const {
    return num_aligned_ + (head_ > 0 || tail_ < length_ ? 2 : 0);
  }
  // The first element of a vector, and how many it has.
  __device__ int begin(int vector) const {
    if (vector < num_aligned_) return head_ + vector * kSize;
    return vector == num_aligned_ ? 0 : tail_;
  }
  __device__ int size(int vector) const {
    if (vector < num_aligned_) return kSize;
    return vector == num_aligned_ ? head_ : length_ - tail_;
  }

  // Elements before the first aligned address.
  __device__ int head() const { return head_; }

  __device__ Element element(int i) const { return x_[i]; }
  __device__ Vector<Element> load_aligned(int vector) const {
    return bit_cast<Vector<Element>>(
        load_once(reinterpret_cast<const uint4*>(x_ + head_) + vector));
  }
  // Where the part is brought on chip: makes sure that a tile has come.
  __device__ void await_tile(int) const {}

 protected:
  const Element* x_;
  int length_;
  int head_;
  int num_aligned_;
  int tail_;
};

template <typename Element>
__device__ inline Vector<Element> filled_with(Element value) {
  Vector<Element> result;
#pragma unroll
  for (int e = 0; e < kVectorSize<Element>; ++e) result.elements[e] = value;
  return result;
}

// Any vector of a part, filled up with `filler` where it has fewer elements or there is none.
template <typename Part>
__device__ inline Vector<typename Part::Element> load_vector(const Part& part, int vector,
                                                             typename Part::Element filler) {
  if (vector < part.num_aligned()) return part.load_aligned(vector);
  Vector<typename Part::Element> result;
  const bool exists = vector < part.num_vectors();
#pragma unroll
  for (int e = 0; e < Part::kSize; ++e) {
    const bool inside = exists && e < part.size(vector);
    result.elements[e] = inside ? part.element(part.begin(vector) + e) : filler;
  }
  return result;
}

// This thread's vectors of a tile.
template <int kThreads>
__device__ inline int vector_of_tile(int tile, int v) {
  return (tile * kVectorsPerThread + v) * kThreads + static_cast<int>(threadIdx.x);
}

template <int kThreads, typename Part>
__device__ inline int num_tiles(const Part& part) {
  constexpr int kTile = kThreads * kVectorsPerThread;
  return (part.num_vectors() + kTile - 1) / kTile;
}

template <int kThreads, typename Part>
__device__ inline void load_tile(const Part& part, int tile, typename Part::Element filler,
                                 Vector<typename Part::Element> (&vectors)[kVectorsPerThread]) {
  part.await_tile(tile);
  // A tile of aligned vectors alone, as most are, loads without a question in between.
  if ((tile + 1) * kVectorsPerThread * kThreads <= part.num_aligned()) {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      vectors[v] = part.load_aligned(vector_of_tile<kThreads>(tile, v));
    }
    return;
  }
  int edge = -1;  // head and tail follow each other, so a thread has at most one of them
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    const int vector = vector_of_tile<kThreads>(tile, v);
    if (vector < part.num_aligned()) {
      vectors[v] = part.load_aligned(vector);
    } else {
      vectors[v] = filled_with(filler);
      if (vector < part.num_vectors()) edge = vector;
    }
  }
  if (edge < 0) return;
  const auto loaded = load_vector(part, edge, filler);
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    if (vector_of_tile<kThreads>(tile, v) == edge) vectors[v] = loaded;
  }
}

}  // namespace eaft_ext::cuda
