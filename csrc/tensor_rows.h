// The row layout of a tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include "core/row_layout.h"

namespace eaft_ext {

// Dimensions that follow each other in memory without a gap count as one. Returns false where more
// than kMaxRowDims remain. Where there are no rows, there are no dimensions.
inline bool make_row_layout(const at::Tensor& tensor, RowLayout* layout) {
  *layout = {};
  if (tensor.numel() == 0) return true;
  for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    if (size == 1) continue;
    const int last = layout->num_dims - 1;
    if (last >= 0 && layout->strides[last] == size * stride) {
      layout->sizes[last] *= size;
      layout->strides[last] = stride;
      continue;
    }
    if (layout->num_dims == kMaxRowDims) return false;
    layout->sizes[layout->num_dims] = size;
    layout->strides[layout->num_dims] = stride;
    ++layout->num_dims;
  }
  return true;
}

// Whether the rows of a (..., V) tensor are contiguous and can be addressed as they lie. No rows
// are: contiguous() keeps the strides of a tensor without elements, whatever they are.
inline bool has_readable_rows(const at::Tensor& tensor) {
  RowLayout layout;
  const bool contiguous = tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0;
  return contiguous && make_row_layout(tensor, &layout);
}

// The layout of a tensor that has readable rows.
inline RowLayout row_layout(const at::Tensor& tensor) {
  RowLayout layout;
  TORCH_INTERNAL_ASSERT(has_readable_rows(tensor) && make_row_layout(tensor, &layout));
  return layout;
}

// The tensor itself where that is so, else a contiguous copy.
inline at::Tensor with_readable_rows(const at::Tensor& tensor) {
  return has_readable_rows(tensor) ? tensor : tensor.contiguous();
}

// write(source, target) fills target from source, two tensors with readable rows, which may be the
// same. Gives a tensor with the strides that at::empty_like makes, as the fake operators say.
template <typename Write>
at::Tensor write_gradient_like(const at::Tensor& logits, const Write& write) {
  const at::Tensor gradient = at::empty_like(logits);
  if (has_readable_rows(logits) && has_readable_rows(gradient)) {
    write(logits, gradient);
    return gradient;
  }
  const at::Tensor copy = logits.clone(at::MemoryFormat::Contiguous);
  write(copy, copy);
  return gradient.copy_(copy);
}

}  // namespace eaft_ext
