// What the kernels are told: raw pointers and numbers. Shapes stand beside each pointer; a tensor
// of logits or gradients is (num_rows, vocab_size) with contiguous rows wherever their layout puts
// them.
#pragma once

#include <cstdint>

#include "../core/row_layout.h"
#include "../core/token_loss.h"

namespace eaft_ext::cuda {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

// The logits, and what of them counts.
struct LogitsArguments {
  const void* logits;  // (num_rows, vocab_size)
  RowLayout layout;
  int64_t num_rows;
  int64_t vocab_size;  // below 2^31
};

// Where the forward leaves its results, [num_rows] each.
struct StatsPointers {
  float* loss;
  float* nll;
  float* entropy;
  float* gate;
  float* row_max;
  float* log_sum;
  // (num_extra, num_rows), as extra_stat() of core/token_stats.h has them.
  float* extra;
  int num_extra;
  int64_t num_rows;
};

struct ForwardArguments {
  LogitsArguments logits;
  const int64_t* labels;  // [num_rows]
  TokenLoss loss;         // k at most vocab_size
  StatsPointers stats;
};

// Where the vocabulary is divided: logits are the columns of a shard from the word vocab_start on.
struct PartialArguments {
  LogitsArguments logits;
  const int64_t* labels;  // [num_rows]
  TokenLoss loss;
  int64_t vocab_start;
  float* partials;  // (num_rows, partial_size), contiguous
};

struct MergeArguments {
  const float* partials;  // (num_shards, num_rows, partial_size), contiguous
  int num_shards;
  int64_t num_rows;
  const int64_t* labels;  // [num_rows]
  TokenLoss loss;
  StatsPointers stats;
};

struct BackwardArguments {
  LogitsArguments logits;
  int64_t vocab_start;  // the word of the first column
  void* gradient;       // (num_rows, vocab_size); may be the logits
  RowLayout gradient_layout;
  const int64_t* labels;  // [num_rows]
  TokenLoss loss;         // without k and gate
  const float* weight;    // [num_rows], upstream times gate
  const float* upstream;  // [num_rows], or null without a z-loss
  const float* row_max;   // [num_rows]
  const float* log_sum;   // [num_rows]
};

struct ForwardWithGradArguments {
  ForwardArguments forward;
  const float* upstream;  // [num_rows]
  void* gradient;         // (num_rows, vocab_size); may be the logits
  RowLayout gradient_layout;
};

struct ScaleGradientArguments {
  void* gradient;  // (num_rows, vocab_size)
  RowLayout layout;
  int64_t num_rows;
  int64_t vocab_size;
  const float* factor;  // [1]
};

struct TopKArguments {
  LogitsArguments logits;
  int k;             // from 1 to kMaxTopK, and at most vocab_size
  void* values;      // (num_rows, k), contiguous, of the logits' type
  int64_t* indices;  // (num_rows, k), contiguous
};

}  // namespace eaft_ext::cuda
