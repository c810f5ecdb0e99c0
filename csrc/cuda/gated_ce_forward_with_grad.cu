#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "dispatch.h"
#include "gated_ce_forward_with_grad.cuh"
#include "launch.h"

namespace eaft_ext::cuda {
namespace {

constexpr int kLeastBlocks = 2;  // of a multiprocessor: fewer never load while another writes

struct DeviceLimits {
  int device = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;  // of a block
  int l2_bytes = 0;
};

cudaError_t ask_device(DeviceLimits* limits) {
  if (const cudaError_t error = cudaGetDevice(&limits->device)) return error;
  const std::pair<int*, cudaDeviceAttr> questions[] = {
      {&limits->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&limits->l2_bytes, cudaDevAttrL2CacheSize},
  };
  for (const auto& [answer, attribute] : questions) {
    if (const cudaError_t error = cudaDeviceGetAttribute(answer, attribute, limits->device)) {
      return error;
    }
  }
  return cudaSuccess;
}

// What a launch with clusters needs, kept alive together.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(const ForwardWithGradPlan& plan, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.cluster_size;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(plan.grid);
    config.blockDim = dim3(kStagedThreads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

// A row in the shared memory of as few blocks as leave room for kStagedBlocks on a multiprocessor,
// of more where rows are few. Leaves the plan as it is where that cannot be.
template <typename Element, typename Loss>
cudaError_t plan_shared_memory(const DeviceLimits& limits, const LogitsArguments& logits,
                               ForwardWithGradPlan* plan) {
  const auto kernel = gated_ce_forward_with_grad_staged_kernel<Element, kStagedThreads, Loss>;
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  // Also on a newer device: code compiled for an older one has no bulk copies and no clusters.
  if (attributes.ptxVersion < 90) return cudaSuccess;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes)) {
    return error;
  }
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) {
    return error;
  }
  constexpr int kLine = 128 / sizeof(Element);
  int best_blocks = kLeastBlocks - 1;
  for (int size = 1; size <= kMaxClusterSize; size *= 2) {
    ForwardWithGradPlan tried;
    tried.home = RowHome::kSharedMemory;
    tried.cluster_size = size;
    const int64_t wanted = (logits.vocab_size + size - 1) / size;
    tried.span_length = static_cast<int>((wanted + kLine - 1) / kLine * kLine);
    tried.shared_bytes = kStagedOffset<kStagedThreads, Loss> + tried.span_length * sizeof(Element);
    if (tried.shared_bytes > static_cast<size_t>(limits.shared_bytes)) continue;
    if (logits.num_rows > INT32_MAX / size) break;
    tried.grid = static_cast<int>(logits.num_rows) * size;
    int blocks = 0;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &blocks, kernel, kStagedThreads, tried.shared_bytes)) {
      return error;
    }
    int clusters = 0;
    ClusterLaunch launch(tried, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess ||
        clusters == 0) {
      cudaGetLastError();  // this device has no room for such clusters
      continue;
    }
    blocks = std::min(blocks, kStagedBlocks);
    const bool fills_device = logits.num_rows >= clusters;
    if (blocks > best_blocks || (blocks == best_blocks && plan->home == RowHome::kSharedMemory &&
                                 logits.num_rows * plan->cluster_size < limits.multiprocessors)) {
      best_blocks = blocks;
      *plan = tried;
    }
    if (blocks == kStagedBlocks && fills_device) break;
  }
  return cudaSuccess;
}

// A row for a block, and both reads and the write of all rows at once within half of L2.
template <typename Element, typename Loss>
cudaError_t plan_l2(const DeviceLimits& limits, const ForwardWithGradArguments& arguments,
                    ForwardWithGradPlan* plan) {
  const LogitsArguments& logits = arguments.forward.logits;
  int blocks = 0;
  plan->home = RowHome::kL2;
  plan->shared_bytes = sizeof(ForwardWithGradStorage<kCachedThreads, Loss>);
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, gated_ce_forward_with_grad_cached_kernel<Element, kCachedThreads, Loss>,
          kCachedThreads, plan->shared_bytes)) {
    return error;
  }
  const bool in_place = arguments.gradient == logits.logits;
  const int64_t row_bytes = logits.vocab_size * int64_t{sizeof(Element)} * (in_place ? 1 : 2);
  const int64_t fitting = std::max<int64_t>(1, limits.l2_bytes / 2 / row_bytes);
  const int64_t resident = int64_t{blocks} * limits.multiprocessors;
  plan->grid = static_cast<int>(std::min({resident, fitting, logits.num_rows}));
  return cudaSuccess;
}

