// How the kernels of gated_ce_forward.cuh are launched, for whole rows and for those of a shard:
// one pass, or a split of the vocabulary and a combining kernel (split.h).
#pragma once

#include "dispatch.h"
#include "gated_ce_forward.cuh"
#include "launch.h"
#include "occupancy.h"

namespace eaft_ext::cuda {

// Threads of a block: fewer where a row has no work for more.
constexpr int kForwardThreads = 256;
constexpr int kForwardThreadsOfShortRow = 128;

template <typename Element>
bool is_short_row(const LogitsArguments& logits) {
  return logits.vocab_size <= kForwardThreadsOfShortRow * kVectorsPerThread * kVectorSize<Element>;
}

template <typename Arguments>
cudaError_t plan_forward_rows(ElementType type, const Arguments& arguments, SplitPlan* plan) {
  const auto of_loss = [&](auto element, auto loss) {
    using Element = decltype(element);
    using Loss = decltype(loss);
    const LogitsArguments& logits = arguments.logits;
    *plan = {};
    plan->span_length = static_cast<int>(logits.vocab_size);
    if (is_short_row<Element>(logits)) return cudaSuccess;
    static ResidentBlocks resident;
    int resident_blocks = 0;
    if (const cudaError_t error = resident.get(
            gated_ce_forward_kernel<Element, kForwardThreads, Loss, Arguments>, kForwardThreads,
            sizeof(ForwardStorage<kForwardThreads, Loss>), &resident_blocks)) {
      return error;
    }
    constexpr int kLine = 128 / sizeof(Element);
    constexpr int kRound = kForwardThreads * kVectorSize<Element>;  // a vector for each thread
    *plan = choose_split(logits.num_rows, logits.vocab_size, resident_blocks, kLine, kRound,
                         kRound * kVectorsPerThread);
    RowSplit<uint32_t> split{plan->num_spans, plan->span_length};
    plan->workspace_bytes = lay_out_split(&split, logits.num_rows, arguments.loss.k, true, nullptr);
    return cudaSuccess;
  };
  return dispatch_forward(type, arguments.loss, of_loss);
}

template <typename Element, int kThreads, typename Loss, typename Arguments>
cudaError_t launch_forward_kernel(const Arguments& arguments, const RowSplit<uint32_t>& split,
                                  cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.logits.num_rows * split.num_spans);
  gated_ce_forward_kernel<Element, kThreads, Loss, Arguments>
      <<<blocks, kThreads, sizeof(ForwardStorage<kThreads, Loss>), stream>>>(arguments, split);
  return cudaGetLastError();
}

template <typename Arguments>
cudaError_t launch_forward_rows(ElementType type, const Arguments& arguments, const SplitPlan& plan,
                                void* workspace, cudaStream_t stream) {
  const auto of_loss = [&](auto element, auto loss) {
    using Element = decltype(element);
    using Loss = decltype(loss);
    const int64_t num_rows = arguments.logits.num_rows;
    if (num_rows == 0) return cudaSuccess;
    RowSplit<uint32_t> split{plan.num_spans, plan.span_length};
    lay_out_split(&split, num_rows, arguments.loss.k, true, workspace);
    if (is_short_row<Element>(arguments.logits)) {
      return launch_forward_kernel<Element, kForwardThreadsOfShortRow, Loss>(arguments, split,
                                                                             stream);
    }
    const cudaError_t error =
        launch_forward_kernel<Element, kForwardThreads, Loss>(arguments, split, stream);
    if (error != cudaSuccess || split.num_spans == 1) return error;
    gated_ce_forward_combine_kernel<Element, Loss, Arguments>
        <<<static_cast<unsigned>(num_rows), kCombineThreads, sizeof(CombineStorage), stream>>>(
            arguments, split);
    return cudaGetLastError();
  };
  return dispatch_forward(type, arguments.loss, of_loss);
}

}  // namespace eaft_ext::cuda
