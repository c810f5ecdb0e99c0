// Blockwise online softmax, top-k selection and cross-entropy gradient of rows of logits. A block
// of a row is the unit of work: a thread takes whole rows where there are many, and blocks of all
// rows where there are few. Both give the same bits, since the blocks of a row are merged in their
// order either way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../core/entropy.h"
#include "../core/max_sum.h"
#include "../core/row_layout.h"
#include "../core/token_loss.h"
#include "../core/token_stats.h"
#include "block_kernels.h"
#include "candidate_list.h"
#include "element_types.h"

namespace eaft_ext::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A (num_rows, vocab_size) tensor: its rows are contiguous, their starts follow the layout. Logits
// are what the map makes of its elements.
template <typename Element>
struct Rows {
  using Real = Compute<std::remove_const_t<Element>>;

  Element* data;
  RowLayout layout;
  int64_t num_rows;
  int64_t vocab_size;
  LogitMap<Real> map{};
  // In a scan:
  bool sums_logits = false;
  bool sums_entropy = false;  // of all logits

  Element* operator[](int64_t row) const { return data + layout.offset(row); }
  Real logit(int64_t row, int64_t column) const {
    Real x = to_real((*this)[row][column]);
    // By the same loop as its row: a label that is the largest is so in every bit.
    if (!map.is_identity()) map_logits(&x, &x, map, 1);
    return x;
  }
  int64_t num_blocks() const { return ceil_div(vocab_size, kBlockSize); }
  int64_t num_groups() const { return ceil_div(vocab_size, kGroupSize); }
  int block_length(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kBlockSize, vocab_size - block * kBlockSize));
  }
};

// What the scan leaves of a row: the maximum of every group, of every block the softmax sum, and if
// asked for the sums that the entropy of all logits takes, and that of its logits.
template <typename Real>
struct RowScan {
  Real* group_max;
  MaxSum<double>* block_sums;
  ExactSums<double>* block_exact;
  double* block_logits;
};

// Scans of num_rows rows in one allocation: vocab_size / kGroupSize numbers each.
template <typename Real>
class RowScans {
 public:
  template <typename Element>
  RowScans(const Rows<Element>& rows, int64_t num_rows)
      : num_groups_(rows.num_groups()),
        num_blocks_(rows.num_blocks()),
        group_max_(num_rows * num_groups_),
        block_sums_(num_rows * num_blocks_),
        block_exact_(num_rows * num_blocks_),
        block_logits_(num_rows * num_blocks_) {}

  RowScan<Real> operator[](int64_t row) {
    return {group_max_.data() + row * num_groups_, block_sums_.data() + row * num_blocks_,
            block_exact_.data() + row * num_blocks_, block_logits_.data() + row * num_blocks_};
  }

 private:
  int64_t num_groups_;
  int64_t num_blocks_;
  std::vector<Real> group_max_;
  std::vector<MaxSum<double>> block_sums_;
  std::vector<ExactSums<double>> block_exact_;
  std::vector<double> block_logits_;
};

// `count` logits of a row in the type they are computed in, filled up to whole groups with -inf: in
// place where that is the row itself, else in `scratch`.
template <typename Element>
const Compute<Element>* load(const Rows<const Element>& rows, const Element* source,
                             Compute<Element>* scratch, int count) {
  using Real = Compute<Element>;
  constexpr bool kConverts = !std::is_same_v<Element, Real>;
  const bool as_they_are = !kConverts && rows.map.is_identity();
  if (as_they_are && count % kGroupSize == 0) return reinterpret_cast<const Real*>(source);
  if constexpr (kConverts) {
    widen(source, scratch, count);
    if (!rows.map.is_identity()) map_logits(scratch, scratch, rows.map, count);
  } else if (rows.map.is_identity()) {
    std::copy_n(source, count, scratch);
  } else {
    map_logits(source, scratch, rows.map, count);
  }
  std::fill(scratch + count, scratch + ceil_div(count, kGroupSize) * kGroupSize,
            -std::numeric_limits<Real>::infinity());
  return scratch;
}

// What a scan takes beside the group maxima: the softmax sum, or, for top-k alone, only whether the
// block has a NaN; its sum is then NaN, else 0.
enum class Scan { kNan, kSum };

