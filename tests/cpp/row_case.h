// A case of the row kernels from a fuzzer's bytes: what a loss is, and rows of logits that end
// where their memory does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/token_loss.h"
#include "cpu/row_kernels.h"
#include "fuzz_input.h"

#if defined(__SANITIZE_ADDRESS__)
#define EAFT_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EAFT_ADDRESS_SANITIZER 1
#endif
#endif
#if defined(EAFT_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) static_cast<void>(0)
#endif

namespace eaft_ext::cpu {

// How the rows lie: their length, the gap between them, and by how much the first is misaligned.
struct RowShape {
  int64_t num_rows;
  int64_t vocab_size;
  int64_t gap;
  int64_t shift;

  int64_t stride() const { return vocab_size + gap; }
};

// Elements of rows in memory of their own. What is between the rows is NaN, and poisoned where the
// address sanitizer is there to see it; behind the last row the memory ends.
template <typename Element>
class GuardedRows {
 public:
  explicit GuardedRows(const RowShape& shape)
      : shape_(shape), memory_(shape.shift + shape.num_rows * shape.stride() - shape.gap) {
    std::fill(memory_.begin(), memory_.end(),
              from_real<Element>(std::numeric_limits<Compute<Element>>::quiet_NaN()));
    for (int64_t row = 0; row + 1 < shape.num_rows; ++row) {
      ASAN_POISON_MEMORY_REGION(this->row(row) + shape.vocab_size, shape.gap * sizeof(Element));
    }
  }
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;
  ~GuardedRows() { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size() * sizeof(Element)); }

  Element* row(int64_t row) { return memory_.data() + shape_.shift + row * shape_.stride(); }

  RowLayout layout() const {
    RowLayout layout;
    layout.num_dims = 1;
    layout.sizes[0] = shape_.num_rows;
    layout.strides[0] = shape_.stride();
    return layout;
  }

  Rows<Element> rows() { return {row(0), layout(), shape_.num_rows, shape_.vocab_size}; }

  // To be read, as the operators make them.
  Rows<const Element> logits(const TokenLoss& loss) {
    using Real = Compute<Element>;
    return {row(0),
            layout(),
            shape_.num_rows,
            shape_.vocab_size,
            {static_cast<Real>(loss.map.scale), static_cast<Real>(loss.map.cap)},
            loss.label_smoothing != 0,
            loss.sums_entropy()};
  }

 private:
  RowShape shape_;
  std::vector<Element> memory_;
};

// Lengths about those where a loop ends and another begins, and any other.
inline int64_t read_vocab_size(FuzzInput& input) {
  const auto near = [&](int64_t multiple) {
    return std::max<int64_t>(1, multiple + input.integer(-2, 2));
  };
  switch (input.integer(0, 7)) {
    case 0:
      return near(kBlockSize);
    case 1:
      return input.integer(1, 2 * kBlockSize + kGroupSize);
    case 2:
    case 3:
    case 4:
      return near(kGroupSize * input.integer(1, 8));
    default:
      return input.integer(1, 2 * kGroupSize);
  }
}

inline RowShape read_shape(FuzzInput& input) {
  RowShape shape{};
  shape.num_rows = input.integer(1, 2);
  shape.vocab_size = read_vocab_size(input);
  shape.gap = input.integer(0, 9);
  shape.shift = input.integer(0, 7);
  return shape;
}

// Within what checked_token_loss() lets through; for rows of that length.
inline TokenLoss read_loss(FuzzInput& input, int64_t vocab_size) {
  TokenLoss loss;
  loss.k = static_cast<int>(input.integer(0, kMaxTopK));
  loss.ignore_index = -100;
  loss.gate.kind = static_cast<GateKind>(input.integer(0, static_cast<int>(GateKind::kFocal)));
  loss.gate.first = 4 * input.fraction();
  loss.gate.second = 30 * input.fraction();
  loss.gate.normalizer_is_log_k = input.flag();
  if (!loss.gate.normalizer_is_log_k) loss.gate.normalizer = 0.5 + 3 * input.fraction();
  const int family = static_cast<int>(input.integer(0, 15));  // a bit for each of its members
  if (family & 1) loss.map.scale = std::pow(10, 4 * input.fraction() - 3);
  if (family & 2) loss.map.cap = std::pow(10, 5 * input.fraction() - 2);
  if (family & 4) loss.label_smoothing = input.fraction();
  if (family & 8) loss.z_loss = input.fraction();
  loss.tells_entropy = input.flag();
  return for_vocab(loss, vocab_size);
}

// A row by a rule, with some elements that the bytes say.
template <typename Element>
void fill_row(FuzzInput& input, Element* row, int64_t vocab_size) {
  using Real = Compute<Element>;
  const int64_t rule = input.integer(0, 5);
  const double spread = std::pow(10, 6 * input.fraction() - 2);
  std::minstd_rand random(1 + input.byte());
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < vocab_size; ++i) {
    double value = 0;
    switch (rule) {
      case 0:  // all alike
        break;
      case 1:
        value = normal(random);
        break;
      case 2:  // rising
        value = static_cast<double>(i) / static_cast<double>(vocab_size);
        break;
      case 3:  // falling
        value = -static_cast<double>(i) / static_cast<double>(vocab_size);
        break;
      case 4:  // few values, with many ties
        value = static_cast<double>(random() % 4);
        break;
      default:  // nearly all masked
        value = random() % 64 == 0 ? normal(random) : -std::numeric_limits<double>::infinity();
    }
    row[i] = from_real<Element>(static_cast<Real>(spread * value));
  }
  for (int64_t count = input.integer(0, 12); count > 0; --count) {
    const int64_t place = input.integer(0, 0xffff) % vocab_size;
    row[place] = from_real<Element>(static_cast<Real>(input.any_float()));
  }
}

}  // namespace eaft_ext::cpu
