// The row kernels of the CPU on whatever a fuzzer's bytes say, against the definitions
// (plain_row.h) and against each other. What is wrong is told of, and aborts. fuzz_main.cpp or
// libFuzzer calls it.
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "cpu/row_kernels.h"
#include "cpu/shard_kernels.h"
#include "plain_row.h"
#include "row_case.h"

using namespace eaft_ext;
using namespace eaft_ext::cpu;

namespace {

void require(bool holds, const char* what, double found, double expected) {
  if (holds) return;
  std::fprintf(stderr, "%s: %.17g, expected %.17g\n", what, found, expected);
  std::abort();
}

// The same number or the same infinity, or both NaN.
bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void require_near(const char* what, double found, double expected, double tolerance) {
  require(same(found, expected) || std::fabs(found - expected) <= tolerance, what, found, expected);
}

template <typename Real>
constexpr double kEpsilon = std::numeric_limits<Real>::epsilon();

// A row, scanned.
template <typename Element, Scan kScan>
struct ScanOf {
  RowScans<Compute<Element>> memory;
  RowScan<Compute<Element>> scan;

  ScanOf(const Rows<const Element>& rows, int64_t row) : memory(rows, 1), scan(memory[0]) {
    for (int64_t block = 0; block < rows.num_blocks(); ++block) {
      scan_block<kScan>(rows, row, block, scan);
    }
  }
};

// How far a logit may be from its definition. A scale is exact, as rounded; a cap is not.
template <typename Real>
double logit_tolerance(const TokenLoss& loss) {
  return loss.map.cap == 0 ? 0 : 8 * kEpsilon<Real> * loss.map.cap;
}

// And an exponential, beside itself, and a sum of them: the difference of logits, of which it is
// taken, is rounded to kEpsilon times itself. Beyond 90 it is 0 in float, beyond 746 in double.
template <typename Real>
double sum_tolerance(const TokenLoss& loss) {
  constexpr int kLargestDifference = std::is_same_v<Real, double> ? 1024 : 128;
  return kLargestDifference * kEpsilon<Real> + 2 * logit_tolerance<Real>(loss);
}

template <typename Real>
PlainRow plain_row(const std::vector<double>& elements, const TokenLoss& loss) {
  const LogitMap<double> map{static_cast<double>(static_cast<Real>(loss.map.scale)),
                             static_cast<double>(static_cast<Real>(loss.map.cap))};
  return PlainRow(elements, map,
                  [](double x) { return static_cast<double>(static_cast<Real>(x)); });
}

template <typename Real>
void check_token(const TokenStats<double>& token, const PlainRow& plain, int64_t label,
                 const TokenLoss& loss) {
  const double off = sum_tolerance<Real>(loss);
  if (!plain.is_finite) {
    require(std::isnan(token.nll) && std::isnan(token.log_sum), "nll of a row without a softmax",
            token.nll, NAN);
    return;
  }
  const double of_cap = logit_tolerance<Real>(loss);
  require_near("row_max", token.row_max, plain.max, of_cap);
  require_near("log_sum", token.log_sum, std::log(plain.sum), off);
  require_near("nll", token.nll, plain.nll(label), off + 2 * of_cap);
  const double largest = std::log(static_cast<double>(plain.logits.size()));
  require(token.entropy >= 0 && token.entropy <= largest + off, "entropy", token.entropy, largest);
  // Its terms are e^-d d, whose slope is at most 1, and as many as there are words.
  require_near("entropy", token.entropy, plain.entropy(loss.k), 4 * off * (1 + largest));
  if (loss.sums_entropy()) {
    require_near("entropy of all", token.entropy_of_all, plain.entropy(0), 4 * off * (1 + largest));
  }
  require_near("gate", token.gate, plain_gate(loss.gate, token.nll, token.entropy), 1e-9);
  require(token.gate >= 0, "gate", token.gate, 0);
  const double lse = token.row_max + token.log_sum;
  const double mean = plain.sum_of_logits / static_cast<double>(loss.num_words);
  double largest_logit = 0;
  for (const double x : plain.logits) largest_logit = std::max(largest_logit, std::fabs(x));
  // A sum of floats may be infinite where that of doubles is not.
  if (loss.label_smoothing != 0 && std::isfinite(mean) && largest_logit > 1e37) return;
  const double expected = plain_loss(loss, token.gate, token.nll, lse, mean);
  const double of_mean = loss.label_smoothing * 32 * kEpsilon<Real> * largest_logit;
  require_near("loss", token.loss, expected,
               1e-9 * std::fabs(expected) + token.gate * (of_mean + 2 * of_cap));
}

// Half the distance to the next number of the element type, and what is below its normal range.
template <typename Element>
double rounding(double value) {
  const double magnitude = std::fabs(value);
  if constexpr (std::is_same_v<Element, BFloat16>) return magnitude / 256 + 1e-38;
  if constexpr (std::is_same_v<Element, Half>) return magnitude / 2048 + 0x1p-25;
  return kEpsilon<Compute<Element>> * magnitude + std::numeric_limits<Compute<Element>>::min();
}

// Beyond, a number of the element type may be infinite.
template <typename Element>
constexpr double kLargest = std::is_same_v<Element, Half> ? 65000 : 1e37;

template <typename Element>
void check_gradient(Element* gradient, const PlainRow& plain, int64_t label, const TokenLoss& loss,
                    const RowGradient<Compute<Element>>& r) {
  using Real = Compute<Element>;
  const auto map = loss.map;
  const double off = sum_tolerance<Real>(loss);
  for (size_t j = 0; j < plain.logits.size(); ++j) {
    const double found = to_real(gradient[j]);
    if (!plain.is_finite) {
      require(std::isnan(found), "gradient of a row without a softmax", found, NAN);
      continue;
    }
    const bool is_label = static_cast<int64_t>(j) == label;
    const double p = plain.probability(j);
    const double of_all = r.weights.all * p;
    const double of_label = is_label ? -static_cast<double>(r.weights.target) : 0;
    const double t = map.cap == 0 ? 0 : plain.logits[j] / map.cap;
    const double slope = map.scale * (1 - t) * (1 + t);
    const double expected = slope * (of_all + of_label - r.weights.uniform);
    const double terms = std::fabs(of_all) + std::fabs(of_label) + std::fabs(r.weights.uniform);
    double tolerance = slope * (off * std::fabs(of_all) + 8 * kEpsilon<Real> * terms);
    if (map.cap != 0) tolerance += 32 * kEpsilon<Real> * map.scale * terms;
    tolerance += map.scale * std::fabs(r.weights.all) * std::numeric_limits<Real>::min();
    if (!(std::fabs(expected) + tolerance <= kLargest<Element>)) continue;
    require_near("gradient", found, expected, tolerance + rounding<Element>(expected));
  }
}

// The gradient of a row, written beside the logits and over them, which must be the same.
template <typename Element>
void check_backward(const RowShape& shape, GuardedRows<Element>& memory, int64_t row, int64_t label,
                    const PlainRow& plain, const TokenStats<double>& token, const TokenLoss& loss,
                    float upstream) {
  using Real = Compute<Element>;
  const auto row_max = static_cast<Real>(token.row_max);
  const auto log_sum = static_cast<Real>(token.log_sum);
  const Real weight = static_cast<Real>(upstream) * static_cast<Real>(token.gate);
  const RowWeights<Real> weights =
      row_weights(loss, static_cast<Real>(upstream), weight, row_max, log_sum);
  if (weights.muted()) return;
  const RowGradient<Real> r{weights, row_max, log_sum, label};
  GuardedRows<Element> gradients(shape);
  const auto logits = memory.logits(loss);
  const auto beside = gradients.rows();
  for (int64_t block = 0; block < logits.num_blocks(); ++block) {
    gradient_block(logits, beside, row, block, r);
  }
  // Else its factor may be infinite, as the loss is.
  const bool usual = std::isfinite(weights.target) && std::isfinite(weights.uniform) &&
                     loss.map.scale * std::fabs(weights.all) < kLargest<float>;
  if (usual) check_gradient(gradients.row(row), plain, label, loss, r);
  const auto over = memory.rows();
  for (int64_t block = 0; block < logits.num_blocks(); ++block) {
    gradient_block(logits, over, row, block, r);
  }
  for (int64_t j = 0; j < shape.vocab_size; ++j) {
    const double found = to_real(memory.row(row)[j]);
    const double expected = to_real(gradients.row(row)[j]);
    require(same(found, expected), "gradient over the logits", found, expected);
  }
  for (int64_t block = 0; block < logits.num_blocks(); ++block) zero_block(over, row, block);
  for (int64_t j = 0; j < shape.vocab_size; ++j) {
    require(to_real(memory.row(row)[j]) == 0, "a muted gradient", to_real(memory.row(row)[j]), 0);
  }
}

// The same row in shards, each in memory of its own: they make of it together what one makes alone.
template <typename Element>
void check_shards(FuzzInput& input, const std::vector<Element>& row, int64_t label,
                  const TokenStats<double>& whole, const PlainRow& plain, TokenLoss loss) {
  using Real = Compute<Element>;
  const auto vocab_size = static_cast<int64_t>(row.size());
  std::vector<int64_t> cuts{0, vocab_size};
  for (int64_t count = input.integer(0, 3); count > 0; --count) {
    cuts.push_back(input.integer(0, 0xffff) % (vocab_size + 1));  // shards may have no columns
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<std::vector<Real>> partials;
  std::vector<const Real*> pointers;
  for (size_t shard = 0; shard + 1 < cuts.size(); ++shard) {
    partials.emplace_back(partial_size(loss));
    Real* partial = partials.back().data();
    clear_partial(partial, label, loss);
    const int64_t start = cuts[shard];
    const int64_t size = cuts[shard + 1] - start;
    if (size == 0) continue;
    GuardedRows<Element> memory({1, size, 0, 0});
    std::copy_n(row.data() + start, size, memory.row(0));
    const auto rows = memory.logits(loss);
    const ScanOf<Element, Scan::kSum> scanned(rows, 0);
    finish_partial(rows, 0, scanned.scan, label, column_in_shard(label, start), loss, partial);
  }
  for (const auto& partial : partials) pointers.push_back(partial.data());
  const TokenStats<double> merged = merge_row(pointers, label, loss);
  if (!plain.is_finite) {
    require(std::isnan(merged.nll), "nll of shards without a softmax", merged.nll, NAN);
    return;
  }
  const double off = 2 * sum_tolerance<Real>(loss);
  const double largest = 1 + std::log(static_cast<double>(vocab_size));
  require_near("row_max of shards", merged.row_max, whole.row_max, 0);
  require_near("nll of shards", merged.nll, whole.nll, off);
  require_near("entropy of shards", merged.entropy, whole.entropy, 4 * off * largest);
  require(merged.entropy >= 0, "entropy of shards", merged.entropy, 0);
  require(merged.is_top == whole.is_top, "is_top of shards", merged.is_top, whole.is_top);
  // With another label in one shard there is no loss.
  std::vector<Real> other = partials.front();
  other[kPartialLabel] += 1;
  pointers.front() = other.data();
  const double nll = merge_row(pointers, label, loss).nll;
  require(std::isnan(nll), "nll of shards whose labels differ", nll, NAN);
}

// Values and indices are those of a stable sort: NaN first, the lowest index among equals.
template <typename Element>
void check_top_k(GuardedRows<Element>& memory, int64_t row, int k) {
  const auto rows = memory.logits({});
  const ScanOf<Element, Scan::kNan> scanned(rows, row);
  const auto top = has_nan(rows, scanned.scan) ? select_top_k_with_nan(rows, row, k)
                                               : select_top_k(rows, row, scanned.scan.group_max, k);
  std::vector<int64_t> order(rows.vocab_size);
  std::iota(order.begin(), order.end(), 0);
  const auto value = [&](int64_t i) { return to_real(rows[row][i]); };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
    const bool a_is_nan = std::isnan(value(a));
    const bool b_is_nan = std::isnan(value(b));
    if (a_is_nan != b_is_nan) return a_is_nan;
    return value(a) > value(b) || (!(value(a) < value(b)) && a < b);
  });
  for (int i = 0; i < k; ++i) {
    require(top[i].index == order[i], "index of top-k", static_cast<double>(top[i].index),
            static_cast<double>(order[i]));
    require(same(top[i].value, value(order[i])), "value of top-k", top[i].value, value(order[i]));
  }
}

