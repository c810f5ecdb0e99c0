#include "dispatch.h"
#include "gated_ce_backward.cuh"
#include "launch.h"

namespace eaft_ext::cuda {

cudaError_t launch_gated_ce_backward(ElementType type, const BackwardArguments& arguments,
                                     cudaStream_t stream) {
  return dispatch_backward(type, arguments.loss, [&](auto element, auto loss) {
    using Element = decltype(element);
    using Traits = BackwardTraits<Element>;
    const LogitsArguments& logits = arguments.logits;
    const int64_t blocks = logits.num_rows * Traits::num_spans(logits.vocab_size);
    if (blocks == 0) return cudaSuccess;
    gated_ce_backward_kernel<Element, decltype(loss)>
        <<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
