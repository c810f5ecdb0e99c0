// The operators on CPU tensors: allocation, division of the work over threads, registration.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../stable_torch.h"
#include "row_kernels.h"
#include "shard_kernels.h"
#include "tensors.h"

namespace eaft_ext::cpu {
namespace {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// Where there are fewer rows than this for each thread, blocks are shared out instead of rows.
constexpr int64_t kMinRowsPerThread = 4;
// Blocks that are worth a thread's while: 64 KB of float32.
constexpr int64_t kBlocksPerTask = 4;
// And rows of which there is little to do: a microsecond each.
constexpr int64_t kRowsPerTask = 32;

// Row numbers. Work is shared out over the rows that have work, wherever they lie: the labels of a
// padded batch are ignored in long runs.
using RowList = std::vector<int64_t>;

template <typename Predicate>
RowList rows_where(int64_t num_rows, const Predicate& predicate) {
  RowList list;
  list.reserve(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    if (predicate(row)) list.push_back(row);
  }
  return list;
}

template <typename Body>
void for_each_block(const RowList& list, int64_t num_blocks, const Body& body) {
  const int64_t num_items = static_cast<int64_t>(list.size()) * num_blocks;
  parallel_for(0, num_items, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(list[i / num_blocks], i % num_blocks);
  });
}

// How the work on rows is shared out.
enum class Division { kRows, kBlocks };

Division division_of(const RowList& list) {
  const bool few = static_cast<int64_t>(list.size()) < kMinRowsPerThread * get_num_threads();
  return few ? Division::kBlocks : Division::kRows;
}

// Scans the rows of the list and calls finish(row, scan) for each: in one go for a row that a
// thread has to itself, after a barrier where the blocks of a row were shared out.
template <Scan kScan, typename Element, typename Finish>
void scan_rows(const Rows<const Element>& rows, const RowList& list, Division division,
               const Finish& finish) {
  using Real = Compute<Element>;
  const int64_t num_blocks = rows.num_blocks();
  const int64_t num_rows = static_cast<int64_t>(list.size());
  if (division == Division::kBlocks) {
    RowScans<Real> scans(rows, num_rows);
    parallel_for(0, num_rows * num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scan_block<kScan>(rows, list[i / num_blocks], i % num_blocks, scans[i / num_blocks]);
      }
    });
    parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(list[i], scans[i]);
    });
    return;
  }
  parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    RowScans<Real> scans(rows, 1);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t block = 0; block < num_blocks; ++block) {
        scan_block<kScan>(rows, list[i], block, scans[0]);
      }
      finish(list[i], scans[0]);
    }
  });
}

// The forward of the rows of the list, into stats that are zero so far; after_row(row) follows each
// row while it is still in the cache.
template <typename Element, typename AfterRow>
void forward_rows(const ForwardArguments& arguments, const RowList& list, Division division,
                  const Stats& stats, const AfterRow& after_row) {
  const auto rows = rows_of<const Element>(arguments.logits, arguments.loss);
  const int64_t* labels = arguments.labels.const_data_ptr<int64_t>();
  const auto written = stats.of_rows<Compute<Element>>();
  scan_rows<Scan::kSum, Element>(rows, list, division, [&](int64_t row, auto scan) {
    written.write(row, finish_row(rows, row, scan, labels[row], arguments.loss));
    after_row(row);
  });
}

RowList valid_rows(const ForwardArguments& arguments) {
  const int64_t* labels = arguments.labels.const_data_ptr<int64_t>();
  return rows_where(arguments.labels.numel(),
                    [&](int64_t row) { return labels[row] != arguments.loss.ignore_index; });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_cpu(
    const Tensor& logits, const Tensor& labels, int64_t k, StringHandle gate,
    const std::vector<double>& gate_parameters, int64_t ignore_index, bool inplace_backward,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  const ForwardArguments arguments(op, logits, labels, loss);
  // Said before the work is done, not in the backward.
  if (inplace_backward) check_writable(op, logits);
  const Stats stats(logits, num_extra);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    const RowList valid = valid_rows(arguments);
    forward_rows<Element>(arguments, valid, division_of(valid), stats, [](int64_t) {});
  });
  return {stats.loss,    stats.nll,     stats.entropy, stats.gate,
          stats.row_max, stats.log_sum, stats.extra};
}