template <Scan kScan, typename Element>
void scan_block(const Rows<const Element>& rows, int64_t row, int64_t block,
                RowScan<Compute<Element>> scan) {
  using Real = Compute<Element>;
  Real scratch[kBlockSize];
  const int length = rows.block_length(block);
  const Element* source = rows[row] + block * kBlockSize;
  const Real* x = load(rows, source, scratch, length);
  const int padded = static_cast<int>(ceil_div(length, kGroupSize)) * kGroupSize;
  Real* group_max = scan.group_max + block * kGroupsPerBlock;
  group_maxima(x, group_max, padded);
  if constexpr (kScan == Scan::kNan) {
    const bool has_nan = any_nan(x, padded);
    scan.block_sums[block] = {0, has_nan ? std::numeric_limits<double>::quiet_NaN() : 0.0};
  } else {
    const Real max = *std::max_element(group_max, group_max + padded / kGroupSize);
    // A block of -inf alone: any finite reference gives the sum 0, -inf would give NaN.
    const Real reference = max == -std::numeric_limits<Real>::infinity() ? Real(0) : max;
    const Ahead next_block{reinterpret_cast<const char*>(source) + kBlockSize * sizeof(Element),
                           sizeof(Element)};
    if (rows.sums_entropy) {
      const SumAndExact sums = sum_and_exact(x, reference, padded, next_block);
      scan.block_sums[block] = {max, sums.sum};
      scan.block_exact[block] = {max, sums.exact.rest, sums.exact.weighted};
    } else {
      scan.block_sums[block] = {max, exp_sum(x, reference, padded, next_block)};
    }
    if (rows.sums_logits) scan.block_logits[block] = sum(x, length);
  }
}

template <typename Element>
bool has_nan(const Rows<const Element>& rows, RowScan<Compute<Element>> scan) {
  return std::any_of(scan.block_sums, scan.block_sums + rows.num_blocks(),
                     [](const auto& block) { return block.sum != block.sum; });
}

// A value that at least k elements of the row reach, as high as the group maxima tell cheaply: the
// k-th largest of about 4 k maxima, each over a run of groups.
template <typename Real>
Real top_k_threshold(const Real* group_max, int64_t num_groups, int k) {
  const int64_t run = std::max<int64_t>(1, num_groups / (4 * k));
  std::vector<Real> maxima;
  maxima.reserve(ceil_div(num_groups, run));
  for (int64_t begin = 0; begin < num_groups; begin += run) {
    const int64_t end = std::min(begin + run, num_groups);
    maxima.push_back(*std::max_element(group_max + begin, group_max + end));
  }
  if (maxima.size() < static_cast<size_t>(k)) return -std::numeric_limits<Real>::infinity();
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<Real>());
  return maxima[k - 1];
}

// The k largest elements of a scanned row without NaN, in their order.
template <typename Element>
std::vector<Candidate<Compute<Element>>> select_top_k(const Rows<const Element>& rows, int64_t row,
                                                      const Compute<Element>* group_max, int k) {
  using Real = Compute<Element>;
  CandidateList<Real> top(k, top_k_threshold(group_max, rows.num_groups(), k));
  Real scratch[kGroupSize];
  for (int64_t group = 0; group < rows.num_groups(); ++group) {
    if (!top.accepts(group_max[group])) continue;
    const int64_t begin = group * kGroupSize;
    const int length = static_cast<int>(std::min<int64_t>(kGroupSize, rows.vocab_size - begin));
    const Real* x = load(rows, rows[row] + begin, scratch, length);
    bool reaching[kGroupSize];
    reaching_of_group(x, top.threshold(), reaching);
    for (int eight = 0; eight < length; eight += 8) {
      uint64_t any;  // eight answers at a time: nearly all are no
      std::memcpy(&any, reaching + eight, 8);
      if (any == 0) continue;
      for (int i = eight; i < std::min(eight + 8, length); ++i) {
        if (reaching[i]) top.offer(x[i], begin + i);
      }
    }
  }
  return top.sorted();
}

// The same of a row with NaN, which comes before every number, as torch.topk has it. Such a row is
// an accident, not a case to be fast for.
template <typename Element>
std::vector<Candidate<Compute<Element>>> select_top_k_with_nan(const Rows<const Element>& rows,
                                                               int64_t row, int k) {
  std::vector<Candidate<Compute<Element>>> all(rows.vocab_size);
  for (int64_t i = 0; i < rows.vocab_size; ++i) all[i] = {to_real(rows[row][i]), i};
  std::partial_sort(all.begin(), all.begin() + k, all.end(), [](const auto& a, const auto& b) {
    const bool a_is_nan = a.value != a.value;
    const bool b_is_nan = b.value != b.value;
    if (a_is_nan || b_is_nan) return a_is_nan && (!b_is_nan || a.index < b.index);
    return ComesFirst()(a, b);
  });
  all.resize(k);
  return all;
}

