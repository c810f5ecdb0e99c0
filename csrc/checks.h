// What every device asks of an operator's arguments, in one sentence with the offending values.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "core/limits.h"
#include "core/shard_partial.h"
#include "core/token_loss.h"
#include "core/token_stats.h"
#include "gate_from_name.h"
#include "sentence.h"
#include "stable_torch.h"
#include "tensor_rows.h"
#include "vocab_shard.h"

namespace eaft_ext {

inline void check_logits(const char* op, const Tensor& logits) {
  if (logits.dim() >= 1 && logits.size(-1) >= 1) return;
  fail(op, ": logits must be (..., V) with V of at least 1, got ", logits.sizes());
}

// Logits of a shard, which may have no columns, or whole ones, where there is no vocab_start.
inline VocabShard checked_shard(const char* op, const Tensor& logits,
                                std::optional<int64_t> vocab_start,
                                std::optional<int64_t> vocab_size) {
  if (!vocab_start) check_logits(op, logits);
  if (logits.dim() < 1) fail(op, ": logits must be (..., V), got ", logits.sizes());
  if (vocab_start && *vocab_start < 0) {
    fail(op, ": vocab_start must be at least 0, got ", *vocab_start);
  }
  return VocabShard(logits, vocab_start, vocab_size);
}

// The partials of all shards.
inline void check_partials(const char* op, const Tensor& partials, const Tensor& labels,
                           ScalarType dtype, const TokenLoss& loss) {
  const bool fits = partials.dim() == labels.dim() + 2 && partials.size(0) >= 1 &&
                    partials.size(-1) == partial_size(loss) &&
                    partials.sizes().slice(1, labels.dim()).equals(labels.sizes());
  if (!fits) {
    fail(op, ": partials must be (num_shards, ..., ", partial_size(loss), ") with k = ", loss.k,
         ", got ", partials.sizes(), " for labels ", labels.sizes());
  }
  if (partials.scalar_type() != dtype || partials.device() != labels.device()) {
    fail(op, ": partials must be ", dtype, " on ", labels.device(), ", got ",
         partials.scalar_type(), " on ", partials.device());
  }
}

// A tensor of one number for each row of the logits, on their device.
inline void check_per_row(const char* op, const char* name, const Tensor& tensor,
                          const Tensor& logits) {
  if (!tensor.sizes().equals(logits.sizes().slice(0, logits.dim() - 1))) {
    fail(op, ": ", name, " must have the shape of the logits without the last dimension, got ",
         tensor.sizes(), " for logits ", logits.sizes());
  }
  if (tensor.device() != logits.device()) {
    fail(op, ": ", name, " must be on the device of the logits, ", logits.device(), ", got ",
         tensor.device());
  }
}

// Checked labels, contiguous.
inline Tensor int64_labels(const char* op, const Tensor& labels, const Tensor& logits) {
  check_per_row(op, "labels", labels, logits);
  const ScalarType dtype = labels.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Int) {
    fail(op, ": labels must be int64 or int32, got ", dtype);
  }
  return as_contiguous(labels, ScalarType::Long);
}

// Of a dtype and contiguous, one number for each row.
inline Tensor per_row(const char* op, const char* name, const Tensor& tensor, const Tensor& logits,
                      ScalarType dtype) {
  check_per_row(op, name, tensor, logits);
  return as_contiguous(tensor, dtype);
}

// The factor of scale_gradient_.
inline void check_factor(const char* op, const Tensor& factor, const Tensor& gradient) {
  if (factor.numel() == 1 && factor.scalar_type() == ScalarType::Float &&
      factor.device() == gradient.device()) {
    return;
  }
  fail(op, ": factor must be one float32 number on ", gradient.device(), ", got ", factor.sizes(),
       " of ", factor.scalar_type(), " on ", factor.device());
}

// How many logits the gate's entropy is of: 0 are all.
inline void check_gate_k(const char* op, int64_t k) {
  if (k == 0 || (k >= kMinTopK && k <= kMaxTopK)) return;
  fail(op, ": k must be from ", kMinTopK, " to ", kMaxTopK, ", or 0 for all logits, got ", k);
}

// The shape of what an operator tells of each token beside (core/token_stats.h).
inline std::vector<int64_t> extra_sizes(const Tensor& logits, int64_t num_extra) {
  auto sizes = logits.sizes().vec();
  sizes.pop_back();
  sizes.insert(sizes.begin(), num_extra);
  return sizes;
}