// Writes the gradient of the logits, which may be written over.
void backward_into(const char* op, const Tensor& gradient, const Tensor& logits,
                   const RowsOfBackward& given, const VocabShard& shard) {
  const Tensor labels = shard.is_whole
                            ? checked_labels(op, given.labels, logits, given.loss.ignore_index)
                            : int64_labels(op, given.labels, logits);
  const Tensor weight = per_row(op, "weight", given.weight, logits);
  const Tensor row_max = per_row(op, "row_max", given.row_max, logits);
  const Tensor log_sum = per_row(op, "log_sum", given.log_sum, logits);
  // Without a z-loss it is not looked at.
  const bool has_z_loss = given.loss.z_loss != 0;
  const Tensor upstream = has_z_loss ? per_row(op, "upstream", *given.upstream, logits) : weight;
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    using Real = Compute<Element>;
    const auto source = rows_of<const Element>(logits, given.loss);
    const auto target = rows_of<Element>(gradient);
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const Real* row_weight = weight.const_data_ptr<Real>();
    const Real* max = row_max.const_data_ptr<Real>();
    const Real* log = log_sum.const_data_ptr<Real>();
    const Real* row_upstream = upstream.const_data_ptr<Real>();
    const auto weights = [&](int64_t row) {
      return row_weights(given.loss, row_upstream[row], row_weight[row], max[row], log[row]);
    };
    const auto is_muted = [&](int64_t row) {
      return label[row] == given.loss.ignore_index || weights(row).muted();
    };
    const auto active = rows_where(source.num_rows, [&](int64_t row) { return !is_muted(row); });
    for_each_block(active, source.num_blocks(), [&](int64_t row, int64_t block) {
      gradient_block(source, target, row, block,
                     {weights(row), max[row], log[row], column_in_shard(label[row], shard.start)});
    });
    for_each_block(rows_where(source.num_rows, is_muted), source.num_blocks(),
                   [&](int64_t row, int64_t block) { zero_block(target, row, block); });
  });
}

Tensor gated_ce_backward_cpu(const Tensor& weight, const Tensor& logits, const Tensor& labels,
                             const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index,
                             std::optional<int64_t> vocab_start, std::optional<int64_t> vocab_size,
                             const std::optional<Tensor>& upstream,
                             const std::vector<double>& family, std::optional<int64_t> num_words) {
  const char* op = "gated_ce_backward";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  const RowsOfBackward rows = checked_rows(
      op, {weight, labels, row_max, log_sum, upstream, checked_family(op, ignore_index, family)},
      logits, num_words);
  return write_gradient_like(logits, [&](const Tensor& source, const Tensor& target) {
    shard.clear_padding(target);
    if (shard.num_words == 0) return;
    backward_into(op, shard.words(target), shard.words(source), rows, shard);
  });
}

void gated_ce_backward_cpu_(const Tensor& weight, Tensor& logits, const Tensor& labels,
                            const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index,
                            std::optional<int64_t> vocab_start, std::optional<int64_t> vocab_size,
                            const std::optional<Tensor>& upstream,
                            const std::vector<double>& family, std::optional<int64_t> num_words) {
  const char* op = "gated_ce_backward_";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  const RowsOfBackward rows = checked_rows(
      op, {weight, labels, row_max, log_sum, upstream, checked_family(op, ignore_index, family)},
      logits, num_words);
  if (logits.size(-1) == 0) return;
  check_writable(op, logits);
  shard.clear_padding(logits);
  const Tensor words = shard.words(logits);
  if (shard.num_words > 0) backward_into(op, words, words, rows, shard);
  mark_written(logits);
}

