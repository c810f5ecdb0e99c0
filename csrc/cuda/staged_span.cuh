// A span of a row that TMA bulk copies (cp.async.bulk) bring to shared memory, all tiles at once
// and an mbarrier for each, so that it can be read twice for one read of global memory. Only
// aligned vectors travel: the few elements beside them are read where they are. Compute
// capability 9.0 and up.
#pragma once

#include <cstdint>

#include "row_span.cuh"

namespace eaft_ext::cuda {

// No block has more than 227 KB of shared memory.
template <int kThreads>
constexpr int kMaxStagedTiles = 227 * 1024 / (kThreads * kVectorsPerThread * kVectorBytes) + 1;

template <typename Element, int kThreads>
class StagedSpan : public RowSpan<Element> {
 public:
  // vectors: room for all aligned vectors; arrivals: one for each tile, both in shared memory.
  __device__ StagedSpan(const Element* x, int length, Vector<Element>* vectors, Arrival* arrivals)
      : RowSpan<Element>(x, length), vectors_(vectors), arrivals_(arrivals) {}

  // By one thread, once; a barrier follows before the others wait for a tile.
  __device__ void start() {
    make_arrivals(arrivals_, num_staged_tiles());
    const auto* source = reinterpret_cast<const Vector<Element>*>(this->x_ + this->head_);
    for (int tile = 0; tile < num_staged_tiles(); ++tile) {
      const int begin = tile * kTile;
      const int count = min(kTile, this->num_aligned_ - begin);
      start_bulk_copy(vectors_ + begin, source + begin, count * kVectorBytes, arrivals_ + tile);
    }
  }

  __device__ void await_tile(int tile) const {
    if (tile < num_staged_tiles()) wait_for(arrivals_ + tile);
  }

  __device__ Vector<Element> load_aligned(int vector) const { return vectors_[vector]; }
  __device__ Element element(int i) const {
    const int place = i - this->head_;
    const bool staged = place >= 0 && i < this->tail_;
    return staged ? reinterpret_cast<const Element*>(vectors_)[place] : this->x_[i];
  }

 private:
  static constexpr int kTile = kThreads * kVectorsPerThread;

  __device__ int num_staged_tiles() const { return (this->num_aligned_ + kTile - 1) / kTile; }

  Vector<Element>* vectors_;
  Arrival* arrivals_;
};

}  // namespace eaft_ext::cuda