template <typename Element, typename Loss>
cudaError_t make_plan(const DeviceLimits& limits, const ForwardWithGradArguments& arguments,
                      ForwardWithGradPlan* plan) {
  const LogitsArguments& logits = arguments.forward.logits;
  *plan = {};
  const int64_t bytes = logits.num_rows * logits.vocab_size * int64_t{sizeof(Element)};
  if (logits.num_rows * kMaxClusterSize < limits.multiprocessors && bytes <= limits.l2_bytes / 2) {
    plan->home = RowHome::kTwoKernels;
    return cudaSuccess;
  }
  const cudaError_t error = plan_shared_memory<Element, Loss>(limits, logits, plan);
  if (error != cudaSuccess || plan->home == RowHome::kSharedMemory) return error;
  if (const cudaError_t l2_error = plan_l2<Element, Loss>(limits, arguments, plan)) return l2_error;
  // Where so few rows fit that most of the device would idle, two passes of all of it are faster.
  if (2 * plan->grid < std::min<int64_t>(logits.num_rows, limits.multiprocessors)) {
    plan->home = RowHome::kTwoKernels;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t plan_gated_ce_forward_with_grad(ElementType type,
                                            const ForwardWithGradArguments& arguments,
                                            ForwardWithGradPlan* plan) {
  // Asking the device takes longer than a launch, and shapes repeat.
  using Shape = std::tuple<int, ElementType, CompiledLoss, int64_t, int64_t, bool>;
  static std::mutex mutex;
  static std::map<Shape, ForwardWithGradPlan> plans;
  constexpr size_t kMaxPlans = 4096;

  const LogitsArguments& logits = arguments.forward.logits;
  DeviceLimits limits;
  if (const cudaError_t error = cudaGetDevice(&limits.device)) return error;
  const Shape shape{limits.device,
                    type,
                    compiled_loss(arguments.forward.loss),
                    logits.num_rows,
                    logits.vocab_size,
                    arguments.gradient == logits.logits};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto known = plans.find(shape); known != plans.end()) {
    *plan = known->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = ask_device(&limits)) return error;
  const cudaError_t error =
      dispatch_forward(type, arguments.forward.loss, [&](auto element, auto loss) {
        return make_plan<decltype(element), decltype(loss)>(limits, arguments, plan);
      });
  if (error != cudaSuccess) return error;
  if (plans.size() == kMaxPlans) plans.clear();
  plans[shape] = *plan;
  return cudaSuccess;
}

cudaError_t launch_gated_ce_forward_with_grad(ElementType type,
                                              const ForwardWithGradArguments& arguments,
                                              const ForwardWithGradPlan& plan,
                                              cudaStream_t stream) {
  return dispatch_forward(type, arguments.forward.loss, [&](auto element, auto loss) {
    using Element = decltype(element);
    using Loss = decltype(loss);
    if (arguments.forward.logits.num_rows == 0) return cudaSuccess;
    if (plan.home == RowHome::kSharedMemory) {
      ClusterLaunch launch(plan, stream);
      return cudaLaunchKernelEx(
          &launch.config, gated_ce_forward_with_grad_staged_kernel<Element, kStagedThreads, Loss>,
          arguments, plan.span_length);
    }
    gated_ce_forward_with_grad_cached_kernel<Element, kCachedThreads, Loss>
        <<<plan.grid, kCachedThreads, plan.shared_bytes, stream>>>(arguments);
    return cudaGetLastError();
  });
}

}  // namespace eaft_ext::cuda
