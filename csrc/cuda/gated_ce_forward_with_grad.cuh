// Fused cross-entropy forward and backward: loss, stats and, for u the gradient of a row's loss,
// dL/dx = u g (softmax(x) - onehot(y)) at once. Bytes: one read and one write of the row; what lies
// between the two stays on chip, in one of two ways.
//
// On chip in shared memory (compute capability 9.0 and up): a thread-block cluster takes a row,
// each block a span. TMA bulk copies bring all of the span; the block scans each tile as it comes,
// reads the sums and candidates of the other blocks through distributed shared memory and merges
// them, every block for itself, and writes the gradient of its span. Several clusters are resident
// on a multiprocessor: one loads while another writes.
//
// On chip in L2 (everywhere): persistent blocks, each in a loop over rows, read each row twice, and
// so few of them are started that all their rows fit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gated_ce_backward.cuh"
#include "gated_ce_forward.cuh"
#include "staged_span.cuh"

namespace eaft_ext::cuda {

constexpr int kMaxClusterSize = 8;
// So many blocks on a multiprocessor that one of them is always loading or writing, and so few
// threads that each has 80 registers.
constexpr int kStagedBlocks = 4;
constexpr int kStagedThreads = 192;
constexpr int kCachedThreads = 384;

// The options' arithmetic takes registers, and time in which others may load: half as many blocks.
template <typename Loss>
constexpr int blocks_of(int blocks) {
  return Loss::kIsPlain ? blocks : blocks / 2;
}

// What a block tells the others of its cluster, and what it makes of what they say.
template <int kThreads, typename Loss>
struct ForwardWithGradStorage {
  ForwardStorage<kThreads, Loss> forward;
  uint32_t block_top[kMaxTopK];  // read by the other blocks
  SumOf<Loss> block_sum;         // read by the other blocks
  float row_max;
  float log_sum;
  RowWeights<float> weights;
  Arrival arrivals[kMaxStagedTiles<kThreads>];
};

// Where the staged vectors of the span lie behind the storage.
template <int kThreads, typename Loss>
constexpr size_t kStagedOffset = (sizeof(ForwardWithGradStorage<kThreads, Loss>) + 127) / 128 * 128;

// Finishes the row by one warp: its stats, and what the gradient needs for all threads.
template <typename Element, typename Loss, int kThreads>
__device__ inline void finish_row(const ForwardWithGradArguments& arguments, int64_t row,
                                  float upstream, const SumOf<Loss>& sum, float target_logit,
                                  bool writes_stats,
                                  ForwardWithGradStorage<kThreads, Loss>& storage) {
  const ForwardArguments& forward = arguments.forward;
  const TokenStats<double> token = warp_token_stats<Element, Loss>(
      forward, sum, target_logit, storage.forward.top, storage.forward.sorted);
  if (lane_index() != 0) return;
  storage.row_max = static_cast<float>(token.row_max);
  storage.log_sum = static_cast<float>(token.log_sum);
  storage.weights = Loss(forward.loss)
                        .weights(arguments.upstream, row, upstream * static_cast<float>(token.gate),
                                 storage.row_max, storage.log_sum);
  if (writes_stats) write_stats(forward.stats, row, token);
}

// One row by one cluster; the grid has a cluster for each row. span_length: elements of each
// block's span but the last, a multiple of the vector size.
template <typename Element, int kThreads, typename Loss>
__global__ void __launch_bounds__(kThreads, blocks_of<Loss>(kStagedBlocks))
    gated_ce_forward_with_grad_staged_kernel(
        const __grid_constant__ ForwardWithGradArguments arguments, int span_length) {
  auto& storage = *reinterpret_cast<ForwardWithGradStorage<kThreads, Loss>*>(block_memory());
  auto* staged = reinterpret_cast<Vector<Element>*>(block_memory() + kStagedOffset<kThreads, Loss>);
  const ForwardArguments& forward = arguments.forward;
  const Loss loss(forward.loss);
  const int k = forward.loss.k;
  const int num_blocks = cluster_size();
  const int rank = cluster_rank();
  const int64_t row = blockIdx.x / num_blocks;
  const int vocab_size = static_cast<int>(forward.logits.vocab_size);
  const int begin = min(rank * span_length, vocab_size);
  const int length = min(span_length, vocab_size - begin);
  StagedSpan<Element, kThreads> span(row_of<Element>(forward.logits, row) + begin, length, staged,
                                     storage.arrivals);
  const auto target = [&] {
    return static_cast<Element*>(arguments.gradient) + arguments.gradient_layout.offset(row) +
           begin;
  };
  if (forward.labels[row] == forward.loss.ignore_index) {
    // So do all blocks of the cluster: none waits for the others.
    if (threadIdx.x == 0 && rank == 0) write_stats(forward.stats, row, {});
    write_gradient<kThreads>(span, target(), RowGradient<Loss>(loss, 0, 0, {0, 0, 0}, -1));
    return;
  }
  if (threadIdx.x == 0) span.start();
  __syncthreads();  // the arrivals are made

  const SumOf<Loss> block_sum = scan_span<kThreads>(span, k, loss, storage.forward.scan);
  CandidateList<uint32_t>& list = storage.forward.scan.list;
  const int64_t label = forward.labels[row];
  float target_logit = 0;
  if (warp_index() == 0) {
    // Read now: when all have arrived, the gradient may be written over it.
    target_logit = target_logit_of<Element>(forward.logits, row, label, loss);
    if (Loss::selects(k)) warp_select_top_k(list, k, storage.block_top);
    if (lane_index() == 0) storage.block_sum = block_sum;
    cluster_arrive();
  } else {
    cluster_arrive_relaxed();  // these warps have written nothing that other blocks read
  }
  cluster_wait();  // every block's sum and candidates are there
  // The list is free, and has room for the candidates of all blocks.
  static_assert(kMaxClusterSize * kMaxTopK <= CandidateList<uint32_t>::kCapacity, "they fit");
  for (int i = static_cast<int>(threadIdx.x); i < num_blocks * k; i += kThreads) {
    list.keys[i] = of_cluster_rank(storage.block_top, i / k)[i % k];
  }
  SumOf<Loss> sum{};
  float upstream = 0;
  if (warp_index() == 0) {
    upstream = arguments.upstream[row];
    SumOf<Loss> of_block{};
    of_block.max = -INFINITY;
    if (lane_index() < num_blocks) of_block = *of_cluster_rank(&storage.block_sum, lane_index());
    sum = warp_merge(kWarpSize, [&](int) { return of_block; });
    if (lane_index() == 0) {
      list.count = num_blocks * k;
      list.threshold = 0;
    }
  }
  __syncthreads();           // the list is there
  cluster_arrive_relaxed();  // this block has read the others
  if (warp_index() == 0) {
    if (Loss::selects(k)) warp_select_top_k(list, k, storage.forward.top);
    finish_row<Element, Loss, kThreads>(arguments, row, upstream, sum, target_logit, rank == 0,
                                        storage);
  }
  __syncthreads();  // the row is finished
  const RowGradient<Loss> gradient(loss, storage.row_max, storage.log_sum, storage.weights,
                                   label_in_span(label, begin));
  write_gradient<kThreads>(span, target(), gradient);
  cluster_wait();  // and they have read this one, whose memory ends with it
}

// A persistent block takes one row after the other; the second read comes from L2.
template <typename Element, int kThreads, typename Loss>
__global__ void __launch_bounds__(kThreads, blocks_of<Loss>(kThreadsPerMultiprocessor / kThreads))
    gated_ce_forward_with_grad_cached_kernel(
        const __grid_constant__ ForwardWithGradArguments arguments) {
  auto& storage = *reinterpret_cast<ForwardWithGradStorage<kThreads, Loss>*>(block_memory());
  const ForwardArguments& forward = arguments.forward;
  const Loss loss(forward.loss);
  for (int64_t row = blockIdx.x; row < forward.logits.num_rows; row += gridDim.x) {
    const int64_t label = forward.labels[row];
    const RowSpan<Element> span(row_of<Element>(forward.logits, row),
                                static_cast<int>(forward.logits.vocab_size));
    const bool ignored = label == forward.loss.ignore_index;
    SumOf<Loss> sum{};
    if (!ignored) sum = scan_span<kThreads>(span, forward.loss.k, loss, storage.forward.scan);
    if (ignored) {
      if (threadIdx.x == 0) write_stats(forward.stats, row, {});
      if (threadIdx.x == 0) storage.weights = {0, 0, 0};
    } else if (warp_index() == 0) {
      const float target_logit = target_logit_of<Element>(forward.logits, row, label, loss);
      const float upstream = arguments.upstream[row];
      if (Loss::selects(forward.loss.k)) {
        warp_select_top_k(storage.forward.scan.list, forward.loss.k, storage.forward.top);
      }
      finish_row<Element, Loss, kThreads>(arguments, row, upstream, sum, target_logit, true,
                                          storage);
    }
    __syncthreads();  // the row is finished
    const RowGradient<Loss> gradient(loss, storage.row_max, storage.log_sum, storage.weights,
                                     label_in_span(label, 0));
    __syncthreads();  // and its numbers are read, before the next row's take their place
    Element* target =
        static_cast<Element*>(arguments.gradient) + arguments.gradient_layout.offset(row);
    write_gradient<kThreads>(span, target, gradient);
  }
}

}  // namespace eaft_ext::cuda
