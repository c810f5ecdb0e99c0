#include "gated_ce_merge.cuh"
#include "launch.h"

namespace eaft_ext::cuda {

cudaError_t launch_gated_ce_merge(const MergeArguments& arguments, cudaStream_t stream) {
  if (arguments.num_rows == 0) return cudaSuccess;
  const int64_t blocks = (arguments.num_rows + kRowsPerMergeBlock - 1) / kRowsPerMergeBlock;
  gated_ce_merge_kernel<<<static_cast<unsigned>(blocks), kRowsPerMergeBlock * kWarpSize,
                          sizeof(ShardMergeStorage), stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace eaft_ext::cuda
