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
  std::fill_n(partial + kPartialTop, loss.k, kNone);
  if (loss.label_smoothing != 0) partial[kPartialTop + loss.k] = 0;
}

// The partial of a scanned row, which is clear so far. column: the label's place in the row, which
// may be outside.
template <typename Element>
void finish_partial(const Rows<const Element>& rows, int64_t row, RowScan<Compute<Element>> scan,
                    int64_t label, int64_t column, const TokenLoss& loss,
                    Compute<Element>* partial) {
  const bool has_target = column >= 0 && column < rows.vocab_size;
  write_partial_head(partial, label, total_sum(rows, scan).sum,
                     has_target ? rows.logit(row, column) : partial[kPartialTarget]);
  using Real = Compute<Element>;
  if (loss.label_smoothing != 0) {
    partial[kPartialTop + loss.k] = static_cast<Real>(sum_of_logits(rows, scan));
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
    if (loss.label_smoothing != 0) sum_of_logits += partial[kPartialTop + loss.k];
  }
  double values[kMaxTopK];
  const int count = merge_top_k(partials, loss.k, values);
  const auto token = token_stats<double>(for_k(loss.gate, count), total.max, std::log(total.sum),
                                         target.get(), topk_entropy(values, count));
  return with_family(token, loss, sum_of_logits);
}

}  // namespace eaft_ext::cpu
