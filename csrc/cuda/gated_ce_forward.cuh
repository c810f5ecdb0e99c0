// Single-pass cross-entropy: online softmax and streaming top-k selection share one read of each
// row of logits x with label y, and give its loss and stats:
//
//     nll = (max - x_y) + ln sum_j exp(x_j - max)     H = entropy of the k largest     loss = g nll
//
// or, for k = 0, the entropy of all, which the softmax itself gives.
//
// Work: a block takes one row, or one span of it where rows are few (split.h); its first warp
// selects the k largest from what the scan found and finishes the row. The blocks that are resident
// together are in different phases, so one's selection hides behind the others' loads. Bytes: one
// read; rows whose label is ignored are not read.
#pragma once

#include <cstdint>

#include "../core/entropy.h"
#include "../core/token_stats.h"
#include "arguments.h"
#include "compiled_loss.h"
#include "scan_span.cuh"
#include "split.h"

namespace eaft_ext::cuda {

template <int kThreads, typename Loss>
struct ForwardStorage {
  ScanStorage<kThreads, Loss> scan;
  uint32_t top[kMaxTopK];
  uint32_t sorted[kMaxTopK];
};

constexpr int kCombineThreads = 256;
// On a multiprocessor at least: without a number the compiler takes too few registers, and spills.
constexpr int kCombineBlocks = 2;

struct CombineStorage {
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
template <typename Element, typename Loss>
__device__ inline float target_logit_of(const LogitsArguments& logits, int64_t row, int64_t column,
                                        const Loss& loss) {
  if (column < 0 || column >= logits.vocab_size) return NAN;
  return loss.logit(to_float(row_of<Element>(logits, row)[column]));
}

__device__ inline void write_stats(const StatsPointers& stats, int64_t row,
                                   const TokenStats<double>& token) {
  stats.loss[row] = static_cast<float>(token.loss);
  stats.nll[row] = static_cast<float>(token.nll);
  stats.entropy[row] = static_cast<float>(token.entropy);
  stats.gate[row] = static_cast<float>(token.gate);
  stats.row_max[row] = static_cast<float>(token.row_max);
  stats.log_sum[row] = static_cast<float>(token.log_sum);
  for (int i = 0; i < stats.num_extra; ++i) {
    stats.extra[i * stats.num_rows + row] = static_cast<float>(extra_stat(token, i));
  }
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
template <typename Element, typename Loss>
__device__ inline TokenStats<double> warp_token_stats(const ForwardArguments& arguments,
                                                      const SumOf<Loss>& sum, float target_logit,
                                                      const uint32_t* top, uint32_t* sorted) {
  const Loss loss(arguments.loss);
  const int k = arguments.loss.k;
  Entropies<double> entropy{};
  if (Loss::selects(k)) {
    // Sorted first, since the order in which the keys came to the list changes from run to run, and
    // rounded sums would with it.
    warp_sort(top, k, sorted);
    const auto value = [&](int i) -> double { return loss.logit(value_of<Element>(sorted[i])); };
    entropy.of_gate = warp_entropy(k, value);
  }
  if (lane_index() != 0) return {};
  if constexpr (Loss::kSumsEntropy) {
    if (loss.sums_entropy()) entropy.of_all = sum.entropy();
    if (!Loss::selects(k)) entropy.of_gate = entropy.of_all;
  }
  const auto token =
      token_stats<double>(arguments.loss.gate, sum.max, sum.log_sum(), target_logit, entropy);
  if constexpr (Loss::kIsPlain) {
    return token;
  } else {
    return with_family(token, arguments.loss, sum.logits);
  }
}

// What differs between the forward of whole rows and that of a shard (gated_ce_partial.cuh):

__device__ inline int64_t column_of(const ForwardArguments&, int64_t label) { return label; }

// Of an ignored row, by all threads of the block.
__device__ inline void write_ignored(const ForwardArguments& arguments, int64_t row) {
  if (threadIdx.x == 0) write_stats(arguments.stats, row, {});
}

// By one warp.
template <typename Element, typename Loss>
__device__ inline void write_row(const ForwardArguments& arguments, int64_t row,
                                 const SumOf<Loss>& sum, float target_logit, const uint32_t* top,
                                 uint32_t* sorted) {
  const auto token = warp_token_stats<Element, Loss>(arguments, sum, target_logit, top, sorted);
  if (lane_index() == 0) write_stats(arguments.stats, row, token);
}

// A block for each span of each row.
template <typename Element, int kThreads, typename Loss, typename Arguments>
__global__ void __launch_bounds__(kThreads, kThreadsPerMultiprocessor / kThreads)
    gated_ce_forward_kernel(const __grid_constant__ Arguments arguments,
                            const __grid_constant__ RowSplit<uint32_t> split) {
  auto& storage = *reinterpret_cast<ForwardStorage<kThreads, Loss>*>(block_memory());
  const LogitsArguments& logits = arguments.logits;
  const Loss loss(arguments.loss);
  const int64_t row = blockIdx.x / split.num_spans;
  const int begin = static_cast<int>(blockIdx.x % split.num_spans) * split.span_length;
  if (arguments.labels[row] == arguments.loss.ignore_index) {
    if (begin == 0) write_ignored(arguments, row);
    return;
  }
  const int length = min(split.span_length, static_cast<int>(logits.vocab_size) - begin);
  const RowSpan<Element> span(row_of<Element>(logits, row) + begin, length);
  const SumOf<Loss> sum = scan_span<kThreads>(span, arguments.loss.k, loss, storage.scan);
  if (warp_index() != 0) return;
  const bool selects = Loss::selects(arguments.loss.k);
  if (split.num_spans > 1) {
    if (selects) {
      warp_select_top_k(storage.scan.list, arguments.loss.k,
                        split.top + int64_t{blockIdx.x} * arguments.loss.k);
    }
    if (lane_index() == 0) {
      split.max[blockIdx.x] = sum.max;
      split.sum[blockIdx.x] = sum.sum;
      if constexpr (Loss::kSumsEntropy) {
        split.rest[blockIdx.x] = sum.rest;
        split.weighted[blockIdx.x] = sum.weighted;
      }
      if constexpr (!Loss::kIsPlain) split.logits[blockIdx.x] = sum.logits;
    }
    return;
  }
  const int64_t column = column_of(arguments, arguments.labels[row]);
  const float target_logit = target_logit_of<Element>(logits, row, column, loss);
  if (selects) warp_select_top_k(storage.scan.list, arguments.loss.k, storage.top);
  write_row<Element, Loss>(arguments, row, sum, target_logit, storage.top, storage.sorted);
}

// Combines the spans of each row: a block for each row.
template <typename Element, typename Loss, typename Arguments>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks)
    gated_ce_forward_combine_kernel(const __grid_constant__ Arguments arguments,
                                    const __grid_constant__ RowSplit<uint32_t> split) {
  auto& storage = *reinterpret_cast<CombineStorage*>(block_memory());
  const int64_t row = blockIdx.x;
  const int64_t label = arguments.labels[row];
  if (label == arguments.loss.ignore_index) return;  // written by the first span's block
  const bool selects = Loss::selects(arguments.loss.k);
  if (selects) {
    const int num_keys = split.num_spans * arguments.loss.k;
    const RowSpan<uint32_t> keys(split.top + row * num_keys, num_keys);
    select_span<ReadyKeys<uint32_t>, kCombineThreads>(keys, 0, arguments.loss.k, storage.list,
                                                      storage.scratch);
  }
  if (warp_index() != 0) return;
  const float target_logit = target_logit_of<Element>(
      arguments.logits, row, column_of(arguments, label), Loss(arguments.loss));
  const SumOf<Loss> sum = warp_merge(split.num_spans, [&](int i) {
    const int64_t span = row * split.num_spans + i;
    SumOf<Loss> of_span{};
    of_span.max = split.max[span];
    of_span.sum = split.sum[span];
    if constexpr (Loss::kSumsEntropy) {
      of_span.rest = split.rest[span];
      of_span.weighted = split.weighted[span];
    }
    if constexpr (!Loss::kIsPlain) of_span.logits = split.logits[span];
    return of_span;
  });
  if (selects) warp_select_top_k(storage.list, arguments.loss.k, storage.top);
  write_row<Element, Loss>(arguments, row, sum, target_logit, storage.top, storage.sorted);
}

}  // namespace eaft_ext::cuda
