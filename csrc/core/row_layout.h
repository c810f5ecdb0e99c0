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
    // A grid has fewer than 2^32 blocks, and a GPU takes long for 64-bit divisions.
#if defined(__CUDA_ARCH__)
    using Number = uint32_t;
#else
    using Number = int64_t;
#endif
    auto rest = static_cast<Number>(row);
    int64_t result = 0;
    for (int d = num_dims - 1; d > 0; --d) {
      const auto size = static_cast<Number>(sizes[d]);
      result += static_cast<int64_t>(rest % size) * strides[d];
      rest /= size;
    }
    return num_dims > 0 ? result + static_cast<int64_t>(rest) * strides[0] : result;
  }
};

// Whether no two rows share an element: from the fastest to the slowest, each dimension steps over
// all that the ones before it cover.
inline bool rows_are_apart(RowLayout layout, int64_t vocab_size) {
  int64_t covered = vocab_size;
  for (int d = 0; d < layout.num_dims; ++d) {
    int next = d;  // the smallest stride of those that are left
    for (int e = d; e < layout.num_dims; ++e) {
      if (layout.strides[e] < layout.strides[next]) next = e;
    }
    if (layout.sizes[next] > 1 && layout.strides[next] < covered) return false;
    covered += (layout.sizes[next] - 1) * layout.strides[next];
    layout.strides[next] = layout.strides[d];
    layout.sizes[next] = layout.sizes[d];
  }
  return true;
}

}  // namespace eaft_ext