Tensor gated_ce_partial_cpu(const Tensor& logits, const Tensor& raw_labels, int64_t k,
                            int64_t vocab_start, std::optional<int64_t> vocab_size,
                            int64_t ignore_index, const std::vector<double>& family,
                            bool tells_entropy) {
  const char* op = "gated_ce_partial";
  const VocabShard shard = checked_shard(op, logits, vocab_start, vocab_size);
  check_gate_k(op, k);
  TokenLoss loss = checked_family(op, ignore_index, family);
  loss.k = static_cast<int>(k);
  loss.tells_entropy = tells_entropy;
  const Tensor labels = int64_labels(op, raw_labels, logits);
  const Tensor partials =
      empty(sizes_of_rows(logits, partial_size(loss)), stats_dtype(logits), logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    using Real = Compute<Element>;
    const int64_t* label = labels.const_data_ptr<int64_t>();
    auto* data = partials.mutable_data_ptr<Real>();
    const auto partial = [&](int64_t row) { return data + row * partial_size(loss); };
    for (int64_t row = 0; row < labels.numel(); ++row) {
      clear_partial(partial(row), label[row], loss);
    }
    if (shard.num_words == 0) return;
    const Tensor words = with_readable_rows(shard.words(logits));
    const auto rows = rows_of<const Element>(words, loss);
    const RowList valid =
        rows_where(rows.num_rows, [&](int64_t row) { return label[row] != ignore_index; });
    scan_rows<Scan::kSum, Element>(rows, valid, division_of(valid), [&](int64_t row, auto scan) {
      const int64_t column = column_in_shard(label[row], shard.start);
      finish_partial(rows, row, scan, label[row], column, loss, partial(row));
    });
  });
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_merge_cpu(
    const Tensor& logits, const Tensor& raw_labels, const Tensor& raw_partials, int64_t k,
    StringHandle gate, const std::vector<double>& gate_parameters, int64_t ignore_index,
    int64_t vocab_start, std::optional<int64_t> vocab_size, bool inplace_backward,
    const std::vector<double>& family, std::optional<int64_t> num_words, int64_t num_extra) {
  const char* op = "gated_ce_merge";
  const TokenLoss of_shard =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  checked_shard(op, logits, vocab_start, vocab_size);
  if (inplace_backward && logits.size(-1) > 0) check_writable(op, logits);
  const Tensor labels = int64_labels(op, raw_labels, logits);
  const TokenLoss loss = for_words(of_shard, checked_num_words(op, num_words, logits));
  check_partials(op, raw_partials, labels, stats_dtype(logits), loss);
  const Tensor partials = as_contiguous(raw_partials);
  const Stats stats(logits, num_extra);
  dispatch_element(op, logits, [&](auto* element) {
    using Real = Compute<std::remove_pointer_t<decltype(element)>>;
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const Real* data = partials.const_data_ptr<Real>();
    const int64_t num_rows = labels.numel();
    const auto written = stats.of_rows<Real>();
    parallel_for(0, num_rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<const Real*> of_shards(partials.size(0));
      for (int64_t row = begin; row < end; ++row) {
        if (label[row] == loss.ignore_index) continue;
        for (size_t shard = 0; shard < of_shards.size(); ++shard) {
          of_shards[shard] = data + (shard * num_rows + row) * partial_size(loss);
        }
        written.write(row, merge_row(of_shards, label[row], loss));
      }
    });
  });
  return {stats.loss,    stats.nll,     stats.entropy, stats.gate,
          stats.row_max, stats.log_sum, stats.extra};
}

