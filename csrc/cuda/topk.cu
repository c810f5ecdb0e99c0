#include "dispatch.h"
#include "launch.h"
#include "occupancy.h"
#include "topk.cuh"

namespace eaft_ext::cuda {

cudaError_t plan_topk(ElementType type, const TopKArguments& arguments, SplitPlan* plan) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    const LogitsArguments& logits = arguments.logits;
    static ResidentBlocks resident;
    int resident_blocks = 0;
    if (const cudaError_t error = resident.get(topk_kernel<Element>, kTopKThreads,
                                               sizeof(TopKStorage), &resident_blocks)) {
      return error;
    }
    constexpr int kLine = 128 / sizeof(Element);
    constexpr int kRound = kTopKThreads * kVectorSize<Element>;  // a vector for each thread
    *plan = choose_split(logits.num_rows, logits.vocab_size, resident_blocks, kLine, kRound,
                         kRound * kVectorsPerThread);
    RowSplit<uint64_t> split{plan->num_spans, plan->span_length};
    plan->workspace_bytes = lay_out_split(&split, logits.num_rows, arguments.k, false, nullptr);
    return cudaSuccess;
  });
}

cudaError_t launch_topk(ElementType type, const TopKArguments& arguments, const SplitPlan& plan,
                        void* workspace, cudaStream_t stream) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    const auto num_rows = static_cast<unsigned>(arguments.logits.num_rows);
    if (num_rows == 0) return cudaSuccess;
    RowSplit<uint64_t> split{plan.num_spans, plan.span_length};
    lay_out_split(&split, num_rows, arguments.k, false, workspace);
    topk_kernel<Element><<<num_rows * split.num_spans, kTopKThreads, sizeof(TopKStorage), stream>>>(
        arguments, split);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || split.num_spans == 1) return error;
    topk_combine_kernel<Element>
        <<<num_rows, kTopKThreads, sizeof(TopKStorage), stream>>>(arguments, split);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
