// Between tensors and what the kernels are told.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "../checks.h"
#include "../stable_torch.h"
#include "../tensor_rows.h"
#include "arguments.h"

namespace eaft_ext::cuda {

inline ElementType element_type(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      fail(op, ": on CUDA, logits must be float32, bfloat16 or float16, got ",
           logits.scalar_type());
  }
}

// Rows and places in a row are numbered in 32 bits.
inline void check_size(const char* op, const Tensor& logits) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (logits.size(-1) <= kMost && logits.numel() / logits.size(-1) <= kMost) return;
  fail(op, ": on CUDA, logits can have at most ", kMost, " rows, each of at most as many, got ",
       logits.sizes());
}

// Of logits that have readable rows.
inline LogitsArguments logits_arguments(const char* op, const Tensor& logits) {
  check_size(op, logits);
  LogitsArguments arguments{};
  arguments.logits = logits.const_data_ptr();
  arguments.layout = row_layout(logits);
  arguments.vocab_size = logits.size(-1);
  arguments.num_rows = logits.numel() / arguments.vocab_size;
  return arguments;
}

inline Tensor per_row(const char* op, const char* name, const Tensor& tensor,
                      const Tensor& logits) {
  return eaft_ext::per_row(op, name, tensor, logits, ScalarType::Float);
}

// Memory for what blocks of one launch leave for the next.
inline Tensor make_workspace(const Tensor& logits, size_t bytes) {
  const std::array<int64_t, 1> sizes = {static_cast<int64_t>(bytes)};
  return empty({sizes.data(), sizes.size()}, ScalarType::Byte, logits);
}

// Every number is written by the kernels.
struct Stats : StatTensors {
  Stats(const Tensor& logits, int64_t num_extra)
      : StatTensors(logits, num_extra,
                    [&](Sizes sizes) { return empty(sizes, ScalarType::Float, logits); }) {}

  StatsPointers pointers() const {
    return {loss.mutable_data_ptr<float>(),
            nll.mutable_data_ptr<float>(),
            entropy.mutable_data_ptr<float>(),
            gate.mutable_data_ptr<float>(),
            row_max.mutable_data_ptr<float>(),
            log_sum.mutable_data_ptr<float>(),
            extra.mutable_data_ptr<float>(),
            static_cast<int>(extra.size(0)),
            loss.numel()};
  }
};

// Arguments of a forward, checked once, with the tensors that they point to.
struct CheckedForward {
  Tensor logits;  // rows readable as they lie
  Tensor labels;  // int64, contiguous
  ElementType type;
  ForwardArguments arguments{};

  CheckedForward(const char* op, const Tensor& raw_logits, const Tensor& raw_labels,
                 const TokenLoss& loss, const Stats& stats)
      : logits(with_readable_rows(raw_logits)),
        labels(int64_labels(op, raw_labels, raw_logits)),
        type(element_type(op, raw_logits)) {
    arguments.logits = logits_arguments(op, logits);
    arguments.labels = labels.const_data_ptr<int64_t>();
    arguments.loss = for_vocab(loss, logits.size(-1));
    arguments.stats = stats.pointers();
  }
};

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace eaft_ext::cuda
