// Streaming top-k selection with a threshold: the k largest keys of a row, without sorting it. The
// threshold, shared by the whole block, says below what nothing can matter any more; the few keys
// above it go to a list of candidates in shared memory; one warp selects the k largest of the list.
//
//     threshold  at first the k-th largest of the threads' own maxima: k keys reach it, and about
//                1.1 k of those seen so far are above it, wherever the large ones are.
//     list       when it holds many, the warp keeps its k largest, and their least is the
//                threshold.
//     selection  a radix select, one bit a pass from the highest: the largest prefix that at least
//                k keys reach. One count over the warp for each bit; leading bits that all keys
//                share are skipped.
//
// A key is never 0. Either exactly k keys are above a threshold that the selection gives, or the
// threshold is itself the k-th largest key, and fills the places that fewer keys above it leave.
#pragma once

#include <cstdint>

#include "../core/limits.h"
#include "reduce.cuh"

namespace eaft_ext::cuda {

template <typename Key>
struct CandidateList {
  static constexpr int kCapacity = 1024;
  Key keys[kCapacity];
  Key threshold;
  int count;      // of keys that were offered, also of those that found no room
  bool overflew;  // whether there are such

  // Returns the key's place. There was room for it if that is below kCapacity.
  __device__ int push(Key key) {
    const int place = atomicAdd(&count, 1);
    if (place < kCapacity) {
      keys[place] = key;
    } else {
      overflew = true;
    }
    return place;
  }
};

__device__ inline int highest_bit(uint32_t bits) { return 31 - __clz(static_cast<int>(bits)); }
__device__ inline int highest_bit(uint64_t bits) {
  return 63 - __clzll(static_cast<long long>(bits));
}

// Radix select: the threshold of the k largest of n keys in shared memory, n >= k; by one warp. Not
// inlined, nor is the next one: called from many places, they would crowd the loops out of the
// instruction cache.
template <typename Key>
__device__ __noinline__ Key warp_radix_select(const Key* keys, int n, int k) {
  Key all = ~Key(0);
  Key any = 0;
  for (int i = lane_index(); i < n; i += kWarpSize) {
    all &= keys[i];
    any |= keys[i];
  }
  all = warp_and(all);
  any = warp_or(any);
  int bit = all == any ? -1 : highest_bit(all ^ any);
  Key prefix = bit < 0 ? all : all & ~((Key(2) << bit) - 1);
  int reaching = n;  // keys >= prefix
  for (; bit >= 0 && reaching > k; --bit) {
    const Key probe = prefix | Key(1) << bit;
    unsigned count = 0;
    for (int i = lane_index(); i < n; i += kWarpSize) count += keys[i] >= probe;
    const int total = static_cast<int>(__reduce_add_sync(kAllLanes, count));
    if (total >= k) {
      prefix = probe;
      reaching = total;
    }
  }
  return reaching == k ? prefix - (prefix != 0) : prefix;
}

// The k largest of the list into top, compacted by ballots, in no order; raises the list's
// threshold. By one warp; top may not be the list's own keys.
template <typename Key>
__device__ __noinline__ void warp_select_top_k(CandidateList<Key>& list, int k, Key* top) {
  const int n = min(list.count, CandidateList<Key>::kCapacity);
  Key threshold = list.threshold;
  if (n > k) threshold = max(threshold, warp_radix_select(list.keys, n, k));
  int kept = 0;
  for (int begin = 0; begin < n; begin += kWarpSize) {
    const int i = begin + lane_index();
    const Key key = i < n ? list.keys[i] : 0;
    const bool keep = key > threshold;
    const unsigned keeping = __ballot_sync(kAllLanes, keep);
    const unsigned before = keeping & ((1u << lane_index()) - 1);
    if (keep) top[kept + __popc(before)] = key;
    kept += __popc(keeping);
  }
  for (int i = kept + lane_index(); i < k; i += kWarpSize) top[i] = threshold;
  __syncwarp();  // all have read the threshold
  if (lane_index() == 0) list.threshold = threshold;
  __syncwarp();
}

// Rank sort, the largest first: each key's place is the number of those before it. By one warp.
template <typename Key>
__device__ inline void warp_sort(const Key* keys, int n, Key* sorted) {
  for (int i = lane_index(); i < n; i += kWarpSize) {
    int place = 0;
    for (int j = 0; j < n; ++j) place += keys[j] > keys[i] || (keys[j] == keys[i] && j < i);
    sorted[place] = keys[i];
  }
  __syncwarp();
}

// What follows is done by all threads of the block together.

// Makes the list empty, with the threshold that the threads' own largest keys give, at least
// `lowest`. Barriers stand around its use of the list.
template <int kThreads, typename Key>
__device__ inline Key threshold_of_threads(Key largest, Key lowest, int k,
                                           CandidateList<Key>& list) {
  static_assert(kThreads >= kMaxTopK && kThreads <= CandidateList<Key>::kCapacity,
                "one key a thread");
  // The maxima of groups of lanes do nearly as well, and the warp has less to select from.
  int group = 1;
  while (group < kWarpSize && kThreads / (2 * group) >= 3 * k) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, group));
    group *= 2;
  }
  if (threadIdx.x % group == 0) list.keys[threadIdx.x / group] = largest;
  __syncthreads();  // the keys are written
  if (warp_index() == 0) {
    const Key threshold = warp_radix_select(list.keys, kThreads / group, k);
    if (lane_index() == 0) {
      list.threshold = max(threshold, lowest);
      list.count = 0;
      list.overflew = false;
    }
  }
  __syncthreads();  // the threshold is known, and the keys have been read
  return list.threshold;
}

// Leaves the k largest of the list in it. All threads come from a barrier; they may push again
// after.
template <typename Key>
__device__ inline Key shrink(CandidateList<Key>& list, int k, Key* scratch) {
  if (warp_index() == 0) {
    warp_select_top_k(list, k, scratch);
    for (int i = lane_index(); i < k; i += kWarpSize) list.keys[i] = scratch[i];
    if (lane_index() == 0) list.count = k;
  }
  __syncthreads();  // the list is short, and its threshold is raised
  return list.threshold;
}

}  // namespace eaft_ext::cuda
