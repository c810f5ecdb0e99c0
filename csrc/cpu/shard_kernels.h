// Vocabulary-parallel cross-entropy: what one shard of the vocabulary tells of a row, and what all
// of them make of it together (core/shard_partial.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../core/shard_partial.h"
#include "row_kernels.h"

namespace eaft_ext::cpu {

// Partials of a row that nothing is known of, or whose label is ignored.
template <typename Real>
void clear_partial(Real* partial, int64_t label, const TokenLoss& loss) {
  constexpr Real kNone = std::numeric_limits<Real>::quiet_NaN();
  write_partial_head(partial, label, 0, kNone);
  std::fill_n(partial + kPartialTop, partial_top_size(loss), kNone);
  std::fill(partial + partial_entropy(loss), partial + partial_size(loss), Real(0));
}

// The partial of a scanned row, which is clear so far. column: the label's place in the row, which
// may be outside.
template <typename Element>
void finish_partial(const Rows<const Element>& rows, int64_t row, RowScan<Compute<Element>> scan,
                    int64_t label, int64_t column, const TokenLoss& loss,
                    Compute<Element>* partial) {
  const bool has_target = column >= 0 && column < rows.vocab_size;
  using Real = Compute<Element>;
  const MaxSum<double> total = total_sum(rows, scan);
  write_partial_head(partial, label, total.sum,
                     has_target ? rows.logit(row, column) : partial[kPartialTarget]);
  if (loss.sums_entropy()) {
    partial[partial_entropy(loss)] = static_cast<Real>(entropy_of_all(rows, scan));
  }
  if (loss.label_smoothing != 0) {
    partial[partial_logits(loss)] = static_cast<Real>(sum_of_logits(rows, scan));
  }
  if (loss.k == 0) {
    partial[kPartialTop] = static_cast<Real>(total.max);
    return;
  }
  const auto count = static_cast<int>(std::min<int64_t>(loss.k, rows.vocab_size));
  const auto top = select_top_k(rows, row, scan.group_max, count);
  for (int i = 0; i < count; ++i) partial[kPartialTop + i] = top[i].value;
}

// The k largest of the shards' k largest, which come in their order; gives how many there are.
template <typename Real>
int merge_top_k(const std::vector<const Real*>& partials, int k, double* values) {
  std::vector<int> taken(partials.size());
  for (int i = 0; i < k; ++i) {
    int best = -1;
    for (int shard = 0; shard < static_cast<int>(partials.size()); ++shard) {
      if (taken[shard] == k) continue;
      const Real value = partials[shard][kPartialTop + taken[shard]];
      if (value == value && (best < 0 || value > values[i])) {
        best = shard;
        values[i] = value;
      }
    }
    if (best < 0) return i;
    ++taken[best];
  }
  return k;
}

// The entropy of all logits from what the shards tell of their own. max: of all.
template <typename Real>
double merge_entropies(const std::vector<const Real*>& partials, double max,
                       const TokenLoss& loss) {
  const auto mass = [&](const Real* partial) {
    const MaxSum<double> of_shard = max_sum_of_partial(partial);
    return of_shard.max == max ? of_shard.sum : of_shard.sum * std::exp(of_shard.max - max);
  };
  const auto first = *std::max_element(partials.begin(), partials.end(),
                                       [&](auto a, auto b) { return mass(a) < mass(b); });
  EntropyOfParts<double> entropy;
  for (const Real* partial : partials) {
    const double of_shard = partial[partial_entropy(loss)];
    if (partial == first) {
      entropy.add_first(of_shard);
    } else {
      entropy.add(mass(partial) / mass(first), of_shard);
    }
  }
  return entropy.get();
}

// The stats of a row from the partials of all shards.
template <typename Real>
TokenStats<double> merge_row(const std::vector<const Real*>& partials, int64_t label,
                             const TokenLoss& loss) {
  MaxSum<double> total;
  TargetOfShards<Real> target{static_cast<Real>(label)};
  double sum_of_logits = 0;
  for (const Real* partial : partials) {
    total = merge(total, max_sum_of_partial(partial));
    target.add(partial);
    if (loss.label_smoothing != 0) sum_of_logits += partial[partial_logits(loss)];
  }
  Gate gate = loss.gate;
  Entropies<double> entropy{};
  if (loss.sums_entropy()) {
    entropy.of_all = merge_entropies(partials, total.max, loss);
    entropy.of_gate = entropy.of_all;
  }
  if (loss.k > 0) {
    double values[kMaxTopK];
    const int count = merge_top_k(partials, loss.k, values);
    gate = for_k(gate, count);
    entropy.of_gate = topk_entropy(values, count);
  }
  const auto token =
      token_stats<double>(gate, total.max, std::log(total.sum), target.get(), entropy);
  return with_family(token, loss, sum_of_logits);
}

}  // namespace eaft_ext::cpu
