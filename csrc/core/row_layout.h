// Where the rows of a (..., V) tensor start. Only the last dimension is contiguous; the others may
// have any stride, so a [:, :-1] slice or a transposed [s, b, V] view is read where it lies.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace eaft_ext {

constexpr int kMaxRowDims = 4;

// Dimensions from the slowest to the fastest, those that could be merged already merged.
struct RowLayout {
  int num_dims = 0;
  int64_t sizes[kMaxRowDims] = {};
  int64_t strides[kMaxRowDims] = {};

  // The offset of a row's first element, in elements.
  EAFT_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int d = num_dims - 1; d > 0; --d) {
      result += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return num_dims > 0 ? result + row * strides[0] : result;
  }
};

}  // namespace eaft_ext