// The softmax denominator of a scanned row.
template <typename Element>
MaxSum<double> total_sum(const Rows<const Element>& rows, RowScan<Compute<Element>> scan) {
  MaxSum<double> total;
  for (int64_t block = 0; block < rows.num_blocks(); ++block) {
    total = merge(total, scan.block_sums[block]);
  }
  return total;
}

// The entropy of all logits of a scanned row.
template <typename Element>
double entropy_of_all(const Rows<const Element>& rows, RowScan<Compute<Element>> scan) {
  ExactSums<double> total;
  for (int64_t block = 0; block < rows.num_blocks(); ++block) {
    total = merge(total, scan.block_exact[block]);
  }
  return total.entropy();
}

template <typename Element>
double sum_of_logits(const Rows<const Element>& rows, RowScan<Compute<Element>> scan) {
  return std::accumulate(scan.block_logits, scan.block_logits + rows.num_blocks(), 0.0);
}

// The stats of a scanned row. label is in [0, vocab_size), loss.k at most vocab_size. These few
// operations are done in double, which costs nothing beside the scan.
template <typename Element>
TokenStats<double> finish_row(const Rows<const Element>& rows, int64_t row,
                              RowScan<Compute<Element>> scan, int64_t label,
                              const TokenLoss& loss) {
  const MaxSum<double> total = total_sum(rows, scan);
  Entropies<double> entropy{};
  if (loss.sums_entropy()) {
    entropy.of_all = entropy_of_all(rows, scan);
    entropy.of_gate = entropy.of_all;
  }
  if (loss.k > 0) {
    double values[kMaxTopK];
    const auto top = select_top_k(rows, row, scan.group_max, loss.k);
    for (int i = 0; i < loss.k; ++i) values[i] = top[i].value;
    entropy.of_gate = topk_entropy(values, loss.k);
  }
  const double target_logit = rows.logit(row, label);
  const auto token = token_stats(loss.gate, total.max, std::log(total.sum), target_logit, entropy);
  return with_family(token, loss, sum_of_logits(rows, scan));
}

// What the backward needs of a row.
template <typename Real>
struct RowGradient {
  RowWeights<Real> weights;
  Real row_max;  // as the forward saved it
  Real log_sum;
  int64_t label;
};

// A muted row is written without being read.
template <typename Element>
void zero_block(const Rows<Element>& gradient, int64_t row, int64_t block) {
  std::memset(static_cast<void*>(gradient[row] + block * kBlockSize), 0,
              gradient.block_length(block) * sizeof(Element));
}

// At the label, before any rounding: p - 1 by expm1, since close to p = 1 it is all there is.
template <typename Real>
Real label_gradient(const RowGradient<Real>& r, Real logit) {
  const Real log_p = (logit - r.row_max) - r.log_sum;
  const Real gradient = r.weights.target * std::expm1(log_p);
  const Real beside = r.weights.all - r.weights.target;
  return (beside == 0 ? gradient : gradient + beside * std::exp(log_p)) - r.weights.uniform;
}

// One block of (all softmax(x') - target onehot(label) - uniform) dx'/dx. `gradient` may be the
// logits themselves.
template <typename Element>
void gradient_block(const Rows<const Element>& logits, const Rows<Element>& gradient, int64_t row,
                    int64_t block, RowGradient<Compute<Element>> r) {
  using Real = Compute<Element>;
  constexpr bool kConverts = !std::is_same_v<Element, Real>;
  const auto& map = logits.map;
  const int64_t begin = block * kBlockSize;
  const int length = logits.block_length(block);
  Element* target = gradient[row] + begin;
  const Element* source = logits[row] + begin;
  const bool has_label = r.label >= begin && r.label < begin + length;
  // Read before it may be written over.
  const Real at_label = has_label ? label_gradient(r, logits.logit(row, r.label)) : Real(0);
  // The slope of a scale alone is a number, and goes with the others.
  const Real factor = map.cap == 0 ? map.scale : Real(1);
  const Real scale = factor * r.weights.all * std::exp(-r.log_sum);
  Real scratch[kBlockSize];
  const Real* x = load(logits, source, scratch, length);
  // Where it fits: in the gradient itself, or over x, but for a cap, whose slope is of x.
  [[maybe_unused]] Real beside_x[kConverts ? kBlockSize : 1];
  Real* result;
  if constexpr (kConverts) {
    result = map.cap == 0 ? scratch : beside_x;
  } else {
    result = target;
  }
  scaled_exp(x, result, r.row_max, scale, length);
  if (r.weights.uniform != 0) subtract(result, factor * r.weights.uniform, length);
  if (has_label) result[r.label - begin] = factor * at_label;
  if (map.cap != 0) times_slope(result, x, map, length);
  if constexpr (kConverts) narrow(result, target, length);
}

}  // namespace eaft_ext::cpu
