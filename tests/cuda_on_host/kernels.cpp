// The launches of csrc/cuda's kernels on the host: what its .cu files do on a device.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/gated_ce_backward.cuh"
#include "cuda/gated_ce_forward.cuh"
#include "cuda/gated_ce_forward_with_grad.cuh"
#include "cuda/gated_ce_merge.cuh"
#include "cuda/gated_ce_partial.cuh"
#include "cuda/parts.h"
#include "cuda/scale_gradient.cuh"
#include "cuda/topk.cuh"
#include "exports.h"

namespace eaft_ext::cuda {
namespace {

using cuda_on_host::launch;

// As in the .cu files.
constexpr int kThreads = 256;
constexpr int kFewThreads = 128;  // for short rows

// function(Element{}) for the element type.
template <typename Function>
std::string for_element(ElementType type, const Function& function) {
  switch (type) {
    case ElementType::kFloat32:
      return function(float{});
    case ElementType::kBFloat16:
      return function(__nv_bfloat16{});
    case ElementType::kFloat16:
      return function(__half{});
  }
  return "no element type";
}

// The parts of all rows, cut at multiples of 128 bytes, and a poisoned workspace for them.
template <typename Element, typename Key>
class Parts {
 public:
  Parts(const LogitsArguments& logits, int wanted, int k, bool with_sums) {
    constexpr int kLine = 128 / sizeof(Element);
    const int vocab_size = static_cast<int>(logits.vocab_size);
    const int part = (vocab_size + wanted - 1) / wanted;
    parts_.length = std::min((part + kLine - 1) / kLine * kLine, vocab_size);
    parts_.count = (vocab_size + parts_.length - 1) / parts_.length;
    const size_t bytes = lay_out_parts(&parts_, logits.num_rows, k, with_sums, nullptr);
    guard_begin_ = (bytes + sizeof(uint4) - 1) / sizeof(uint4);
    workspace_.assign(guard_begin_ + kGuard, make_uint4(~0u, ~0u, ~0u, ~0u));
    for (size_t i = guard_begin_; i < workspace_.size(); ++i) workspace_[i].x = 7;
    lay_out_parts(&parts_, logits.num_rows, k, with_sums, workspace_.data());
  }
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  const RowParts<Key>& operator*() const { return parts_; }
  int count() const { return parts_.count; }

  // The error of a launch, or that it wrote behind the workspace.
  std::string check(const std::string& error) const {
    const bool intact = std::all_of(workspace_.begin() + guard_begin_, workspace_.end(),
                                    [](const uint4& v) { return v.x == 7 && v.w == ~0u; });
    return error.empty() && !intact ? "the kernel wrote behind the workspace of the parts" : error;
  }

 private:
  static constexpr size_t kGuard = 64;
  RowParts<Key> parts_{};
  std::vector<uint4> workspace_;
  size_t guard_begin_ = 0;
};

template <typename Element, int kBlockThreads, typename Arguments>
std::string run_forward_kernel(const Arguments& arguments, const RowParts<uint32_t>& parts,
                               uint64_t seed) {
  return launch<gated_ce_forward_kernel<Element, kBlockThreads, Arguments>>(
      {arguments.logits.num_rows * parts.count, 1, kBlockThreads,
       sizeof(ForwardStorage<kBlockThreads>)},
      seed, arguments, parts);
}

// As launch_forward_rows().
template <typename Arguments>
std::string run_forward_rows(ElementType type, const Arguments& arguments, int wanted_parts,
                             uint64_t seed) {
  const int64_t num_rows = arguments.logits.num_rows;
  if (num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    const Parts<Element, uint32_t> parts(arguments.logits, wanted_parts, arguments.k, true);
    constexpr int kShortRow = kFewThreads * kVectorsPerThread * kVectorSize<Element>;
    const bool few_threads = arguments.logits.vocab_size <= kShortRow;
    const std::string error =
        parts.check(few_threads ? run_forward_kernel<Element, kFewThreads>(arguments, *parts, seed)
                                : run_forward_kernel<Element, kThreads>(arguments, *parts, seed));
    if (!error.empty() || parts.count() == 1) return error;
    return parts.check(launch<gated_ce_forward_merge_kernel<Element, Arguments>>(
        {num_rows, 1, kMergeThreads, sizeof(MergeStorage)}, seed, arguments, *parts));
  });
}

}  // namespace

