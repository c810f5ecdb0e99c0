// Kernel launches on raw pointers and a stream: what ops_cuda.cpp knows of the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../core/row_layout.h"

namespace eaft_ext::cuda {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

struct BackwardArguments {
  const void* logits;  // num_rows rows of vocab_size elements
  void* gradient;      // the same; may be the logits
  RowLayout logits_layout;
  RowLayout gradient_layout;
  const float* weight;    // [num_rows]
  const int64_t* labels;  // [num_rows]
  const float* row_max;   // [num_rows]
  const float* log_sum;   // [num_rows]
  int64_t num_rows;
  int64_t vocab_size;
  int64_t ignore_index;
};

cudaError_t launch_gated_ce_backward(ElementType type, const BackwardArguments& arguments,
                                     cudaStream_t stream);

}  // namespace eaft_ext::cuda
