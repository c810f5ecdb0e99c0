// The launches of csrc/cuda's kernels on the host: what its .cu files do on a device.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/compiled_loss.h"
#include "cuda/gated_ce_backward.cuh"
#include "cuda/gated_ce_forward.cuh"
#include "cuda/gated_ce_forward_with_grad.cuh"
#include "cuda/gated_ce_merge.cuh"
#include "cuda/gated_ce_partial.cuh"
#include "cuda/scale_gradient.cuh"
#include "cuda/split.h"
#include "cuda/topk.cuh"
#include "exports.h"
#include "global_memory.h"

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

// function(Element{}, PlainLoss or FamilyLoss), as dispatch_backward().
template <typename Function>
std::string for_backward(ElementType type, const TokenLoss& loss, const Function& function) {
  return for_element(type, [&](auto element) {
    return loss.is_plain() ? function(element, PlainLoss(loss))
                           : function(element, FamilyLoss(loss));
  });
}

// function(Element{}, one of the three losses), as dispatch_forward().
template <typename Function>
std::string for_forward(ElementType type, const TokenLoss& loss, const Function& function) {
  return for_element(type, [&](auto element) {
    switch (compiled_loss(loss)) {
      case CompiledLoss::kPlain:
        return function(element, PlainLoss(loss));
      case CompiledLoss::kExact:
        return function(element, ExactLoss(loss));
      default:
        return function(element, FamilyLoss(loss));
    }
  });
}

// The split of all rows into spans, cut at multiples of 128 bytes, and a poisoned workspace for it.
template <typename Element, typename Key>
class Split {
 public:
  Split(const LogitsArguments& logits, int wanted, int k, bool with_sums) {
    constexpr int kLine = 128 / sizeof(Element);
    const int vocab_size = static_cast<int>(logits.vocab_size);
    const int length = (vocab_size + wanted - 1) / wanted;
    split_.span_length = std::min((length + kLine - 1) / kLine * kLine, vocab_size);
    split_.num_spans = (vocab_size + split_.span_length - 1) / split_.span_length;
    const size_t bytes = lay_out_split(&split_, logits.num_rows, k, with_sums, nullptr);
    const size_t vectors = (bytes + sizeof(uint4) - 1) / sizeof(uint4);
    workspace_.assign(kAlignment + vectors + kGuard, make_uint4(~0u, ~0u, ~0u, ~0u));
    const size_t misaligned =
        reinterpret_cast<uintptr_t>(workspace_.data()) / sizeof(uint4) % kAlignment;
    uint4* const begin = workspace_.data() + (kAlignment - misaligned);
    guard_begin_ = static_cast<size_t>(begin - workspace_.data()) + vectors;
    for (size_t i = guard_begin_; i < workspace_.size(); ++i) workspace_[i].x = 7;
    lay_out_split(&split_, logits.num_rows, k, with_sums, begin);
    cuda_on_host::global_memory.add(begin, bytes, true);
  }
  Split(const Split&) = delete;
  Split& operator=(const Split&) = delete;

  const RowSplit<Key>& operator*() const { return split_; }
  int num_spans() const { return split_.num_spans; }

  // The error of a launch, or that it wrote behind the workspace.
  std::string check(const std::string& error) const {
    const bool intact = std::all_of(workspace_.begin() + guard_begin_, workspace_.end(),
                                    [](const uint4& v) { return v.x == 7 && v.w == ~0u; });
    return error.empty() && !intact ? "the kernel wrote behind the workspace of the split" : error;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr size_t kAlignment = 16;  // vectors: as a device's allocator has it at least
  RowSplit<Key> split_{};
  std::vector<uint4> workspace_;
  size_t guard_begin_ = 0;
};

template <typename Element, int kBlockThreads, typename Loss, typename Arguments>
std::string run_forward_kernel(const Arguments& arguments, const RowSplit<uint32_t>& split,
                               uint64_t seed) {
  return launch<gated_ce_forward_kernel<Element, kBlockThreads, Loss, Arguments>>(
      {arguments.logits.num_rows * split.num_spans, 1, kBlockThreads,
       sizeof(ForwardStorage<kBlockThreads, Loss>)},
      seed, arguments, split);
}

// As launch_forward_rows().
template <typename Arguments>
std::string run_forward_rows(ElementType type, const Arguments& arguments, int num_spans,
                             uint64_t seed) {
  const int64_t num_rows = arguments.logits.num_rows;
  if (num_rows == 0) return {};
  return for_forward(type, arguments.loss, [&](auto element, auto loss) {
    using Element = decltype(element);
    using Loss = decltype(loss);
    const Split<Element, uint32_t> split(arguments.logits, num_spans, arguments.loss.k, true);
    constexpr int kShortRow = kFewThreads * kVectorsPerThread * kVectorSize<Element>;
    const bool few_threads = arguments.logits.vocab_size <= kShortRow;
    const std::string error = split.check(
        few_threads ? run_forward_kernel<Element, kFewThreads, Loss>(arguments, *split, seed)
                    : run_forward_kernel<Element, kThreads, Loss>(arguments, *split, seed));
    if (!error.empty() || split.num_spans() == 1) return error;
    return split.check(launch<gated_ce_forward_combine_kernel<Element, Loss, Arguments>>(
        {num_rows, 1, kCombineThreads, sizeof(CombineStorage)}, seed, arguments, *split));
  });
}

}  // namespace

