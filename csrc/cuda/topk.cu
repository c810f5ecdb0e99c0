#include "dispatch.h"
#include "launch.h"
#include "occupancy.h"
#include "topk.cuh"

namespace eaft_ext::cuda {

cudaError_t plan_topk(ElementType type, const TopKArguments& arguments, PartsPlan* plan) {
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
    *plan = choose_parts(logits.num_rows, logits.vocab_size, resident_blocks, kLine, kRound,
                         kRound * kVectorsPerThread);
    RowParts<uint64_t> parts{plan->count, plan->length};
    plan->workspace_bytes = lay_out_parts(&parts, logits.num_rows, arguments.k, false, nullptr);
    return cudaSuccess;
  });
}

cudaError_t launch_topk(ElementType type, const TopKArguments& arguments, const PartsPlan& plan,
                        void* workspace, cudaStream_t stream) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    const auto num_rows = static_cast<unsigned>(arguments.logits.num_rows);
    if (num_rows == 0) return cudaSuccess;
    RowParts<uint64_t> parts{plan.count, plan.length};
    lay_out_parts(&parts, num_rows, arguments.k, false, workspace);
    topk_kernel<Element>
        <<<num_rows * parts.count, kTopKThreads, sizeof(TopKStorage), stream>>>(arguments, parts);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || parts.count == 1) return error;
    topk_merge_kernel<Element>
        <<<num_rows, kTopKThreads, sizeof(TopKStorage), stream>>>(arguments, parts);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
