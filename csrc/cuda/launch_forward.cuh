// How the kernels of gated_ce_forward.cuh are launched, for whole rows and for those of a shard.
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
cudaError_t plan_forward_rows(ElementType type, const Arguments& arguments, PartsPlan* plan) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    const LogitsArguments& logits = arguments.logits;
    *plan = {};
    plan->length = static_cast<int>(logits.vocab_size);
    if (is_short_row<Element>(logits)) return cudaSuccess;
    static ResidentBlocks resident;
    int resident_blocks = 0;
    if (const cudaError_t error = resident.get(
            gated_ce_forward_kernel<Element, kForwardThreads, Arguments>, kForwardThreads,
            sizeof(ForwardStorage<kForwardThreads>), &resident_blocks)) {
      return error;
    }
    constexpr int kLine = 128 / sizeof(Element);
    constexpr int kRound = kForwardThreads * kVectorSize<Element>;  // a vector for each thread
    *plan = choose_parts(logits.num_rows, logits.vocab_size, resident_blocks, kLine, kRound,
                         kRound * kVectorsPerThread);
    RowParts<uint32_t> parts{plan->count, plan->length};
    plan->workspace_bytes = lay_out_parts(&parts, logits.num_rows, arguments.k, true, nullptr);
    return cudaSuccess;
  });
}

template <typename Element, int kThreads, typename Arguments>
cudaError_t launch_forward_kernel(const Arguments& arguments, const RowParts<uint32_t>& parts,
                                  cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.logits.num_rows * parts.count);
  gated_ce_forward_kernel<Element, kThreads, Arguments>
      <<<blocks, kThreads, sizeof(ForwardStorage<kThreads>), stream>>>(arguments, parts);
  return cudaGetLastError();
}

template <typename Arguments>
cudaError_t launch_forward_rows(ElementType type, const Arguments& arguments, const PartsPlan& plan,
                                void* workspace, cudaStream_t stream) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    const int64_t num_rows = arguments.logits.num_rows;
    if (num_rows == 0) return cudaSuccess;
    RowParts<uint32_t> parts{plan.count, plan.length};
    lay_out_parts(&parts, num_rows, arguments.k, true, workspace);
    if (is_short_row<Element>(arguments.logits)) {
      return launch_forward_kernel<Element, kForwardThreadsOfShortRow>(arguments, parts, stream);
    }
    const cudaError_t error =
        launch_forward_kernel<Element, kForwardThreads>(arguments, parts, stream);
    if (error != cudaSuccess || parts.count == 1) return error;
    gated_ce_forward_merge_kernel<Element, Arguments>
        <<<static_cast<unsigned>(num_rows), kMergeThreads, sizeof(MergeStorage), stream>>>(
            arguments, parts);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
