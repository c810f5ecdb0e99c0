// Few rows are cut into parts, a block for each, so that they do not leave the device idle. What
// the blocks find goes through global memory to one more kernel that merges it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace eaft_ext::cuda {

// How the rows are cut. The last part of a row may be shorter than the others.
struct PartsPlan {
  int count = 1;
  int length = 0;  // elements
  size_t workspace_bytes = 0;
};

template <typename Key>
struct RowParts {
  int count;
  int length;
  // Where a row has more than one part:
  double* sum = nullptr;  // [num_rows, count]
  float* max = nullptr;   // [num_rows, count]
  Key* top = nullptr;     // [num_rows, count, k], in no order
};

// The number of parts that takes the fewest waves of resident blocks, a block costing its part and
// `overhead` elements' time. A part is a multiple of `granularity` and at least `shortest` long.
inline PartsPlan choose_parts(int64_t num_rows, int64_t vocab_size, int resident_blocks,
                              int granularity, int shortest, int overhead) {
  resident_blocks = std::max(resident_blocks, 1);
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  PartsPlan best;
  int64_t least = INT64_MAX;
  for (int64_t count = 1; count == 1 || vocab_size / count >= shortest; ++count) {
    const int64_t length = divide_up(divide_up(vocab_size, count), granularity) * granularity;
    const int64_t parts = divide_up(vocab_size, length);
    const int64_t cost = divide_up(num_rows * parts, resident_blocks) * (length + overhead);
    if (cost < least) {
      least = cost;
      best.count = static_cast<int>(parts);
      best.length = static_cast<int>(std::min<int64_t>(length, vocab_size));
    }
    if (num_rows * count >= 4 * int64_t{resident_blocks}) break;  // waves are short enough
  }
  return best;
}

// Lays the arrays of the parts out in one workspace, 8-byte numbers first; gives the bytes in all.
template <typename Key>
size_t lay_out_parts(RowParts<Key>* parts, int64_t num_rows, int k, bool with_sums,
                     void* workspace) {
  if (parts->count == 1) return 0;
  const size_t items = static_cast<size_t>(num_rows) * parts->count;
  auto* memory = static_cast<unsigned char*>(workspace);
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* begin = memory + used;
    used += (bytes + 15) / 16 * 16;
    return begin;
  };
  parts->top = reinterpret_cast<Key*>(take(items * k * sizeof(Key)));
  if (with_sums) {
    parts->sum = reinterpret_cast<double*>(take(items * sizeof(double)));
    parts->max = reinterpret_cast<float*>(take(items * sizeof(float)));
  }
  return used;
}

}  // namespace eaft_ext::cuda
