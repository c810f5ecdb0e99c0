#include <algorithm>

#include "dispatch.h"
#include "launch.h"
#include "occupancy.h"
#include "scale_gradient.cuh"

namespace eaft_ext::cuda {

cudaError_t launch_scale_gradient(ElementType type, const ScaleGradientArguments& arguments,
                                  cudaStream_t stream) {
  return dispatch_element(type, [&](auto element) {
    using Element = decltype(element);
    using Traits = BackwardTraits<Element>;
    const int64_t items = arguments.num_rows * Traits::num_spans(arguments.vocab_size);
    if (items == 0) return cudaSuccess;
    static ResidentBlocks resident;
    int resident_blocks = 0;
    if (const cudaError_t error =
            resident.get(scale_gradient_kernel<Element>, Traits::kThreads, 0, &resident_blocks)) {
      return error;
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, resident_blocks));
    scale_gradient_kernel<Element><<<blocks, Traits::kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
