// The operators as C functions with flat parameters, which tests/cuda/kernels_on_host.py calls.
// Each fills the arguments of csrc/cuda/arguments.h, calls run_<operator>() of kernels.cpp, and
// leaves the sentence that it returns in `error`, empty if all went well.
//
// A matrix is (num_rows, vocab_size). Its layout is 1 + 2 kMaxRowDims numbers: how many dimensions
// the rows have, their sizes, their strides.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "core/token_stats.h"
#include "cuda/arguments.h"

#define EXPORT extern "C" __attribute__((visibility("default"))) void

namespace eaft_ext::cuda {

std::string run_forward(ElementType type, const ForwardArguments& arguments, int num_spans,
                        uint64_t seed);
std::string run_partial(ElementType type, const PartialArguments& arguments, int num_spans,
                        uint64_t seed);
std::string run_merge(const MergeArguments& arguments, uint64_t seed);
std::string run_backward(ElementType type, const BackwardArguments& arguments, uint64_t seed);
std::string run_forward_with_grad(ElementType type, const ForwardWithGradArguments& arguments,
                                  int cluster_size, uint64_t seed);
std::string run_scale_gradient(ElementType type, const ScaleGradientArguments& arguments,
                               uint64_t seed);
std::string run_topk(ElementType type, const TopKArguments& arguments, int num_spans,
                     uint64_t seed);

inline RowLayout layout_from(const int64_t* numbers) {
  RowLayout layout;
  layout.num_dims = static_cast<int>(numbers[0]);
  for (int d = 0; d < kMaxRowDims; ++d) {
    layout.sizes[d] = numbers[1 + d];
    layout.strides[d] = numbers[1 + kMaxRowDims + d];
  }
  return layout;
}

// normalizer: 0 is ln k, or ln num_words for k = 0.
// family: softcap (0: none), logit_scale, label_smoothing, z_loss. num_words is for the smoothing.
inline TokenLoss token_loss_from(int k, int64_t ignore_index, int kind, double first, double second,
                                 double normalizer, const double* family, int64_t num_words,
                                 bool tells_entropy = false) {
  Gate gate;
  gate.kind = static_cast<GateKind>(kind);
  gate.first = first;
  gate.second = second;
  gate.normalizer = normalizer;
  gate.normalizer_is_log_k = normalizer == 0;
  return {k,
          for_k(gate, k == 0 ? num_words : k),
          ignore_index,
          {family[1], family[0]},
          family[2],
          family[3],
          num_words,
          tells_entropy};
}

inline void leave(const std::string& message, char* error, int64_t error_size) {
  std::snprintf(error, static_cast<size_t>(error_size), "%s", message.c_str());
}

}  // namespace eaft_ext::cuda

// labels and the stats: [num_rows].
EXPORT forward_on_host(int type, const void* logits, const int64_t* logits_layout, int64_t num_rows,
                       int64_t vocab_size, const int64_t* labels, int64_t ignore_index, int k,
                       int gate_kind, double gate_first, double gate_second, double gate_normalizer,
                       const double* family, float* loss, float* nll, float* entropy, float* gate,
                       float* row_max, float* log_sum, float* extra, int num_extra, int num_spans,
                       uint64_t seed, char* error, int64_t error_size) {
  using namespace eaft_ext::cuda;
  ForwardArguments arguments{};
  arguments.logits = {logits, layout_from(logits_layout), num_rows, vocab_size};
  arguments.labels = labels;
  arguments.loss =
      token_loss_from(k, ignore_index, gate_kind, gate_first, gate_second, gate_normalizer, family,
                      vocab_size, num_extra == eaft_ext::kMaxExtra);
  arguments.stats = {loss, nll, entropy, gate, row_max, log_sum, extra, num_extra, num_rows};
  leave(run_forward(static_cast<ElementType>(type), arguments, num_spans, seed), error, error_size);
}

// partials: (num_rows, partial_size). labels: [num_rows].
EXPORT partial_on_host(int type, const void* logits, const int64_t* logits_layout, int64_t num_rows,
                       int64_t vocab_size, const int64_t* labels, int64_t ignore_index, int k,
                       const double* family, int tells_entropy, int64_t vocab_start,
                       float* partials, int num_spans, uint64_t seed, char* error,
                       int64_t error_size) {
  using namespace eaft_ext::cuda;
  const PartialArguments arguments{
      {logits, layout_from(logits_layout), num_rows, vocab_size},
      labels,
      token_loss_from(k, ignore_index, 0, 0, 0, 1, family, 1, tells_entropy != 0),
      vocab_start,
      partials};
  leave(run_partial(static_cast<ElementType>(type), arguments, num_spans, seed), error, error_size);
}

