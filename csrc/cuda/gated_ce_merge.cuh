// Vocabulary-parallel cross-entropy, second half: loss and stats of each row from the partials
// (core/shard_partial.h) of all shards of its vocabulary, by merging their online softmax sums and
// a k-way merge of their top-k:
//
//     max, sum  merged as in core/max_sum.h     x_y  of the one shard that has it
//     t_1 >= ... >= t_k  the k largest of the shards' k largest, which come in their order
//
// Work: a warp takes a row, a lane a shard. Each lane holds the largest of its shard that is not
// taken yet; k times a warp reduction finds the largest of the lanes, which is taken. Where there
// are more shards than lanes, the next ones follow, and what was taken so far comes in as one of
// them. Bytes: one read of the partials.
#pragma once

#include <cstdint>

#include "../core/shard_partial.h"
#include "gated_ce_forward.cuh"

namespace eaft_ext::cuda {

constexpr int kRowsPerMergeBlock = 8;  // a warp each

struct ShardMergeStorage {
  float top[kRowsPerMergeBlock][2][kMaxTopK];
};

__device__ inline const float* partial_of(const MergeArguments& arguments, int shard, int64_t row) {
  return arguments.partials + (shard * arguments.num_rows + row) * partial_size(arguments.loss);
}

// Numbers in descending order, NaN after the last.
struct DescendingList {
  const float* next;
  int left;
  float head;    // the largest
  float second;  // loaded ahead

  __device__ DescendingList(const float* values, int length) : next(values), left(length) {
    head = take();
    second = take();
  }
  __device__ float take() { return left-- > 0 ? *next++ : NAN; }
  __device__ void pop() {
    head = second;
    second = take();
  }
};

// Takes the k largest of the lanes' lists, and gives how many there were.
__device__ inline int warp_merge_lists(DescendingList list, int k, float* taken) {
  for (int i = 0; i < k; ++i) {
    const uint32_t key = list.head == list.head ? key_of<float>(list.head) : 0;
    const uint32_t largest = __reduce_max_sync(kAllLanes, key);
    if (largest == 0) return i;
    const unsigned holders = __ballot_sync(kAllLanes, key == largest);
    if (lane_index() == __ffs(static_cast<int>(holders)) - 1) {
      taken[i] = list.head;
      list.pop();
    }
  }
  return k;
}

// The entropy of all logits from what the shards tell of their own. partials: of the row, by the
// first shard; stride: from a shard to the next; entropy_at: its place in a partial; row_max: of
// all shards. By value, and before the top k: otherwise the kernel spills on some architecture.
__device__ inline double warp_merge_entropies(const float* partials, int64_t stride, int num_shards,
                                              int entropy_at, float row_max) {
  const auto mass = [&](int shard) -> double {
    const MaxSum<double> of_shard = max_sum_of_partial(partials + shard * stride);
    return of_shard.sum * exp(of_shard.max - row_max);
  };
  // The first is a large one: that of the lane with the largest.
  double largest = -1;
  int first = -1;
  for (int shard = lane_index(); shard < num_shards; shard += kWarpSize) {
    if (mass(shard) <= largest) continue;
    largest = mass(shard);
    first = shard;
  }
  const float of_lane = static_cast<float>(largest);
  const unsigned holders = __ballot_sync(kAllLanes, of_lane == warp_max(of_lane));
  const int holder = max(__ffs(static_cast<int>(holders)) - 1, 0);
  largest = __shfl_sync(kAllLanes, largest, holder);
  first = __shfl_sync(kAllLanes, first, holder);
  EntropyOfParts<double> entropy;
  for (int shard = lane_index(); shard < num_shards; shard += kWarpSize) {
    const double of_shard = partials[shard * stride + entropy_at];
    if (shard == first) {
      entropy.add_first(of_shard);
    } else {
      entropy.add(mass(shard) / largest, of_shard);
    }
  }
  entropy.between.z = warp_sum(entropy.between.z);
  entropy.between.weighted = warp_sum(entropy.between.weighted);
  entropy.within = warp_sum(entropy.within);
  return entropy.get();
}

// A warp for each row.
__global__ void __launch_bounds__(kRowsPerMergeBlock* kWarpSize)
    gated_ce_merge_kernel(const __grid_constant__ MergeArguments arguments) {
  auto& storage = *reinterpret_cast<ShardMergeStorage*>(block_memory());
  const int64_t row = blockIdx.x * int64_t{kRowsPerMergeBlock} + warp_index();
  if (row >= arguments.num_rows) return;
  const int64_t label = arguments.labels[row];
  if (label == arguments.loss.ignore_index) {
    if (lane_index() == 0) write_stats(arguments.stats, row, {});
    return;
  }
  const int k = arguments.loss.k;
  const int num_shards = arguments.num_shards;

  const SoftmaxSum sum = warp_merge(num_shards, [&](int shard) {
    const MaxSum<double> of_shard = max_sum_of_partial(partial_of(arguments, shard, row));
    return SoftmaxSum{static_cast<float>(of_shard.max), of_shard.sum};
  });
  Entropies<double> entropy{};
  if (arguments.loss.sums_entropy()) {
    const int64_t stride = arguments.num_rows * partial_size(arguments.loss);
    entropy.of_all = warp_merge_entropies(partial_of(arguments, 0, row), stride, num_shards,
                                          partial_entropy(arguments.loss), sum.max);
    entropy.of_gate = entropy.of_all;
  }

  float* taken = storage.top[warp_index()][0];
  float* before = storage.top[warp_index()][1];
  int count = 0;
  for (int first = 0; k > 0 && first < num_shards;) {
    const int goes_on = first > 0;  // the first lane then has what was taken before
    const int shard = first + lane_index() - goes_on;
    const bool has_shard = shard >= first && shard < num_shards;
    DescendingList list(before, goes_on && lane_index() == 0 ? count : 0);
    if (has_shard) list = DescendingList(partial_of(arguments, shard, row) + kPartialTop, k);
    count = warp_merge_lists(list, k, taken);
    __syncwarp();  // what was taken is there
    float* const free = before;
    before = taken;
    taken = free;
    first += kWarpSize - goes_on;
  }

  TargetOfShards<float> target{static_cast<float>(label)};
  for (int shard = lane_index(); shard < num_shards; shard += kWarpSize) {
    target.add(partial_of(arguments, shard, row));
  }
  const unsigned owners = __ballot_sync(kAllLanes, target.count > 0);
  target.target =
      __shfl_sync(kAllLanes, target.target, max(__ffs(static_cast<int>(owners)) - 1, 0));
  target.count =
      static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(target.count)));
  target.differs = __any_sync(kAllLanes, target.differs);
  double sum_of_logits = 0;
  if (arguments.loss.label_smoothing != 0) {
    for (int shard = lane_index(); shard < num_shards; shard += kWarpSize) {
      sum_of_logits += partial_of(arguments, shard, row)[partial_logits(arguments.loss)];
    }
    sum_of_logits = warp_sum(sum_of_logits);
  }
  if (k > 0) entropy.of_gate = warp_entropy(count, [&](int i) -> double { return before[i]; });
  if (lane_index() != 0) return;
  const Gate gate = k > 0 ? for_k(arguments.loss.gate, count) : arguments.loss.gate;
  const auto token = token_stats<double>(gate, sum.max, sum.log_sum(), target.get(), entropy);
  write_stats(arguments.stats, row, with_family(token, arguments.loss, sum_of_logits));
}

}  // namespace eaft_ext::cuda
