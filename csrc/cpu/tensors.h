// Between tensors and the rows and numbers that the CPU kernels work on.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../stable_torch.h"
#include "../tensor_rows.h"
#include "element_types.h"
#include "row_kernels.h"

namespace eaft_ext::cpu {

// Calls body with a null pointer of the kernels' element type for the tensor's dtype.
template <typename Body>
void dispatch_element(const char* op, const Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<Half*>(nullptr));
    default:
      fail(op, ": logits must be float32, bfloat16, float16 or float64, got ",
           logits.scalar_type());
  }
}

inline ScalarType stats_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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
    fail(op, ": the label at position ", position, " is ", label[row], ", outside [0, ", vocab_size,
         ") and not ignore_index ", ignore_index);
  }
  return result;
}

inline Tensor per_row(const char* op, const char* name, const Tensor& tensor,
                      const Tensor& logits) {
  return eaft_ext::per_row(op, name, tensor, logits, stats_dtype(logits));
}

// Where the outputs of the forward are written, row by row.
template <typename Real>
struct StatsOfRows {
  std::array<Real*, 6> stats;
  Real* extra;
  int num_extra;
  int64_t num_rows;

  void write(int64_t row, const TokenStats<double>& token) const {
    const std::array<double, 6> values = {token.loss, token.nll,     token.entropy,
                                          token.gate, token.row_max, token.log_sum};
    for (size_t i = 0; i < values.size(); ++i) stats[i][row] = static_cast<Real>(values[i]);
    for (int i = 0; i < num_extra; ++i) {
      extra[i * num_rows + row] = static_cast<Real>(extra_stat(token, i));
    }
  }
};

// Zero is what an ignored row has.
struct Stats : StatTensors {
  Stats(const Tensor& logits, int64_t num_extra)
      : StatTensors(logits, num_extra, [&](Sizes sizes) {
          return zeros_on_host(sizes, stats_dtype(logits), logits);
        }) {}

  template <typename Real>
  StatsOfRows<Real> of_rows() const {
    const auto data = [](const Tensor& stat) { return stat.mutable_data_ptr<Real>(); };
    return {{data(loss), data(nll), data(entropy), data(gate), data(row_max), data(log_sum)},
            data(extra),
            static_cast<int>(extra.size(0)),
            loss.numel()};
  }
};

// Arguments of a forward, checked once.
struct ForwardArguments {
  Tensor logits;  // rows readable as they lie
  Tensor labels;  // int64, contiguous
  TokenLoss loss;

  ForwardArguments(const char* op, const Tensor& raw_logits, const Tensor& raw_labels,
                   const TokenLoss& raw_loss)
      : logits(checked(op, raw_logits)),
        labels(checked_labels(op, raw_labels, raw_logits, raw_loss.ignore_index)),
        loss(for_vocab(raw_loss, logits.size(-1))) {}

 private:
  static Tensor checked(const char* op, const Tensor& logits) {
    check_logits(op, logits);
    return with_readable_rows(logits);
  }
};

}  // namespace eaft_ext::cpu
