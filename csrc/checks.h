// What every device asks of an operator's arguments, in one sentence with the offending values.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "core/limits.h"
#include "core/shard_partial.h"
#include "core/token_loss.h"
#include "core/token_stats.h"
#include "gate_from_name.h"
#include "tensor_rows.h"
#include "vocab_shard.h"

namespace eaft_ext {

inline void check_logits(const char* op, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() >= 1 && logits.size(-1) >= 1, op,
                    ": logits must be (..., V) with V of at least 1, got ", logits.sizes());
}

// Logits of a shard, which may have no columns, or whole ones, where there is no vocab_start.
inline VocabShard checked_shard(const char* op, const at::Tensor& logits,
                                std::optional<int64_t> vocab_start,
                                std::optional<int64_t> vocab_size) {
  if (!vocab_start) check_logits(op, logits);
  TORCH_CHECK_VALUE(logits.dim() >= 1, op, ": logits must be (..., V), got ", logits.sizes());
  TORCH_CHECK_VALUE(!vocab_start || *vocab_start >= 0, op, ": vocab_start must be at least 0, got ",
                    vocab_start.value_or(0));
  return VocabShard(logits, vocab_start, vocab_size);
}

// The partials of all shards.
inline void check_partials(const char* op, const at::Tensor& partials, const at::Tensor& labels,
                           at::ScalarType dtype, const TokenLoss& loss) {
  const bool fits = partials.dim() == labels.dim() + 2 && partials.size(0) >= 1 &&
                    partials.size(-1) == partial_size(loss) &&
                    partials.sizes().slice(1, labels.dim()) == labels.sizes();
  TORCH_CHECK_VALUE(fits, op, ": partials must be (num_shards, ..., ", partial_size(loss),
                    ") with k = ", loss.k, ", got ", partials.sizes(), " for labels ",
                    labels.sizes());
  TORCH_CHECK_VALUE(partials.scalar_type() == dtype && partials.device() == labels.device(), op,
                    ": partials must be ", dtype, " on ", labels.device(), ", got ",
                    partials.scalar_type(), " on ", partials.device());
}

// A tensor of one number for each row of the logits, on their device.
inline void check_per_row(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.sizes() == logits.sizes().slice(0, logits.dim() - 1), op, ": ", name,
                    " must have the shape of the logits without the last dimension, got ",
                    tensor.sizes(), " for logits ", logits.sizes());
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), op, ": ", name,
                    " must be on the device of the logits, ", logits.device(), ", got ",
                    tensor.device());
}

inline void check_labels(const char* op, const at::Tensor& labels, const at::Tensor& logits) {
  check_per_row(op, "labels", labels, logits);
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong || labels.scalar_type() == at::kInt, op,
                   ": labels must be int64 or int32, got ", labels.scalar_type());
}

// Checked labels, contiguous.
inline at::Tensor int64_labels(const char* op, const at::Tensor& labels, const at::Tensor& logits) {
  check_labels(op, labels, logits);
  return labels.to(at::kLong).contiguous();
}

// The factor of scale_gradient_.
inline void check_factor(const char* op, const at::Tensor& factor, const at::Tensor& gradient) {
  TORCH_CHECK_VALUE(factor.numel() == 1 && factor.scalar_type() == at::kFloat &&
                        factor.device() == gradient.device(),
                    op, ": factor must be one float32 number on ", gradient.device(), ", got ",
                    factor.sizes(), " of ", factor.scalar_type(), " on ", factor.device());
}

// How many logits the gate's entropy is of: 0 are all.
inline void check_gate_k(const char* op, int64_t k) {
  TORCH_CHECK_VALUE(k == 0 || (k >= kMinTopK && k <= kMaxTopK), op, ": k must be from ", kMinTopK,
                    " to ", kMaxTopK, ", or 0 for all logits, got ", k);
}

