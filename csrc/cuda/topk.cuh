// Streaming top-k with indices: the k largest logits of each row and where they are, the largest
// first, the lowest index first among equals; NaN comes before every number.
//
// Work: as in the forward, a block takes a row, or one span of it where rows are few (split.h), and
// its first warp selects and sorts. Bytes: one read, and one more of the first tile.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "select_span.cuh"
#include "split.h"

namespace eaft_ext::cuda {

constexpr int kTopKThreads = 256;

struct TopKStorage {
  CandidateList<uint64_t> list;
  uint64_t top[kMaxTopK];
  uint64_t sorted[kMaxTopK];
};

// The k largest of the list to the output, by one warp.
template <typename Element>
__device__ inline void finish_topk(const TopKArguments& arguments, int64_t row,
                                   TopKStorage& storage) {
  const int k = arguments.k;
  warp_select_top_k(storage.list, k, storage.top);
  warp_sort(storage.top, k, storage.sorted);
  const Element* x =
      static_cast<const Element*>(arguments.logits.logits) + arguments.logits.layout.offset(row);
  for (int i = lane_index(); i < k; i += kWarpSize) {
    const int index = PairKeys<Element>::index_of(storage.sorted[i]);
    static_cast<Element*>(arguments.values)[row * k + i] = x[index];
    arguments.indices[row * k + i] = index;
  }
}

// A block for each span of each row.
template <typename Element>
__global__ void __launch_bounds__(kTopKThreads, kThreadsPerMultiprocessor / kTopKThreads)
    topk_kernel(const __grid_constant__ TopKArguments arguments,
                const __grid_constant__ RowSplit<uint64_t> split) {
  auto& storage = *reinterpret_cast<TopKStorage*>(block_memory());
  const LogitsArguments& logits = arguments.logits;
  const int64_t row = blockIdx.x / split.num_spans;
  const int begin = static_cast<int>(blockIdx.x % split.num_spans) * split.span_length;
  const int length = min(split.span_length, static_cast<int>(logits.vocab_size) - begin);
  const Element* x = static_cast<const Element*>(logits.logits) + logits.layout.offset(row);
  select_span<PairKeys<Element>, kTopKThreads>(RowSpan<Element>(x + begin, length), begin,
                                               arguments.k, storage.list, storage.top);
  if (warp_index() != 0) return;
  if (split.num_spans == 1) {
    finish_topk<Element>(arguments, row, storage);
  } else {
    warp_select_top_k(storage.list, arguments.k, split.top + int64_t{blockIdx.x} * arguments.k);
  }
}

// Combines the spans of each row: a block for each row.
template <typename Element>
__global__ void __launch_bounds__(kTopKThreads, kThreadsPerMultiprocessor / kTopKThreads)
    topk_combine_kernel(const __grid_constant__ TopKArguments arguments,
                        const __grid_constant__ RowSplit<uint64_t> split) {
  auto& storage = *reinterpret_cast<TopKStorage*>(block_memory());
  const int64_t row = blockIdx.x;
  const int num_keys = split.num_spans * arguments.k;
  const RowSpan<uint64_t> keys(split.top + row * num_keys, num_keys);
  select_span<ReadyKeys<uint64_t>, kTopKThreads>(keys, 0, arguments.k, storage.list, storage.top);
  if (warp_index() == 0) finish_topk<Element>(arguments, row, storage);
}

}  // namespace eaft_ext::cuda
