// The columns that a tensor of logits has of the vocabulary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "stable_torch.h"

namespace eaft_ext {

struct VocabShard {
  bool is_whole;  // all of the vocabulary: every label is in it
  int64_t start;
  int64_t num_words;  // columns that are no padding

  // Whole where there is no vocab_start.
  VocabShard(const Tensor& logits, std::optional<int64_t> vocab_start,
             std::optional<int64_t> vocab_size)
      : is_whole(!vocab_start), start(vocab_start.value_or(0)), num_words(logits.size(-1)) {
    // Compared before it is subtracted: either may be any integer.
    if (vocab_size) num_words = *vocab_size <= start ? 0 : std::min(*vocab_size - start, num_words);
  }

  Tensor words(const Tensor& logits) const { return columns(logits, 0, num_words); }

  void clear_padding(const Tensor& gradient) const {
    const int64_t padding = gradient.size(-1) - num_words;
    if (padding > 0) set_zero(columns(gradient, num_words, padding));
  }
};

}  // namespace eaft_ext