std::string run_forward(ElementType type, const ForwardArguments& arguments, int num_spans,
                        uint64_t seed) {
  return run_forward_rows(type, arguments, num_spans, seed);
}

std::string run_partial(ElementType type, const PartialArguments& arguments, int num_spans,
                        uint64_t seed) {
  return run_forward_rows(type, arguments, num_spans, seed);
}

std::string run_merge(const MergeArguments& arguments, uint64_t seed) {
  const int64_t blocks = (arguments.num_rows + kRowsPerMergeBlock - 1) / kRowsPerMergeBlock;
  if (blocks == 0) return {};
  return launch<gated_ce_merge_kernel>(
      {blocks, 1, kRowsPerMergeBlock * kWarpSize, sizeof(ShardMergeStorage)}, seed, arguments);
}

std::string run_backward(ElementType type, const BackwardArguments& arguments, uint64_t seed) {
  return for_backward(type, arguments.loss, [&](auto element, auto loss) {
    using Element = decltype(element);
    using Traits = BackwardTraits<Element>;
    const int64_t items =
        arguments.logits.num_rows * Traits::num_spans(arguments.logits.vocab_size);
    if (items == 0) return std::string();
    return launch<gated_ce_backward_kernel<Element, decltype(loss)>>(
        {items, 1, Traits::kThreads, 0}, seed, arguments);
  });
}

std::string run_forward_with_grad(ElementType type, const ForwardWithGradArguments& arguments,
                                  int cluster_size, uint64_t seed) {
  const LogitsArguments& logits = arguments.forward.logits;
  if (logits.num_rows == 0) return {};
  return for_forward(type, arguments.forward.loss, [&](auto element, auto loss) {
    using Element = decltype(element);
    using Loss = decltype(loss);
    if (cluster_size == 0) {
      // Few blocks, that take one row after the other.
      const int64_t grid = std::min<int64_t>(logits.num_rows, 1 + static_cast<int64_t>(seed % 4));
      return launch<gated_ce_forward_with_grad_cached_kernel<Element, kCachedThreads, Loss>>(
          {grid, 1, kCachedThreads, sizeof(ForwardWithGradStorage<kCachedThreads, Loss>)}, seed,
          arguments);
    }
    constexpr int kLine = 128 / sizeof(Element);
    const int wanted = (static_cast<int>(logits.vocab_size) + cluster_size - 1) / cluster_size;
    const int span_length = (wanted + kLine - 1) / kLine * kLine;
    return launch<gated_ce_forward_with_grad_staged_kernel<Element, kStagedThreads, Loss>>(
        {logits.num_rows * cluster_size, cluster_size, kStagedThreads,
         kStagedOffset<kStagedThreads, Loss> + span_length * sizeof(Element)},
        seed, arguments, span_length);
  });
}

std::string run_scale_gradient(ElementType type, const ScaleGradientArguments& arguments,
                               uint64_t seed) {
  if (arguments.num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    // Few blocks, that take one span after the other.
    const int64_t grid = 1 + static_cast<int64_t>(seed % 4);
    return launch<scale_gradient_kernel<Element>>({grid, 1, BackwardTraits<Element>::kThreads, 0},
                                                  seed, arguments);
  });
}

std::string run_topk(ElementType type, const TopKArguments& arguments, int num_spans,
                     uint64_t seed) {
  const int64_t num_rows = arguments.logits.num_rows;
  if (num_rows == 0) return {};
  return for_element(type, [&](auto element) {
    using Element = decltype(element);
    const Split<Element, uint64_t> split(arguments.logits, num_spans, arguments.k, false);
    const std::string error = split.check(launch<topk_kernel<Element>>(
        {num_rows * split.num_spans(), 1, kTopKThreads, sizeof(TopKStorage)}, seed, arguments,
        *split));
    if (!error.empty() || split.num_spans() == 1) return error;
    return split.check(launch<topk_combine_kernel<Element>>(
        {num_rows, 1, kTopKThreads, sizeof(TopKStorage)}, seed, arguments, *split));
  });
}

}  // namespace eaft_ext::cuda
