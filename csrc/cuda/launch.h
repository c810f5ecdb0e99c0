// Kernel launches on raw pointers and a stream: what ops_cuda.cpp knows of the kernels. All of them
// are for the current device, and start nothing where there are no rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "arguments.h"
#include "split.h"

namespace eaft_ext::cuda {

// The spans that rows are split into; `workspace` is then of plan.workspace_bytes, 16-byte aligned.
cudaError_t plan_gated_ce_forward(ElementType type, const ForwardArguments& arguments,
                                  SplitPlan* plan);
cudaError_t launch_gated_ce_forward(ElementType type, const ForwardArguments& arguments,
                                    const SplitPlan& plan, void* workspace, cudaStream_t stream);

// Workspace and plan as for the forward.
cudaError_t plan_gated_ce_partial(ElementType type, const PartialArguments& arguments,
                                  SplitPlan* plan);
cudaError_t launch_gated_ce_partial(ElementType type, const PartialArguments& arguments,
                                    const SplitPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t launch_gated_ce_merge(const MergeArguments& arguments, cudaStream_t stream);

cudaError_t launch_gated_ce_backward(ElementType type, const BackwardArguments& arguments,
                                     cudaStream_t stream);

// What keeps a row on chip between its stats and its gradient.
enum class RowHome {
  kSharedMemory,  // of a cluster of blocks
  kL2,            // as few rows at once as fit
  // Nowhere: forward and backward, each over all blocks. For so few rows that all fit into L2, and
  // for so long ones that L2 holds too few of them.
  kTwoKernels,
};

struct ForwardWithGradPlan {
  RowHome home = RowHome::kL2;
  int grid = 0;             // blocks
  int cluster_size = 1;     // kSharedMemory
  int span_length = 0;      // kSharedMemory: elements of a row in each block
  size_t shared_bytes = 0;  // of a block
};

cudaError_t plan_gated_ce_forward_with_grad(ElementType type,
                                            const ForwardWithGradArguments& arguments,
                                            ForwardWithGradPlan* plan);
// Not for RowHome::kTwoKernels.
cudaError_t launch_gated_ce_forward_with_grad(ElementType type,
                                              const ForwardWithGradArguments& arguments,
                                              const ForwardWithGradPlan& plan, cudaStream_t stream);

cudaError_t launch_scale_gradient(ElementType type, const ScaleGradientArguments& arguments,
                                  cudaStream_t stream);

cudaError_t plan_topk(ElementType type, const TopKArguments& arguments, SplitPlan* plan);
cudaError_t launch_topk(ElementType type, const TopKArguments& arguments, const SplitPlan& plan,
                        void* workspace, cudaStream_t stream);

}  // namespace eaft_ext::cuda
