// Loss and stats of each row of logits x with label y, from one read of the row:
//
//     nll = (max - x_y) + ln sum_j exp(x_j - max)     H = entropy of the k largest     loss = g nll
//
// Work: a block takes one row, or one part of it where rows are few (parts.h); its first warp
// selects the k largest from what the scan found and finishes the row. The blocks that are resident
// together are in different phases, so one's selection hides behind the others' loads. Bytes: one
// read; rows whose label is ignored are not read.
#pragma once

#include <cstdint>

#include "../core/entropy.h"
#include "../core/token_stats.h"
#include "arguments.h"
#include "parts.h"
#include "scan_row.cuh"

namespace eaft_ext::cuda {

template <int kThreads>
struct ForwardStorage {
  ScanStorage<kThreads> scan;
  uint32_t top[kMaxTopK];
  uint32_t sorted[kMaxTopK];
};

constexpr int kMergeThreads = 256;
// On a multiprocessor at least: without a number the compiler takes too few registers, and spills.
constexpr int kMergeBlocks = 2;

struct MergeStorage {
  CandidateList<uint32_t> list;
  uint32_t scratch[kMaxTopK];
  uint32_t top[kMaxTopK];
  uint32_t sorted[kMaxTopK];
};

template <typename Element>
__device__ inline const Element* row_of(const LogitsArguments& logits, int64_t row) {
  return static_cast<const Element*>(logits.logits) + logits.layout.offset(row);
}

// The label's logit. A label outside the vocabulary spoils its own row: nothing is read for it.
template <typename Element>
__device__ inline float target_logit_of(const LogitsArguments& logits, int64_t row,
                                        int64_t column) {
  if (column < 0 || column >= logits.vocab_size) return NAN;
  return to_float(row_of<Element>(logits, row)[column]);
}

__device__ inline void write_stats(const StatsPointers& stats, int64_t row,
                                   const TokenStats<double>& token) {
  stats.loss[row] = static_cast<float>(token.loss);
  stats.nll[row] = static_cast<float>(token.nll);
  stats.entropy[row] = static_cast<float>(token.entropy);
  stats.gate[row] = static_cast<float>(token.gate);
  stats.row_max[row] = static_cast<float>(token.row_max);
  stats.log_sum[row] = static_cast<float>(token.log_sum);
}

// The entropy of get(0) >= get(1) >= ... >= get(k - 1); by one warp.
template <typename Get>
__device__ inline double warp_entropy(int k, const Get& get) {
  const double largest = get(0);
  EntropySums<double> sums;
  for (int i = lane_index(); i < k; i += kWarpSize) {
    if (i > 0) sums.add(get(i) - largest);
  }
  sums.z = warp_sum(sums.z);
  sums.weighted = warp_sum(sums.weighted);
  return sums.entropy();
}

// Stats of a row from its sum and the keys of its k largest logits, which come in no order; the
// first lane gets them. In double: a loss is a gate times an nll, and beside an nll of 1e4 the last
// bit of a float gate shows. By one warp.
template <typename Element>
__device__ inline TokenStats<double> warp_token_stats(const ForwardArguments& arguments,
                                                      const PartSum& sum, float target_logit,
                                                      const uint32_t* top, uint32_t* sorted) {
  // Sorted first, since the order in which the keys came to the list changes from run to run, and
  // rounded sums would with it.
  warp_sort(top, arguments.k, sorted);
  const auto value = [&](int i) -> double { return value_of<Element>(sorted[i]); };
  const double entropy = warp_entropy(arguments.k, value);
  if (lane_index() != 0) return {};
  return token_stats<double>(arguments.gate, sum.max, sum.log_sum(), target_logit, entropy);
}

// What differs between the forward of whole rows and that of a shard (gated_ce_partial.cuh):

__device__ inline int64_t column_of(const ForwardArguments&, int64_t label) { return label; }

// Of an ignored row, by all threads of the block.
__device__ inline void write_ignored(const ForwardArguments& arguments, int64_t row) {
  if (threadIdx.x == 0) write_stats(arguments.stats, row, {});
}

// By one warp.
template <typename Element>
__device__ inline void write_row(const ForwardArguments& arguments, int64_t row, const PartSum& sum,
                                 float target_logit, const uint32_t* top, uint32_t* sorted) {
  const auto token = warp_token_stats<Element>(arguments, sum, target_logit, top, sorted);
  if (lane_index() == 0) write_stats(arguments.stats, row, token);
}

// A block for each part of each row.
template <typename Element, int kThreads, typename Arguments>
__global__ void __launch_bounds__(kThreads, kThreadsPerMultiprocessor / kThreads)
    gated_ce_forward_kernel(const __grid_constant__ Arguments arguments,
                            const __grid_constant__ RowParts<uint32_t> parts) {
  auto& storage = *reinterpret_cast<ForwardStorage<kThreads>*>(block_memory());
  const LogitsArguments& logits = arguments.logits;
  const int64_t row = blockIdx.x / parts.count;
  const int begin = static_cast<int>(blockIdx.x % parts.count) * parts.length;
  if (arguments.labels[row] == arguments.ignore_index) {
    if (begin == 0) write_ignored(arguments, row);
    return;
  }
  const int length = min(parts.length, static_cast<int>(logits.vocab_size) - begin);
  const RowPart<Element> part(row_of<Element>(logits, row) + begin, length);
  const PartSum sum = scan_part<kThreads>(part, arguments.k, storage.scan);
  if (warp_index() != 0) return;
  if (parts.count > 1) {
    warp_top_k(storage.scan.list, arguments.k, parts.top + int64_t{blockIdx.x} * arguments.k);
    if (lane_index() == 0) {
      parts.max[blockIdx.x] = sum.max;
      parts.sum[blockIdx.x] = sum.sum;
    }
    return;
  }
  const int64_t column = column_of(arguments, arguments.labels[row]);
  const float target_logit = target_logit_of<Element>(logits, row, column);
  warp_top_k(storage.scan.list, arguments.k, storage.top);
  write_row<Element>(arguments, row, sum, target_logit, storage.top, storage.sorted);
}

// Merges the parts of each row: a block for each row.
template <typename Element, typename Arguments>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    gated_ce_forward_merge_kernel(const __grid_constant__ Arguments arguments,
                                  const __grid_constant__ RowParts<uint32_t> parts) {
  auto& storage = *reinterpret_cast<MergeStorage*>(block_memory());
  const int64_t row = blockIdx.x;
  const int64_t label = arguments.labels[row];
  if (label == arguments.ignore_index) return;  // written by the first part's block
  const int num_keys = parts.count * arguments.k;
  const RowPart<uint32_t> keys(parts.top + row * num_keys, num_keys);
  select_part<ReadyKeys<uint32_t>, kMergeThreads>(keys, 0, arguments.k, storage.list,
                                                  storage.scratch);
  if (warp_index() != 0) return;
  const float target_logit =
      target_logit_of<Element>(arguments.logits, row, column_of(arguments, label));
  const PartSum sum = warp_merge(parts.count, [&](int i) {
    return PartSum{parts.max[row * parts.count + i], parts.sum[row * parts.count + i]};
  });
  warp_top_k(storage.list, arguments.k, storage.top);
  write_row<Element>(arguments, row, sum, target_logit, storage.top, storage.sorted);
}

}  // namespace eaft_ext::cuda
