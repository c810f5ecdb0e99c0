#include <algorithm>

#include "gated_ce_backward.cuh"
#include "launch.h"

namespace eaft_ext::cuda {
namespace {

template <typename Element>
cudaError_t launch(const BackwardArguments& arguments, cudaStream_t stream) {
  constexpr int64_t kMaxGrid = 0x7fffffff;  // more items than that are taken in turns
  const int64_t items = arguments.num_rows * num_chunks_of_row<Element>(arguments.vocab_size);
  if (items == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(std::min(items, kMaxGrid));
  gated_ce_backward_kernel<Element>
      <<<grid, BackwardTraits<Element>::kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gated_ce_backward(ElementType type, const BackwardArguments& arguments,
                                     cudaStream_t stream) {
  switch (type) {
    case ElementType::kFloat32:
      return launch<float>(arguments, stream);
    case ElementType::kBFloat16:
      return launch<__nv_bfloat16>(arguments, stream);
    case ElementType::kFloat16:
      return launch<__half>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace eaft_ext::cuda
