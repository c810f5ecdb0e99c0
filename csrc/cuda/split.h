// Split of the vocabulary, as split-K splits a product's sum: where rows are few, each is cut into
// spans and every span has a block, so that the device is not idle. What the blocks find of their
// spans goes through a workspace in global memory to a second kernel, which combines it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace eaft_ext::cuda {

// How the rows are cut. The last span of a row may be shorter than the others.
struct SplitPlan {
  int num_spans = 1;    // of a row
  int span_length = 0;  // elements
  size_t workspace_bytes = 0;
};

// The same for the kernels, with the workspace that the spans leave their results in.
template <typename Key>
struct RowSplit {
  int num_spans;    // of a row
  int span_length;  // elements
  // Where a row has more than one span, [num_rows, num_spans] each:
  double* sum = nullptr;
  double* rest = nullptr;  // this and the next are written for the entropy of all logits
  double* weighted = nullptr;
  double* logits = nullptr;  // written for label smoothing
  float* max = nullptr;
  Key* top = nullptr;  // [num_rows, num_spans, k], in no order
};

// The number of spans that takes the fewest waves of resident blocks, a block costing its span and
// `overhead` elements' time. A span is a multiple of `granularity` and at least `shortest` long.
inline SplitPlan choose_split(int64_t num_rows, int64_t vocab_size, int resident_blocks,
                              int granularity, int shortest, int overhead) {
  resident_blocks = std::max(resident_blocks, 1);
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  SplitPlan best;
  int64_t least = INT64_MAX;
  for (int64_t count = 1; count == 1 || vocab_size / count >= shortest; ++count) {
    const int64_t length = divide_up(divide_up(vocab_size, count), granularity) * granularity;
    const int64_t spans = divide_up(vocab_size, length);
    const int64_t cost = divide_up(num_rows * spans, resident_blocks) * (length + overhead);
    if (cost < least) {
      least = cost;
      best.num_spans = static_cast<int>(spans);
      best.span_length = static_cast<int>(std::min<int64_t>(length, vocab_size));
    }
    if (num_rows * count >= 4 * int64_t{resident_blocks}) break;  // waves are short enough
  }
  return best;
}

// Lays the arrays of the spans out in one workspace, 8-byte numbers first; gives the bytes in all.
template <typename Key>
size_t lay_out_split(RowSplit<Key>* split, int64_t num_rows, int k, bool with_sums,
                     void* workspace) {
  if (split->num_spans == 1) return 0;
  const size_t items = static_cast<size_t>(num_rows) * split->num_spans;
  auto* memory = static_cast<unsigned char*>(workspace);
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* begin = memory + used;
    used += (bytes + 15) / 16 * 16;
    return begin;
  };
  split->top = reinterpret_cast<Key*>(take(items * k * sizeof(Key)));
  if (with_sums) {
    split->sum = reinterpret_cast<double*>(take(items * sizeof(double)));
    split->rest = reinterpret_cast<double*>(take(items * sizeof(double)));
    split->weighted = reinterpret_cast<double*>(take(items * sizeof(double)));
    split->logits = reinterpret_cast<double*>(take(items * sizeof(double)));
    split->max = reinterpret_cast<float*>(take(items * sizeof(float)));
  }
  return used;
}

}  // namespace eaft_ext::cuda