std::string run_forward(ElementType type, const ForwardArguments& arguments, int parts,
                        uint64_t seed) {
  return run_forward_rows(type, arguments, parts, seed);
}

std::string run_partial(ElementType type, const PartialArguments& arguments, int parts,
                        uint64_t seed) {
  return run_forward_rows(type, arguments, parts, seed);
}

std::string run_merge(const MergeArguments& arguments, uint64_t seed) {
  const int64_t blocks = (arguments.num_rows + kRowsPerMergeBlock - 1) / kRowsPerMergeBlock;
  if (blocks == 0) return {};
  return launch<gated_ce_merge_kernel>(
      {blocks, 1, kRowsPerMergeBlock * kWarpSize, sizeof(ShardMergeStorage)}, seed, arguments);
}

std::string run_backward(ElementType type, const BackwardArguments& arguments, uint64_t seed) {
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    using Traits = BackwardTraits<Element>;
    const int64_t items =
        arguments.logits.num_rows * Traits::num_parts(arguments.logits.vocab_size);
    if (items == 0) return std::string();
    return launch<gated_ce_backward_kernel<Element>>({items, 1, Traits::kThreads, 0}, seed,
                                                     arguments);
  });
}

std::string run_forward_with_grad(ElementType type, const ForwardWithGradArguments& arguments,
                                  int cluster_size, uint64_t seed) {
  const LogitsArguments& logits = arguments.forward.logits;
  if (logits.num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    if (cluster_size == 0) {
      // Few blocks, that take one row after the other.
      const int64_t grid = std::min<int64_t>(logits.num_rows, 1 + static_cast<int64_t>(seed % 4));
      return launch<gated_ce_forward_with_grad_cached_kernel<Element, kCachedThreads>>(
          {grid, 1, kCachedThreads, sizeof(ForwardWithGradStorage<kCachedThreads>)}, seed,
          arguments);
    }
    constexpr int kLine = 128 / sizeof(Element);
    const int wanted = (static_cast<int>(logits.vocab_size) + cluster_size - 1) / cluster_size;
    const int slice = (wanted + kLine - 1) / kLine * kLine;
    return launch<gated_ce_forward_with_grad_staged_kernel<Element, kStagedThreads>>(
        {logits.num_rows * cluster_size, cluster_size, kStagedThreads,
         kSliceOffset<kStagedThreads> + slice * sizeof(Element)},
        seed, arguments, slice);
  });
}

std::string run_scale_gradient(ElementType type, const ScaleGradientArguments& arguments,
                               uint64_t seed) {
  if (arguments.num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    // Few blocks, that take one part after the other.
    const int64_t grid = 1 + static_cast<int64_t>(seed % 4);
    return launch<scale_gradient_kernel<Element>>({grid, 1, BackwardTraits<Element>::kThreads, 0},
                                                  seed, arguments);
  });
}

std::string run_topk(ElementType type, const TopKArguments& arguments, int wanted_parts,
                     uint64_t seed) {
  const int64_t num_rows = arguments.logits.num_rows;
  if (num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    const Parts<Element, uint64_t> parts(arguments.logits, wanted_parts, arguments.k, false);
    const std::string error = parts.check(launch<topk_kernel<Element>>(
        {num_rows * parts.count(), 1, kTopKThreads, sizeof(TopKStorage)}, seed, arguments, *parts));
    if (!error.empty() || parts.count() == 1) return error;
    return parts.check(launch<topk_merge_kernel<Element>>(
        {num_rows, 1, kTopKThreads, sizeof(TopKStorage)}, seed, arguments, *parts));
  });
}

}  // namespace eaft_ext::cuda