template <typename Element>
void check_rows(FuzzInput& input) {
  using Real = Compute<Element>;
  const RowShape shape = read_shape(input);
  const TokenLoss loss = read_loss(input, shape.vocab_size);
  const auto top_k =
      static_cast<int>(std::min<int64_t>(input.integer(1, kMaxTopK), shape.vocab_size));
  const float upstream = input.flag() ? 1.0f : input.any_float();
  GuardedRows<Element> memory(shape);
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    fill_row(input, memory.row(row), shape.vocab_size);
  }
  for (int64_t row = 0; row < shape.num_rows; ++row) {
    const int64_t label = input.integer(0, 0xffff) % shape.vocab_size;
    const std::vector<Element> original(memory.row(row), memory.row(row) + shape.vocab_size);
    std::vector<double> elements(shape.vocab_size);
    for (int64_t j = 0; j < shape.vocab_size; ++j) elements[j] = to_real(original[j]);
    const PlainRow plain = plain_row<Real>(elements, loss);
    check_top_k(memory, row, top_k);
    const auto rows = memory.logits(loss);
    const ScanOf<Element, Scan::kSum> scanned(rows, row);
    const TokenStats<double> token = finish_row(rows, row, scanned.scan, label, loss);
    check_token<Real>(token, plain, label, loss);
    check_shards(input, original, label, token, plain, loss);
    check_backward(shape, memory, row, label, plain, token, loss, upstream);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzInput input(data, size);
  switch (input.integer(0, 3)) {
    case 0:
      check_rows<float>(input);
      break;
    case 1:
      check_rows<double>(input);
      break;
    case 2:
      check_rows<BFloat16>(input);
      break;
    default:
      check_rows<Half>(input);
  }
  return 0;
}