// The outputs of the forward, one number a row each.
struct StatTensors {
  Tensor loss, nll, entropy, gate, row_max, log_sum;
  Tensor extra;  // (num_extra, ...)

  // make(sizes) gives each.
  template <typename Make>
  StatTensors(const Tensor& logits, int64_t num_extra, const Make& make)
      : loss(make(rows_of(logits))),
        nll(make(rows_of(logits))),
        entropy(make(rows_of(logits))),
        gate(make(rows_of(logits))),
        row_max(make(rows_of(logits))),
        log_sum(make(rows_of(logits))),
        extra(make(extra_sizes(logits, num_extra))) {}

 private:
  static Sizes rows_of(const Tensor& logits) { return logits.sizes().slice(0, logits.dim() - 1); }
};

// Those of the logits with another last dimension.
inline std::vector<int64_t> sizes_of_rows(const Tensor& logits, int64_t last) {
  auto sizes = logits.sizes().vec();
  sizes.back() = last;
  return sizes;
}

inline void check_k(const char* op, int64_t k, int64_t min_k, int64_t max_k) {
  if (k < min_k || k > max_k) fail(op, ": k must be from ", min_k, " to ", max_k, ", got ", k);
}

// Of the family, which is empty or (softcap, 0 for none; logit_scale; label_smoothing; z_loss).
inline TokenLoss checked_family(const char* op, int64_t ignore_index,
                                const std::vector<double>& family) {
  TokenLoss loss;
  loss.ignore_index = ignore_index;
  if (family.empty()) return loss;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const bool fits = family.size() == 4 && family[0] >= 0 && family[0] < kInfinity &&
                    family[1] > 0 && family[1] < kInfinity && family[2] >= 0 && family[2] <= 1 &&
                    family[3] >= 0 && family[3] < kInfinity;
  if (!fits) {
    fail(op,
         ": family must be empty, or a softcap of at least 0, a logit_scale above 0, a "
         "label_smoothing from 0 to 1 and a z_loss of at least 0, all finite, got ",
         family);
  }
  loss.map = {family[1], family[0]};
  loss.label_smoothing = family[2];
  loss.z_loss = family[3];
  return loss;
}

// Takes the gate's name, and is called before anything that could fail.
inline TokenLoss checked_token_loss(const char* op, int64_t k, StringHandle gate,
                                    const std::vector<double>& gate_parameters,
                                    int64_t ignore_index, const std::vector<double>& family,
                                    int64_t num_extra) {
  const OwnedString name(gate);
  check_gate_k(op, k);
  if (num_extra < 0 || num_extra > kMaxExtra) {
    fail(op, ": num_extra must be from 0 to ", kMaxExtra, ", got ", num_extra);
  }
  TokenLoss loss = checked_family(op, ignore_index, family);
  loss.k = static_cast<int>(k);
  loss.tells_entropy = num_extra == kMaxExtra;
  loss.gate = for_k(gate_from_name(name.view(), gate_parameters), loss.k);
  return loss;
}

// Of all shards, where a shard alone does not say how many words there are.
inline int64_t checked_num_words(const char* op, std::optional<int64_t> num_words,
                                 const Tensor& logits) {
  if (num_words && *num_words < 1) fail(op, ": num_words must be at least 1, got ", *num_words);
  return num_words.value_or(logits.size(-1));
}

// What a backward is told of each row, as the operator was given it. upstream is for the z-loss.
struct RowsOfBackward {
  const Tensor& weight;
  const Tensor& labels;
  const Tensor& row_max;
  const Tensor& log_sum;
  std::optional<Tensor> upstream;
  TokenLoss loss;
};

inline RowsOfBackward checked_rows(const char* op, RowsOfBackward rows, const Tensor& logits,
                                   std::optional<int64_t> num_words) {
  if (rows.loss.z_loss != 0 && !rows.upstream) {
    fail(op, ": a z_loss needs the upstream gradient, got none");
  }
  rows.loss.num_words = checked_num_words(op, num_words, logits);
  return rows;
}

// An operator that writes over its logits needs every element at a place of its own, and rows that
// it can address without a copy.
inline void check_writable(const char* op, const Tensor& logits) {
  if (!has_readable_rows(logits)) {
    fail(op, " in place: the last dimension of the logits must be contiguous, got sizes ",
         logits.sizes(), " and strides ", logits.strides());
  }
  if (!rows_are_apart(row_layout(logits), logits.size(-1))) {
    fail(op, " in place: rows of the logits share memory, got sizes ", logits.sizes(),
         " and strides ", logits.strides());
  }
}

}  // namespace eaft_ext