// The forward into stats, and the gradient of sum(upstream * loss) into gradient, which may be the
// logits.
void forward_with_grad_into(const char* op, const Tensor& gradient, const Stats& stats,
                            const Tensor& raw_upstream, const ForwardArguments& arguments) {
  const Tensor& logits = arguments.logits;
  const Tensor upstream = per_row(op, "upstream", raw_upstream, logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    using Real = Compute<Element>;
    const auto source = rows_of<const Element>(logits, arguments.loss);
    const auto target = rows_of<Element>(gradient);
    const int64_t* label = arguments.labels.const_data_ptr<int64_t>();
    const Real* row_upstream = upstream.const_data_ptr<Real>();
    const auto write_block = [&](int64_t row, int64_t block) {
      const Real weight = row_upstream[row] * stats.gate.const_data_ptr<Real>()[row];
      const Real max = stats.row_max.const_data_ptr<Real>()[row];
      const Real log = stats.log_sum.const_data_ptr<Real>()[row];
      const auto weights = row_weights(arguments.loss, row_upstream[row], weight, max, log);
      if (weights.muted()) return zero_block(target, row, block);
      gradient_block(source, target, row, block, {weights, max, log, label[row]});
    };
    const RowList valid = valid_rows(arguments);
    const Division division = division_of(valid);
    forward_rows<Element>(arguments, valid, division, stats, [&](int64_t row) {
      // A row that a thread has to itself is still in the cache when its stats are known.
      if (division == Division::kBlocks) return;
      for (int64_t block = 0; block < source.num_blocks(); ++block) write_block(row, block);
    });
    if (division == Division::kBlocks) for_each_block(valid, source.num_blocks(), write_block);
    const auto is_ignored = [&](int64_t row) { return label[row] == arguments.loss.ignore_index; };
    for_each_block(rows_where(source.num_rows, is_ignored), source.num_blocks(),
                   [&](int64_t row, int64_t block) { zero_block(target, row, block); });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cpu(
    const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t k,
    StringHandle gate, const std::vector<double>& gate_parameters, int64_t ignore_index,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward_with_grad";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  check_logits(op, logits);
  const Stats stats(logits, num_extra);
  const Tensor gradient =
      write_gradient_like(logits, [&](const Tensor& source, const Tensor& target) {
        const ForwardArguments arguments(op, source, labels, loss);
        forward_with_grad_into(op, target, stats, upstream, arguments);
      });
  return {stats.loss, stats.nll, stats.entropy, stats.gate, stats.extra, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cpu_(
    const Tensor& upstream, Tensor& logits, const Tensor& labels, int64_t k, StringHandle gate,
    const std::vector<double>& gate_parameters, int64_t ignore_index,
    const std::vector<double>& family, int64_t num_extra) {
  const char* op = "gated_ce_forward_with_grad_";
  const TokenLoss loss =
      checked_token_loss(op, k, gate, gate_parameters, ignore_index, family, num_extra);
  const ForwardArguments arguments(op, logits, labels, loss);
  check_writable(op, logits);
  const Stats stats(logits, num_extra);
  forward_with_grad_into(op, logits, stats, upstream, arguments);
  mark_written(logits);
  return {stats.loss, stats.nll, stats.entropy, stats.gate, stats.extra};
}

void scale_gradient_cpu_(Tensor& gradient, const Tensor& factor) {
  const char* op = "scale_gradient_";
  check_logits(op, gradient);
  dispatch_element(op, gradient, [](auto*) {});  // which checks the dtype
  check_writable(op, gradient);
  check_factor(op, factor, gradient);
  if (*factor.const_data_ptr<float>() != 1) call_mul("aten::mul_", gradient, factor);
}

std::tuple<Tensor, Tensor> topk_cpu(const Tensor& raw_logits, int64_t k) {
  const char* op = "topk";
  check_logits(op, raw_logits);
  check_k(op, k, 1, std::min<int64_t>(kMaxTopK, raw_logits.size(-1)));
  const Tensor logits = with_readable_rows(raw_logits);
  const auto sizes = sizes_of_rows(logits, k);
  const Tensor values = empty(sizes, logits.scalar_type(), logits);
  const Tensor indices = empty(sizes, ScalarType::Long, logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<const Element>(logits);
    auto* value = static_cast<Element*>(values.mutable_data_ptr());
    auto* index = indices.mutable_data_ptr<int64_t>();
    const RowList all = rows_where(rows.num_rows, [](int64_t) { return true; });
    scan_rows<Scan::kNan, Element>(rows, all, division_of(all), [&](int64_t row, auto scan) {
      const int top_k = static_cast<int>(k);
      const auto top = has_nan(rows, scan) ? select_top_k_with_nan(rows, row, top_k)
                                           : select_top_k(rows, row, scan.group_max, top_k);
      for (int i = 0; i < top_k; ++i) {
        value[row * k + i] = rows[row][top[i].index];
        index[row * k + i] = top[i].index;
      }
    });
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaft_ext, CPU, m) {
  m.impl("gated_ce_forward", TORCH_BOX(&gated_ce_forward_cpu));
  m.impl("gated_ce_backward", TORCH_BOX(&gated_ce_backward_cpu));
  m.impl("gated_ce_backward_", TORCH_BOX(&gated_ce_backward_cpu_));
  m.impl("gated_ce_partial", TORCH_BOX(&gated_ce_partial_cpu));
  m.impl("gated_ce_merge", TORCH_BOX(&gated_ce_merge_cpu));
  m.impl("gated_ce_forward_with_grad", TORCH_BOX(&gated_ce_forward_with_grad_cpu));
  m.impl("gated_ce_forward_with_grad_", TORCH_BOX(&gated_ce_forward_with_grad_cpu_));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_cpu_));
  m.impl("topk", TORCH_BOX(&topk_cpu));
}

}  // namespace eaft_ext::cpu