// partials: (num_shards, num_rows, partial_size). labels and the stats: [num_rows].
EXPORT merge_on_host(const float* partials, int num_shards, int64_t num_rows, const int64_t* labels,
                     int64_t ignore_index, int k, int gate_kind, double gate_first,
                     double gate_second, double gate_normalizer, const double* family,
                     int64_t num_words, float* loss, float* nll, float* entropy, float* gate,
                     float* row_max, float* log_sum, float* extra, int num_extra, uint64_t seed,
                     char* error, int64_t error_size) {
  using namespace eaft_ext::cuda;
  MergeArguments arguments{};
  arguments.partials = partials;
  arguments.num_shards = num_shards;
  arguments.num_rows = num_rows;
  arguments.labels = labels;
  arguments.loss =
      token_loss_from(k, ignore_index, gate_kind, gate_first, gate_second, gate_normalizer, family,
                      num_words, num_extra == eaft_ext::kMaxExtra);
  arguments.stats = {loss, nll, entropy, gate, row_max, log_sum, extra, num_extra, num_rows};
  leave(run_merge(arguments, seed), error, error_size);
}

// gradient: (num_rows, vocab_size), maybe the logits. labels, weight, row_max, log_sum: [num_rows].
EXPORT backward_on_host(int type, const void* logits, const int64_t* logits_layout,
                        int64_t num_rows, int64_t vocab_size, int64_t vocab_start, void* gradient,
                        const int64_t* gradient_layout, const int64_t* labels, int64_t ignore_index,
                        const double* family, int64_t num_words, const float* weight,
                        const float* upstream, const float* row_max, const float* log_sum,
                        uint64_t seed, char* error, int64_t error_size) {
  using namespace eaft_ext::cuda;
  BackwardArguments arguments{};
  arguments.logits = {logits, layout_from(logits_layout), num_rows, vocab_size};
  arguments.vocab_start = vocab_start;
  arguments.gradient = gradient;
  arguments.gradient_layout = layout_from(gradient_layout);
  arguments.labels = labels;
  arguments.loss = token_loss_from(0, ignore_index, 0, 0, 0, 1, family, num_words);
  arguments.weight = weight;
  arguments.upstream = upstream;
  arguments.row_max = row_max;
  arguments.log_sum = log_sum;
  leave(run_backward(static_cast<ElementType>(type), arguments, seed), error, error_size);
}

// gradient: (num_rows, vocab_size), maybe the logits. upstream, labels and the stats: [num_rows].
EXPORT forward_with_grad_on_host(int type, const float* upstream, const void* logits,
                                 const int64_t* logits_layout, int64_t num_rows, int64_t vocab_size,
                                 void* gradient, const int64_t* gradient_layout,
                                 const int64_t* labels, int64_t ignore_index, int k, int gate_kind,
                                 double gate_first, double gate_second, double gate_normalizer,
                                 const double* family, float* loss, float* nll, float* entropy,
                                 float* gate, float* row_max, float* log_sum, float* extra,
                                 int num_extra, int cluster_size, uint64_t seed, char* error,
                                 int64_t error_size) {
  using namespace eaft_ext::cuda;
  ForwardWithGradArguments arguments{};
  ForwardArguments& forward = arguments.forward;
  forward.logits = {logits, layout_from(logits_layout), num_rows, vocab_size};
  forward.labels = labels;
  forward.loss =
      token_loss_from(k, ignore_index, gate_kind, gate_first, gate_second, gate_normalizer, family,
                      vocab_size, num_extra == eaft_ext::kMaxExtra);
  forward.stats = {loss, nll, entropy, gate, row_max, log_sum, extra, num_extra, num_rows};
  arguments.upstream = upstream;
  arguments.gradient = gradient;
  arguments.gradient_layout = layout_from(gradient_layout);
  leave(run_forward_with_grad(static_cast<ElementType>(type), arguments, cluster_size, seed), error,
        error_size);
}

// gradient: (num_rows, vocab_size). factor: [1].
EXPORT scale_gradient_on_host(int type, void* gradient, const int64_t* gradient_layout,
                              int64_t num_rows, int64_t vocab_size, const float* factor,
                              uint64_t seed, char* error, int64_t error_size) {
  using namespace eaft_ext::cuda;
  const ScaleGradientArguments arguments{gradient, layout_from(gradient_layout), num_rows,
                                         vocab_size, factor};
  leave(run_scale_gradient(static_cast<ElementType>(type), arguments, seed), error, error_size);
}

// values, of the logits' type, and indices: (num_rows, k), contiguous.
EXPORT topk_on_host(int type, const void* logits, const int64_t* logits_layout, int64_t num_rows,
                    int64_t vocab_size, int k, void* values, int64_t* indices, int num_spans,
                    uint64_t seed, char* error, int64_t error_size) {
  using namespace eaft_ext::cuda;
  TopKArguments arguments{};
  arguments.logits = {logits, layout_from(logits_layout), num_rows, vocab_size};
  arguments.k = k;
  arguments.values = values;
  arguments.indices = indices;
  leave(run_topk(static_cast<ElementType>(type), arguments, num_spans, seed), error, error_size);
}

#undef EXPORT
