// The operators on CUDA tensors: checks, allocation, device guard, stream, dtype switch,
// registration.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../tensor_rows.h"
#include "launch.h"

namespace eaft_ext::cuda {
namespace {

using at::Tensor;

ElementType element_type(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": on CUDA, logits must be float32, bfloat16 or float16, got ",
                       logits.scalar_type());
  }
}

Tensor per_row(const char* op, const char* name, const Tensor& tensor, const Tensor& logits) {
  check_per_row(op, name, tensor, logits);
  return tensor.to(at::kFloat).contiguous();
}

// Writes weight * (softmax(logits) - onehot(labels)) into gradient, which may be the logits.
void backward_into(const char* op, const Tensor& gradient, const Tensor& raw_weight,
                   const Tensor& logits, const Tensor& raw_labels, const Tensor& raw_row_max,
                   const Tensor& raw_log_sum, int64_t ignore_index) {
  check_labels(op, raw_labels, logits);
  const Tensor labels = raw_labels.to(at::kLong).contiguous();
  const Tensor weight = per_row(op, "weight", raw_weight, logits);
  const Tensor row_max = per_row(op, "row_max", raw_row_max, logits);
  const Tensor log_sum = per_row(op, "log_sum", raw_log_sum, logits);
  BackwardArguments arguments{};
  arguments.logits = logits.const_data_ptr();
  arguments.gradient = gradient.mutable_data_ptr();
  arguments.logits_layout = row_layout(logits);
  arguments.gradient_layout = row_layout(gradient);
  arguments.weight = weight.const_data_ptr<float>();
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.row_max = row_max.const_data_ptr<float>();
  arguments.log_sum = log_sum.const_data_ptr<float>();
  arguments.vocab_size = logits.size(-1);
  arguments.num_rows = logits.numel() / arguments.vocab_size;
  arguments.ignore_index = ignore_index;
  C10_CUDA_CHECK(launch_gated_ce_backward(element_type(op, logits), arguments,
                                          c10::cuda::getCurrentCUDAStream()));
}

Tensor gated_ce_backward_cuda(const Tensor& weight, const Tensor& logits, const Tensor& labels,
                              const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index) {
  const char* op = "gated_ce_backward";
  check_logits(op, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  return write_gradient_like(logits, [&](const Tensor& source, const Tensor& target) {
    backward_into(op, target, weight, source, labels, row_max, log_sum, ignore_index);
  });
}

void gated_ce_backward_cuda_(const Tensor& weight, Tensor& logits, const Tensor& labels,
                             const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index) {
  const char* op = "gated_ce_backward_";
  check_logits(op, logits);
  check_writable(op, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  backward_into(op, logits, weight, logits, labels, row_max, log_sum, ignore_index);
  mark_written(logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(eaft_ext, CUDA, m) {
  m.impl("gated_ce_backward", &gated_ce_backward_cuda);
  m.impl("gated_ce_backward_", &gated_ce_backward_cuda_);
}

}  // namespace eaft_ext::cuda