// The shape of what an operator tells of each token beside (core/token_stats.h).
inline std::vector<int64_t> extra_sizes(const at::Tensor& logits, int64_t num_extra) {
  auto sizes = logits.sizes().vec();
  sizes.pop_back();
  sizes.insert(sizes.begin(), num_extra);
  return sizes;
}

inline void check_k(const char* op, int64_t k, int64_t min_k, int64_t max_k) {
  TORCH_CHECK_VALUE(k >= min_k && k <= max_k, op, ": k must be from ", min_k, " to ", max_k,
                    ", got ", k);
}

// Of the family, which is empty or (softcap, 0 for none; logit_scale; label_smoothing; z_loss).
inline TokenLoss checked_family(const char* op, int64_t ignore_index,
                                c10::ArrayRef<double> family) {
  TokenLoss loss;
  loss.ignore_index = ignore_index;
  if (family.empty()) return loss;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  TORCH_CHECK_VALUE(family.size() == 4 && family[0] >= 0 && family[0] < kInfinity &&
                        family[1] > 0 && family[1] < kInfinity && family[2] >= 0 &&
                        family[2] <= 1 && family[3] >= 0 && family[3] < kInfinity,
                    op,
                    ": family must be empty, or a softcap of at least 0, a logit_scale above 0, a "
                    "label_smoothing from 0 to 1 and a z_loss of at least 0, all finite, got ",
                    family);
  loss.map = {family[1], family[0]};
  loss.label_smoothing = family[2];
  loss.z_loss = family[3];
  return loss;
}

inline TokenLoss checked_token_loss(const char* op, int64_t k, std::string_view gate,
                                    c10::ArrayRef<double> gate_parameters, int64_t ignore_index,
                                    c10::ArrayRef<double> family, int64_t num_extra) {
  check_gate_k(op, k);
  TORCH_CHECK_VALUE(num_extra >= 0 && num_extra <= kMaxExtra, op, ": num_extra must be from 0 to ",
                    kMaxExtra, ", got ", num_extra);
  TokenLoss loss = checked_family(op, ignore_index, family);
  loss.k = static_cast<int>(k);
  loss.tells_entropy = num_extra == kMaxExtra;
  loss.gate = for_k(gate_from_name(gate, gate_parameters), loss.k);
  return loss;
}

// Of all shards, where a shard alone does not say how many words there are.
inline int64_t checked_num_words(const char* op, std::optional<int64_t> num_words,
                                 const at::Tensor& logits) {
  TORCH_CHECK_VALUE(!num_words || *num_words >= 1, op, ": num_words must be at least 1, got ",
                    num_words.value_or(0));
  return num_words.value_or(logits.size(-1));
}

// What a backward is told of each row, as the operator was given it. upstream is for the z-loss.
struct RowsOfBackward {
  const at::Tensor& weight;
  const at::Tensor& labels;
  const at::Tensor& row_max;
  const at::Tensor& log_sum;
  at::Tensor upstream;
  TokenLoss loss;
};

inline RowsOfBackward checked_rows(const char* op, RowsOfBackward rows, const at::Tensor& logits,
                                   std::optional<int64_t> num_words) {
  TORCH_CHECK_VALUE(rows.loss.z_loss == 0 || rows.upstream.defined(), op,
                    ": a z_loss needs the upstream gradient, got none");
  rows.loss.num_words = checked_num_words(op, num_words, logits);
  return rows;
}

// An operator that writes over its logits needs every element at a place of its own, and rows that
// it can address without a copy.
inline void check_writable(const char* op, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(has_readable_rows(logits), op,
                    " in place: the last dimension of the logits must be contiguous, got sizes ",
                    logits.sizes(), " and strides ", logits.strides());
  TORCH_CHECK_VALUE(rows_are_apart(row_layout(logits), logits.size(-1)), op,
                    " in place: rows of the logits share memory, got sizes ", logits.sizes(),
                    " and strides ", logits.strides());
}

// Lets autograd notice that what it may have saved for another operator is gone.
inline void mark_written(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace eaft_ext
