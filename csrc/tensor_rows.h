// The row layout of a tensor.
#pragma once

#include <stdexcept>

#include "core/row_layout.h"
#include "stable_torch.h"

namespace eaft_ext {

// Dimensions that follow each other in memory without a gap count as one. Returns false where more
// than kMaxRowDims remain. Where there are no rows, there are no dimensions.
inline bool make_row_layout(const Tensor& tensor, RowLayout* layout) {
  *layout = {};
  if (tensor.numel() == 0) return true;
  const Sizes sizes = tensor.sizes();
  const Sizes strides = tensor.strides();
  for (size_t d = 0; d + 1 < sizes.size(); ++d) {
    const int64_t size = sizes[d];
    const int64_t stride = strides[d];
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
inline bool has_readable_rows(const Tensor& tensor) {
  RowLayout layout;
  const bool contiguous = tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0;
  return contiguous && make_row_layout(tensor, &layout);
}

// The layout of a tensor that has readable rows.
inline RowLayout row_layout(const Tensor& tensor) {
  RowLayout layout;
  if (!has_readable_rows(tensor) || !make_row_layout(tensor, &layout)) {
    throw std::logic_error("eaft_ext: rows that cannot be addressed were not copied");
  }
  return layout;
}

// The tensor itself where that is so, else a contiguous copy.
inline Tensor with_readable_rows(const Tensor& tensor) {
  return has_readable_rows(tensor) ? tensor : as_contiguous(tensor);
}

// With the strides that torch.empty_like makes, as the fake operators say.
inline Tensor empty_gradient(const Tensor& tensor) {
  return tensor.is_contiguous() ? empty(tensor.sizes(), tensor.scalar_type(), tensor)
                                : torch::stable::empty_like(tensor);
}

// write(source, target) fills target from source, two tensors with readable rows, which may be the
// same.
template <typename Write>
Tensor write_gradient_like(const Tensor& logits, const Write& write) {
  const Tensor gradient = empty_gradient(logits);
  if (has_readable_rows(logits) && has_readable_rows(gradient)) {
    write(logits, gradient);
    return gradient;
  }
  const Tensor copy = empty(logits.sizes(), logits.scalar_type(), logits);
  copy_into(copy, logits);
  write(copy, copy);
  copy_into(gradient, copy);
  return gradient;
}

}  // namespace eaft_ext
