// Vocabulary-parallel cross-entropy, first half: what a shard of the vocabulary tells the others of
// each row (core/shard_partial.h), from one read of the shard. These are the forward's kernels
// (gated_ce_forward.cuh) with another end; the k largest are written in their order, so that the
// merge need not sort.
#pragma once

#include <cstdint>

#include "../core/shard_partial.h"
#include "gated_ce_forward.cuh"

namespace eaft_ext::cuda {

__device__ inline float* partial_of(const PartialArguments& arguments, int64_t row) {
  return arguments.partials + row * partial_size(arguments.loss);
}

__device__ inline int64_t column_of(const PartialArguments& arguments, int64_t label) {
  return column_in_shard(label, arguments.vocab_start);
}

__device__ inline void write_ignored(const PartialArguments& arguments, int64_t row) {
  float* partial = partial_of(arguments, row);
  if (threadIdx.x == 0) {
    write_partial_head<float>(partial, arguments.labels[row], 0, NAN);
    for (int i = partial_entropy(arguments.loss); i < partial_size(arguments.loss); ++i) {
      partial[i] = 0;
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < partial_top_size(arguments.loss);
       i += static_cast<int>(blockDim.x)) {
    partial[kPartialTop + i] = NAN;
  }
}

template <typename Element, typename Loss>
__device__ inline void write_row(const PartialArguments& arguments, int64_t row,
                                 const SumOf<Loss>& sum, float target_logit, const uint32_t* top,
                                 uint32_t* sorted) {
  const Loss loss(arguments.loss);
  const TokenLoss& given = arguments.loss;
  float* partial = partial_of(arguments, row);
  if (Loss::selects(given.k)) {
    warp_sort(top, given.k, sorted);
    for (int i = lane_index(); i < given.k; i += kWarpSize) {
      const bool exists = i < arguments.logits.vocab_size;
      partial[kPartialTop + i] = exists ? loss.logit(value_of<Element>(sorted[i])) : NAN;
    }
  }
  if (lane_index() != 0) return;
  write_partial_head(partial, arguments.labels[row], sum.sum, target_logit);
  if constexpr (Loss::kSumsEntropy) {
    if (!Loss::selects(given.k)) partial[kPartialTop] = sum.max;
    if (given.sums_entropy()) partial[partial_entropy(given)] = static_cast<float>(sum.entropy());
  }
  if constexpr (!Loss::kIsPlain) {
    if (given.label_smoothing != 0) {
      partial[partial_logits(given)] = static_cast<float>(sum.logits);
    }
  }
}

}  // namespace eaft_ext::cuda
