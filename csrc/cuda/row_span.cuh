// Vectorised, coalesced loads of a span, a contiguous range of one row, by the threads of a block:
// vectors of 16 aligned bytes, and two more for what lies before the first aligned address and
// behind the last. Thread t takes vectors t, t + kThreads, ..., kVectorsPerThread of them at a
// time, which is a tile of the span.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace eaft_ext::cuda {

constexpr int kVectorsPerThread = 4;  // loads in flight
// So many threads are to be resident at least: 48 KB of loads in flight, three times what latency
// times bandwidth asks of a multiprocessor, and 80 registers for each.
constexpr int kThreadsPerMultiprocessor = 768;

template <typename Element_>
class RowSpan {
 public:
  using Element = Element_;
  static constexpr int kSize = kVectorSize<Element>;

  // `length` elements at x, in global memory.
  __device__ RowSpan(const Element* x, int length)
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
  // Where the span is brought on chip: makes sure that a tile has come.
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

// Any vector of a span, filled up with `filler` where it has fewer elements or there is none.
template <typename Span>
__device__ inline Vector<typename Span::Element> load_vector(const Span& span, int vector,
                                                             typename Span::Element filler) {
  if (vector < span.num_aligned()) return span.load_aligned(vector);
  Vector<typename Span::Element> result;
  const bool exists = vector < span.num_vectors();
#pragma unroll
  for (int e = 0; e < Span::kSize; ++e) {
    const bool inside = exists && e < span.size(vector);
    result.elements[e] = inside ? span.element(span.begin(vector) + e) : filler;
  }
  return result;
}

// This thread's vectors of a tile.
template <int kThreads>
__device__ inline int vector_of_tile(int tile, int v) {
  return (tile * kVectorsPerThread + v) * kThreads + static_cast<int>(threadIdx.x);
}

template <int kThreads, typename Span>
__device__ inline int num_tiles(const Span& span) {
  constexpr int kTile = kThreads * kVectorsPerThread;
  return (span.num_vectors() + kTile - 1) / kTile;
}

template <int kThreads, typename Span>
__device__ inline void load_tile(const Span& span, int tile, typename Span::Element filler,
                                 Vector<typename Span::Element> (&vectors)[kVectorsPerThread]) {
  span.await_tile(tile);
  // A tile of aligned vectors alone, as most are, loads without a question in between.
  if ((tile + 1) * kVectorsPerThread * kThreads <= span.num_aligned()) {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      vectors[v] = span.load_aligned(vector_of_tile<kThreads>(tile, v));
    }
    return;
  }
  int edge = -1;  // head and tail follow each other, so a thread has at most one of them
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    const int vector = vector_of_tile<kThreads>(tile, v);
    if (vector < span.num_aligned()) {
      vectors[v] = span.load_aligned(vector);
    } else {
      vectors[v] = filled_with(filler);
      if (vector < span.num_vectors()) edge = vector;
    }
  }
  if (edge < 0) return;
  const auto loaded = load_vector(span, edge, filler);
#pragma unroll
  for (int v = 0; v < kVectorsPerThread; ++v) {
    if (vector_of_tile<kThreads>(tile, v) == edge) vectors[v] = loaded;
  }
}

}  // namespace eaft_ext::cuda
