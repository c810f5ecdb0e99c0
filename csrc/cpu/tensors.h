// Between tensors and the rows and numbers that the CPU kernels work on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../tensor_rows.h"
#include "element_types.h"
#include "row_kernels.h"

namespace eaft_ext::cpu {

using at::Tensor;

// Calls body with a null pointer of the kernels' element type for the tensor's dtype.
template <typename Body>
void dispatch_element(const char* op, const Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return body(static_cast<float*>(nullptr));
    case at::kDouble:
      return body(static_cast<double*>(nullptr));
    case at::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case at::kHalf:
      return body(static_cast<Half*>(nullptr));
    default:
      TORCH_CHECK_TYPE(false, op, ": logits must be float32, bfloat16, float16 or float64, got ",
                       logits.scalar_type());
  }
}

inline at::ScalarType stats_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The rows of a tensor to be read, or, with an Element that is not const, to be written.
template <typename Element>
Rows<Element> rows_of(const Tensor& tensor, const TokenLoss& loss = {}) {
  using Real = typename Rows<Element>::Real;
  Element* data;
  if constexpr (std::is_const_v<Element>) {
    data = static_cast<Element*>(tensor.const_data_ptr());
  } else {
    data = static_cast<Element*>(tensor.mutable_data_ptr());
  }
  const LogitMap<Real> of_real{static_cast<Real>(loss.map.scale), static_cast<Real>(loss.map.cap)};
  return {data,
          row_layout(tensor),
          tensor.numel() / tensor.size(-1),
          tensor.size(-1),
          of_real,
          loss.label_smoothing != 0,
          loss.sums_entropy()};
}

// int64 and contiguous; every label is in [0, V) or ignored.
inline Tensor checked_labels(const char* op, const Tensor& labels, const Tensor& logits,
                             int64_t ignore_index) {
  const Tensor result = int64_labels(op, labels, logits);
  const int64_t* label = result.const_data_ptr<int64_t>();
  const int64_t vocab_size = logits.size(-1);
  for (int64_t row = 0; row < result.numel(); ++row) {
    if (label[row] == ignore_index || (label[row] >= 0 && label[row] < vocab_size)) continue;
    std::vector<int64_t> position(labels.dim());
    int64_t rest = row;
    for (int64_t d = labels.dim() - 1; d >= 0; --d) {
      position[d] = rest % labels.size(d);
      rest /= labels.size(d);
    }
    TORCH_CHECK_VALUE(false, op, ": the label at position ", c10::IntArrayRef(position), " is ",
                      label[row], ", outside [0, ", vocab_size, ") and not ignore_index ",
                      ignore_index);
  }
  return result;
}

inline Tensor per_row(const char* op, const char* name, const Tensor& tensor,
                      const Tensor& logits) {
  check_per_row(op, name, tensor, logits);
  return tensor.to(stats_dtype(logits)).contiguous();
}

// The outputs of the forward, one number a row each. Zero is what an ignored row has.
struct Stats {
  Tensor loss, nll, entropy, gate, row_max, log_sum;
  Tensor extra;  // (num_extra, ...)

  Stats(const Tensor& logits, int64_t num_extra) {
    const auto sizes = logits.sizes().slice(0, logits.dim() - 1);
    const auto options = logits.options().dtype(stats_dtype(logits));
    for (Tensor* stat : {&loss, &nll, &entropy, &gate, &row_max, &log_sum}) {
      *stat = at::zeros(sizes, options);
    }
    extra = at::zeros(extra_sizes(logits, num_extra), options);
  }

  template <typename Real>
  void write(int64_t row, const TokenStats<double>& token) const {
    loss.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.loss);
    nll.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.nll);
    entropy.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.entropy);
    gate.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.gate);
    row_max.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.row_max);
    log_sum.mutable_data_ptr<Real>()[row] = static_cast<Real>(token.log_sum);
    auto* const others = extra.mutable_data_ptr<Real>();
    for (int i = 0; i < extra.size(0); ++i) {
      others[i * loss.numel() + row] = static_cast<Real>(extra_stat(token, i));
    }
  }
};

// Arguments of a forward, checked once.
struct ForwardArguments {
  Tensor logits;  // rows readable as they lie
  Tensor labels;  // int64, contiguous
  TokenLoss loss;

  ForwardArguments(const char* op, const Tensor& raw_logits, const Tensor& raw_labels,
                   const TokenLoss& raw_loss) {
    check_logits(op, raw_logits);
    logits = with_readable_rows(raw_logits);
    labels = checked_labels(op, raw_labels, raw_logits, raw_loss.ignore_index);
    loss = for_vocab(raw_loss, logits.size(-1));
  }
};

}  // namespace eaft_ext::cpu
