// The operators on CUDA tensors: checks, allocation, device guard, stream, registration.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "../stable_torch.h"
#include "../tensor_rows.h"
#include "launch.h"
#include "tensors.h"

namespace eaft_ext::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

void run_forward(const CheckedForward& forward) {
  SplitPlan plan;
  STD_CUDA_CHECK(plan_gated_ce_forward(forward.type, forward.arguments, &plan));
  const Tensor workspace = make_workspace(forward.logits, plan.workspace_bytes);
  STD_CUDA_CHECK(launch_gated_ce_forward(forward.type, forward.arguments, plan,
                                         workspace.mutable_data_ptr(),
                                         current_stream(forward.logits)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_cuda(
    const Tensor& logits, const Tensor& labels, int64_t k, StringHandle gate,
    const std::vector<double>& gate_parameters, int64_t ignore_index, bool inplace_backward,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  check_logits(op, logits);
  const DeviceGuard guard(logits.get_device_index());
  // Said before the work is done, not in the backward.
  if (inplace_backward) check_writable(op, logits);
  const Stats stats(logits, num_extra);
  const CheckedForward forward(op, logits, labels, loss, stats);
  run_forward(forward);
  return {stats.loss,    stats.nll,     stats.entropy, stats.gate,
          stats.row_max, stats.log_sum, stats.extra};
}

// Writes the gradient of the logits, which may be written over.
void backward_into(const char* op, const Tensor& gradient, const Tensor& logits,
                   const RowsOfBackward& given, int64_t vocab_start) {
  const Tensor labels = int64_labels(op, given.labels, logits);
  const Tensor weight = per_row(op, "weight", given.weight, logits);
  const Tensor row_max = per_row(op, "row_max", given.row_max, logits);
  const Tensor log_sum = per_row(op, "log_sum", given.log_sum, logits);
  // Without a z-loss it is not looked at.
  const bool has_z_loss = given.loss.z_loss != 0;
  const Tensor upstream = has_z_loss ? per_row(op, "upstream", *given.upstream, logits) : weight;
  BackwardArguments arguments{};
  arguments.logits = logits_arguments(op, logits);
  arguments.vocab_start = vocab_start;
  arguments.gradient = gradient.mutable_data_ptr();
  arguments.gradient_layout = row_layout(gradient);
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.loss = given.loss;
  arguments.weight = weight.const_data_ptr<float>();
  arguments.upstream = has_z_loss ? upstream.const_data_ptr<float>() : nullptr;
  arguments.row_max = row_max.const_data_ptr<float>();
  arguments.log_sum = log_sum.const_data_ptr<float>();
  STD_CUDA_CHECK(
      launch_gated_ce_backward(element_type(op, logits), arguments, current_stream(logits)));
}

Tensor gated_ce_backward_cuda(const Tensor& weight, const Tensor& logits, const Tensor& labels,
                              const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index,
                              std::optional<int64_t> vocab_start, std::optional<int64_t> vocab_size,
                              const std::optional<Tensor>& upstream,
                              const std::vector<double>& family, std::optional<int64_t> num_words) {
  const char* op = "gated_ce_backward";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  const RowsOfBackward rows = checked_rows(
      op, {weight, labels, row_max, log_sum, upstream, checked_family(op, ignore_index, family)},
      logits, num_words);
  const DeviceGuard guard(logits.get_device_index());
  return write_gradient_like(logits, [&](const Tensor& source, const Tensor& target) {
    shard.clear_padding(target);
    if (shard.num_words == 0) return;
    backward_into(op, shard.words(target), shard.words(source), rows, shard.start);
  });
}

void gated_ce_backward_cuda_(const Tensor& weight, Tensor& logits, const Tensor& labels,
                             const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index,
                             std::optional<int64_t> vocab_start, std::optional<int64_t> vocab_size,
                             const std::optional<Tensor>& upstream,
                             const std::vector<double>& family, std::optional<int64_t> num_words) {
  const char* op = "gated_ce_backward_";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  const RowsOfBackward rows = checked_rows(
      op, {weight, labels, row_max, log_sum, upstream, checked_family(op, ignore_index, family)},
      logits, num_words);
  if (logits.size(-1) == 0) return;
  check_writable(op, logits);
  const DeviceGuard guard(logits.get_device_index());
  shard.clear_padding(logits);
  if (shard.num_words > 0) {
    const Tensor words = shard.words(logits);
    backward_into(op, words, words, rows, shard.start);
  }
  mark_written(logits);
}

Tensor gated_ce_partial_cuda(const Tensor& logits, const Tensor& raw_labels, int64_t k,
                             int64_t vocab_start, std::optional<int64_t> vocab_size,
                             int64_t ignore_index, const std::vector<double>& family,
                             bool tells_entropy) {
  const char* op = "gated_ce_partial";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  check_gate_k(op, k);
  const DeviceGuard guard(logits.get_device_index());
  const ElementType type = element_type(op, logits);
  const Tensor labels = int64_labels(op, raw_labels, logits);
  TokenLoss loss = checked_family(op, ignore_index, family);
  loss.k = static_cast<int>(k);
  loss.tells_entropy = tells_entropy;
  Tensor partials = empty(sizes_of_rows(logits, partial_size(loss)), ScalarType::Float, logits);
  if (shard.num_words == 0) {
    using torch::stable::fill_;
    const auto number = [&](int i) { return torch::stable::select(partials, -1, i); };
    fill_(partials, std::numeric_limits<double>::quiet_NaN());
    copy_into(number(kPartialLabel), labels);
    fill_(number(kPartialRest), -1);
    for (int i = partial_entropy(loss); i < partial_size(loss); ++i) fill_(number(i), 0);
    return partials;
  }
  const Tensor words = with_readable_rows(shard.words(logits));
  PartialArguments arguments{};
  arguments.logits = logits_arguments(op, words);
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.loss = loss;
  arguments.vocab_start = shard.start;
  arguments.partials = partials.mutable_data_ptr<float>();
  SplitPlan plan;
  STD_CUDA_CHECK(plan_gated_ce_partial(type, arguments, &plan));
  const Tensor workspace = make_workspace(words, plan.workspace_bytes);
  STD_CUDA_CHECK(launch_gated_ce_partial(type, arguments, plan, workspace.mutable_data_ptr(),
                                         current_stream(words)));
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_merge_cuda(
    const Tensor& logits, const Tensor& raw_labels, const Tensor& raw_partials, int64_t k,
    StringHandle gate, const std::vector<double>& gate_parameters, int64_t ignore_index,
    int64_t vocab_start, std::optional<int64_t> vocab_size, bool inplace_backward,
    const std::vector<double>& family, std::optional<int64_t> num_words, int64_t num_extra) {
  const char* op = "gated_ce_merge";
  const TokenLoss of_shard =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  checked_shard(op, logits, vocab_start, vocab_size);
  const DeviceGuard guard(logits.get_device_index());
  if (inplace_backward && logits.size(-1) > 0) check_writable(op, logits);
  const Tensor labels = int64_labels(op, raw_labels, logits);
  const TokenLoss loss = for_words(of_shard, checked_num_words(op, num_words, logits));
  check_partials(op, raw_partials, labels, ScalarType::Float, loss);
  const Tensor partials = as_contiguous(raw_partials);
  const Stats stats(logits, num_extra);
  MergeArguments arguments{};
  arguments.partials = partials.const_data_ptr<float>();
  arguments.num_shards = static_cast<int>(partials.size(0));
  arguments.num_rows = labels.numel();
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.loss = loss;
  arguments.stats = stats.pointers();
  STD_CUDA_CHECK(launch_gated_ce_merge(arguments, current_stream(labels)));
  return {stats.loss,    stats.nll,     stats.entropy, stats.gate,
          stats.row_max, stats.log_sum, stats.extra};
}

// The forward into its stats, and the gradient of sum(upstream * loss) into gradient, which may be
// the logits.
void forward_with_grad_into(const char* op, const Tensor& gradient, const Stats& stats,
                            const Tensor& raw_upstream, const CheckedForward& forward) {
  const Tensor& logits = forward.logits;
  const Tensor upstream = per_row(op, "upstream", raw_upstream, logits);
  ForwardWithGradArguments arguments{};
  arguments.forward = forward.arguments;
  arguments.upstream = upstream.const_data_ptr<float>();
  arguments.gradient = gradient.mutable_data_ptr();
  arguments.gradient_layout = row_layout(gradient);
  ForwardWithGradPlan plan;
  STD_CUDA_CHECK(plan_gated_ce_forward_with_grad(forward.type, arguments, &plan));
  if (plan.home == RowHome::kTwoKernels) {
    run_forward(forward);
    const Tensor weight = call_mul("aten::mul", upstream, stats.gate);
    backward_into(
        op, gradient, logits,
        {weight, forward.labels, stats.row_max, stats.log_sum, upstream, forward.arguments.loss},
        0);
    return;
  }
  STD_CUDA_CHECK(
      launch_gated_ce_forward_with_grad(forward.type, arguments, plan, current_stream(logits)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cuda(
    const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t k,
    StringHandle gate, const std::vector<double>& gate_parameters, int64_t ignore_index,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward_with_grad";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  check_logits(op, logits);
  const DeviceGuard guard(logits.get_device_index());
  const Stats stats(logits, num_extra);
  const Tensor gradient =
      write_gradient_like(logits, [&](const Tensor& source, const Tensor& target) {
        const CheckedForward forward(op, source, labels, loss, stats);
        forward_with_grad_into(op, target, stats, upstream, forward);
      });
  return {stats.loss, stats.nll, stats.entropy, stats.gate, stats.extra, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cuda_(
    const Tensor& upstream, Tensor& logits, const Tensor& labels, int64_t k, StringHandle gate,
    const std::vector<double>& gate_parameters, int64_t ignore_index,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward_with_grad_";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  check_logits(op, logits);
  const DeviceGuard guard(logits.get_device_index());
  check_writable(op, logits);
  const Stats stats(logits, num_extra);
  const CheckedForward forward(op, logits, labels, loss, stats);
  forward_with_grad_into(op, logits, stats, upstream, forward);
  mark_written(logits);
  return {stats.loss, stats.nll, stats.entropy, stats.gate, stats.extra};
}

void scale_gradient_cuda_(Tensor& gradient, const Tensor& factor) {
  const char* op = "scale_gradient_";
  check_logits(op, gradient);
  check_size(op, gradient);
  check_writable(op, gradient);
  check_factor(op, factor, gradient);
  const DeviceGuard guard(gradient.get_device_index());
  ScaleGradientArguments arguments{};
  arguments.gradient = gradient.mutable_data_ptr();
  arguments.layout = row_layout(gradient);
  arguments.vocab_size = gradient.size(-1);
  arguments.num_rows = gradient.numel() / arguments.vocab_size;
  arguments.factor = factor.const_data_ptr<float>();
  STD_CUDA_CHECK(
      launch_scale_gradient(element_type(op, gradient), arguments, current_stream(gradient)));
  mark_written(gradient);
}

std::tuple<Tensor, Tensor> topk_cuda(const Tensor& raw_logits, int64_t k) {
  const char* op = "topk";
  check_logits(op, raw_logits);
  check_k(op, k, 1, std::min<int64_t>(kMaxTopK, raw_logits.size(-1)));
  const DeviceGuard guard(raw_logits.get_device_index());
  const ElementType type = element_type(op, raw_logits);
  const Tensor logits = with_readable_rows(raw_logits);
  const auto sizes = sizes_of_rows(logits, k);
  const Tensor values = empty(sizes, logits.scalar_type(), logits);
  const Tensor indices = empty(sizes, ScalarType::Long, logits);
  TopKArguments arguments{};
  arguments.logits = logits_arguments(op, logits);
  arguments.k = static_cast<int>(k);
  arguments.values = values.mutable_data_ptr();
  arguments.indices = indices.mutable_data_ptr<int64_t>();
  SplitPlan plan;
  STD_CUDA_CHECK(plan_topk(type, arguments, &plan));
  const Tensor workspace = make_workspace(logits, plan.workspace_bytes);
  STD_CUDA_CHECK(
      launch_topk(type, arguments, plan, workspace.mutable_data_ptr(), current_stream(logits)));
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaft_ext, CUDA, m) {
  m.impl("gated_ce_forward", TORCH_BOX(&gated_ce_forward_cuda));
  m.impl("gated_ce_backward", TORCH_BOX(&gated_ce_backward_cuda));
  m.impl("gated_ce_backward_", TORCH_BOX(&gated_ce_backward_cuda_));
  m.impl("gated_ce_partial", TORCH_BOX(&gated_ce_partial_cuda));
  m.impl("gated_ce_merge", TORCH_BOX(&gated_ce_merge_cuda));
  m.impl("gated_ce_forward_with_grad", TORCH_BOX(&gated_ce_forward_with_grad_cuda));
  m.impl("gated_ce_forward_with_grad_", TORCH_BOX(&gated_ce_forward_with_grad_cuda_));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_cuda_));
  m.impl("topk", TORCH_BOX(&topk_cuda));
}

}  // namespace eaft_ext::cuda
