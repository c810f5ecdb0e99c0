#include "gated_ce_partial.cuh"
#include "launch.h"
#include "launch_forward.cuh"

namespace eaft_ext::cuda {

cudaError_t plan_gated_ce_partial(ElementType type, const PartialArguments& arguments,
                                  SplitPlan* plan) {
  return plan_forward_rows(type, arguments, plan);
}

cudaError_t launch_gated_ce_partial(ElementType type, const PartialArguments& arguments,
                                    const SplitPlan& plan, void* workspace, cudaStream_t stream) {
  return launch_forward_rows(type, arguments, plan, workspace, stream);
}

}  // namespace eaft_ext::cuda
