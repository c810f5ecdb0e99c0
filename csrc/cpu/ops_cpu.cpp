// The operators on CPU tensors: allocation, division of the work over threads, registration.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "../checks.h"
#include "huge_pages.h"
#include "row_kernels.h"
#include "tensors.h"

namespace eaft_ext::cpu {
namespace {

// Where there are fewer rows than this for each thread, blocks are shared out instead of rows.
constexpr int64_t kMinRowsPerThread = 4;
// Blocks that are worth a thread's while: 64 KB of float32.
constexpr int64_t kBlocksPerTask = 4;

template <typename Body>
void for_each_row(int64_t num_rows, const Body& body) {
  at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

template <typename Body>
void for_each_block(int64_t num_rows, int64_t num_blocks, const Body& body) {
  at::parallel_for(0, num_rows * num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / num_blocks, i % num_blocks);
  });
}

bool has_few_rows(int64_t num_rows) { return num_rows < kMinRowsPerThread * at::get_num_threads(); }

// Scans every row that is not skipped, then calls finish(row, scan): in one go for a row that a
// thread has to itself, after a barrier where the blocks of a row were shared out.
template <Scan kScan, typename Element, typename Skip, typename Finish>
void scan_rows(const Rows<const Element>& rows, const Skip& skip, const Finish& finish) {
  using Real = Compute<Element>;
  const int64_t num_blocks = rows.num_blocks();
  if (has_few_rows(rows.num_rows)) {
    RowScans<Real> scans(rows, rows.num_rows);
    for_each_block(rows.num_rows, num_blocks, [&](int64_t row, int64_t block) {
      if (!skip(row)) scan_block<kScan>(rows, row, block, scans[row]);
    });
    for_each_row(rows.num_rows, [&](int64_t row) {
      if (!skip(row)) finish(row, scans[row]);
    });
    return;
  }
  at::parallel_for(0, rows.num_rows, 1, [&](int64_t begin, int64_t end) {
    RowScans<Real> scans(rows, 1);
    for (int64_t row = begin; row < end; ++row) {
      if (skip(row)) continue;
      for (int64_t block = 0; block < num_blocks; ++block) {
        scan_block<kScan>(rows, row, block, scans[0]);
      }
      finish(row, scans[0]);
    }
  });
}

// The forward; after_row(row) follows each row while it is still in the cache.
template <typename Element, typename AfterRow>
void forward_rows(const ForwardArguments& arguments, const Stats& stats,
                  const AfterRow& after_row) {
  const auto rows = rows_of<const Element>(arguments.logits);
  const int64_t* labels = arguments.labels.const_data_ptr<int64_t>();
  const auto skip = [&](int64_t row) { return labels[row] == arguments.ignore_index; };
  scan_rows<Scan::kSum, Element>(rows, skip, [&](int64_t row, auto scan) {
    const auto token = finish_row(rows, row, scan, labels[row], arguments.k, arguments.gate);
    stats.write(row, token);
    after_row(row);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_cpu(
    const Tensor& logits, const Tensor& labels, int64_t k, std::string_view gate,
    c10::ArrayRef<double> gate_parameters, int64_t ignore_index, bool inplace_backward) {
  const char* op = "gated_ce_forward";
  const ForwardArguments arguments(op, logits, labels, k, gate, gate_parameters, ignore_index);
  // Said before the work is done, not in the backward.
  if (inplace_backward) check_writable(op, logits);
  const Stats stats(logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    forward_rows<Element>(arguments, stats, [](int64_t) {});
  });
  return {stats.loss, stats.nll, stats.entropy, stats.gate, stats.row_max, stats.log_sum};
}

// Writes weight * (softmax(logits) - onehot(labels)) into gradient, which may be the logits.
void backward_into(const char* op, const Tensor& gradient, const Tensor& raw_weight,
                   const Tensor& logits, const Tensor& raw_labels, const Tensor& raw_row_max,
                   const Tensor& raw_log_sum, int64_t ignore_index) {
  const Tensor labels = checked_labels(op, raw_labels, logits, ignore_index);
  const Tensor weight = per_row(op, "weight", raw_weight, logits);
  const Tensor row_max = per_row(op, "row_max", raw_row_max, logits);
  const Tensor log_sum = per_row(op, "log_sum", raw_log_sum, logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    using Real = Compute<Element>;
    const auto source = rows_of<const Element>(logits);
    const auto target = rows_of<Element>(gradient);
    const int64_t* label = labels.const_data_ptr<int64_t>();
    const Real* row_weight = weight.const_data_ptr<Real>();
    const Real* max = row_max.const_data_ptr<Real>();
    const Real* log = log_sum.const_data_ptr<Real>();
    for_each_block(source.num_rows, source.num_blocks(), [&](int64_t row, int64_t block) {
      const Real w = label[row] == ignore_index ? Real(0) : row_weight[row];
      gradient_block(source, target, row, block, {w, max[row], log[row], label[row]});
    });
  });
}

Tensor gated_ce_backward_cpu(const Tensor& weight, const Tensor& raw_logits, const Tensor& labels,
                             const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index) {
  const char* op = "gated_ce_backward";
  check_logits(op, raw_logits);
  const Tensor logits = with_readable_rows(raw_logits);
  const Tensor gradient = empty_gradient(logits);
  backward_into(op, gradient, weight, logits, labels, row_max, log_sum, ignore_index);
  return gradient;
}

void gated_ce_backward_cpu_(const Tensor& weight, Tensor& logits, const Tensor& labels,
                            const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index) {
  const char* op = "gated_ce_backward_";
  check_logits(op, logits);
  check_writable(op, logits);
  backward_into(op, logits, weight, logits, labels, row_max, log_sum, ignore_index);
  mark_written(logits);
}

// The forward, and the gradient of sum(upstream * loss) into gradient, which may be the logits.
Stats forward_with_grad_into(const char* op, const Tensor& gradient, const Tensor& raw_upstream,
                             const ForwardArguments& arguments) {
  const Tensor& logits = arguments.logits;
  const Tensor upstream = per_row(op, "upstream", raw_upstream, logits);
  const Stats stats(logits);
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    using Real = Compute<Element>;
    const auto source = rows_of<const Element>(logits);
    const auto target = rows_of<Element>(gradient);
    const int64_t* label = arguments.labels.const_data_ptr<int64_t>();
    const Real* row_upstream = upstream.const_data_ptr<Real>();
    const auto write_block = [&](int64_t row, int64_t block) {
      const Real weight = row_upstream[row] * stats.gate.const_data_ptr<Real>()[row];
      gradient_block(source, target, row, block,
                     {label[row] == arguments.ignore_index ? Real(0) : weight,
                      stats.row_max.const_data_ptr<Real>()[row],
                      stats.log_sum.const_data_ptr<Real>()[row], label[row]});
    };
    // A row that a thread has to itself is still in the cache when its stats are known.
    const bool fused = !has_few_rows(source.num_rows);
    forward_rows<Element>(arguments, stats, [&](int64_t row) {
      if (!fused) return;
      for (int64_t block = 0; block < source.num_blocks(); ++block) write_block(row, block);
    });
    for_each_block(source.num_rows, source.num_blocks(), [&](int64_t row, int64_t block) {
      if (!fused || label[row] == arguments.ignore_index) write_block(row, block);
    });
  });
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cpu(
    const Tensor& upstream, const Tensor& logits, const Tensor& labels, int64_t k,
    std::string_view gate, c10::ArrayRef<double> gate_parameters, int64_t ignore_index) {
  const char* op = "gated_ce_forward_with_grad";
  const ForwardArguments arguments(op, logits, labels, k, gate, gate_parameters, ignore_index);
  const Tensor gradient = empty_gradient(arguments.logits);
  const Stats stats = forward_with_grad_into(op, gradient, upstream, arguments);
  return {stats.loss, stats.nll, stats.entropy, stats.gate, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_ce_forward_with_grad_cpu_(
    const Tensor& upstream, Tensor& logits, const Tensor& labels, int64_t k, std::string_view gate,
    c10::ArrayRef<double> gate_parameters, int64_t ignore_index) {
  const char* op = "gated_ce_forward_with_grad_";
  const ForwardArguments arguments(op, logits, labels, k, gate, gate_parameters, ignore_index);
  check_writable(op, logits);
  const Stats stats = forward_with_grad_into(op, logits, upstream, arguments);
  mark_written(logits);
  return {stats.loss, stats.nll, stats.entropy, stats.gate};
}

std::tuple<Tensor, Tensor> topk_cpu(const Tensor& raw_logits, int64_t k) {
  const char* op = "topk";
  check_logits(op, raw_logits);
  check_k(op, k, 1, std::min<int64_t>(kMaxTopK, raw_logits.size(-1)));
  const Tensor logits = with_readable_rows(raw_logits);
  auto sizes = logits.sizes().vec();
  sizes.back() = k;
  const Tensor values = at::empty(sizes, logits.options());
  const Tensor indices = at::empty(sizes, logits.options().dtype(at::kLong));
  dispatch_element(op, logits, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<const Element>(logits);
    auto* value = static_cast<Element*>(values.mutable_data_ptr());
    auto* index = indices.mutable_data_ptr<int64_t>();
    const auto skip_none = [](int64_t) { return false; };
    scan_rows<Scan::kNan, Element>(rows, skip_none, [&](int64_t row, auto scan) {
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

TORCH_LIBRARY_IMPL(eaft_ext, CPU, m) {
  m.impl("gated_ce_forward", &gated_ce_forward_cpu);
  m.impl("gated_ce_backward", &gated_ce_backward_cpu);
  m.impl("gated_ce_backward_", &gated_ce_backward_cpu_);
  m.impl("gated_ce_forward_with_grad", &gated_ce_forward_with_grad_cpu);
  m.impl("gated_ce_forward_with_grad_", &gated_ce_forward_with_grad_cpu_);
  m.impl("topk", &topk_cpu);
}

}  // namespace eaft_ext::cpu
