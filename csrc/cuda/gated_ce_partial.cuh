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
    if (arguments.loss.label_smoothing != 0) partial[kPartialTop + arguments.loss.k] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < arguments.loss.k;
       i += static_cast<int>(blockDim.x)) {
    partial[kPartialTop + i] = NAN;
  }
}

template <typename Element, typename Loss>
__device__ inline void write_row(const PartialArguments& arguments, int64_t row,
                                 const SumOf<Loss>& sum, float target_logit, const uint32_t* top,
                                 uint32_t* sorted) {
  const Loss loss(arguments.loss);
  warp_sort(top, arguments.loss.k, sorted);
  float* partial = partial_of(arguments, row);
  for (int i = lane_index(); i < arguments.loss.k; i += kWarpSize) {
    const bool exists = i < arguments.logits.vocab_size;
    partial[kPartialTop + i] = exists ? loss.logit(value_of<Element>(sorted[i])) : NAN;
  }
  if (lane_index() == 0) {
    write_partial_head(partial, arguments.labels[row], sum.sum, target_logit);
    if constexpr (!Loss::kIsPlain) {
      if (arguments.loss.label_smoothing != 0) {
        partial[kPartialTop + arguments.loss.k] = static_cast<float>(sum.logits);
      }
    }
  }
}

}  // namespace eaft_ext::cuda
