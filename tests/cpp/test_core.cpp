// The plain structs and scalar formulas that host and device share.
#include <cmath>
#include <limits>

#include "check.h"
#include "core/entropy.h"
#include "core/max_sum.h"
#include "core/row_layout.h"
#include "core/token_stats.h"

using namespace eaft_ext;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void parts_merge_to_the_whole() {
  const MaxSum<double> a{3.0, 1.5}, b{5.0, 2.0}, empty;
  CHECK_EQUAL(merge(a, b).max, 5.0);
  CHECK_BELOW(std::fabs(merge(a, b).sum - (2.0 + 1.5 * std::exp(-2.0))), 1e-15);
  CHECK_EQUAL(merge(a, b).sum, merge(b, a).sum);
  CHECK_EQUAL(merge(empty, a).sum, a.sum);
  CHECK_EQUAL(merge(empty, empty).sum, 0.0);
}

void entropy_of_equals_is_the_logarithm() {
  const double equal[4] = {7.0, 7.0, 7.0, 7.0};
  CHECK_BELOW(std::fabs(topk_entropy(equal, 4) - std::log(4.0)), 1e-15);
  const double masked[3] = {1.0, 1.0, -kInfinity};
  CHECK_BELOW(std::fabs(topk_entropy(masked, 3) - std::log(2.0)), 1e-15);
  const double one[2] = {1.0, -kInfinity};
  CHECK_EQUAL(topk_entropy(one, 2), 0.0);
}

void exact_sums_merge() {
  const double two[2] = {3.0, 1.0};
  const double all[4] = {5.0, 4.5, 3.0, 1.0};
  const ExactSums<double> low{3.0, std::exp(-2.0), std::exp(-2.0) * -2.0};
  const ExactSums<double> high{5.0, std::exp(-0.5), std::exp(-0.5) * -0.5};
  const ExactSums<double> nothing;
  const ExactSums<double> masked{-kInfinity, -1.0, 0.0};
  CHECK_BELOW(std::fabs(low.entropy() - topk_entropy(two, 2)), 1e-15);
  for (const auto& merged : {merge(low, high), merge(high, low)}) {
    CHECK_EQUAL(merged.max, 5.0);
    CHECK_BELOW(std::fabs(merged.entropy() - topk_entropy(all, 4)), 1e-15);
  }
  CHECK_EQUAL(merge(nothing, low).entropy(), low.entropy());
  CHECK_EQUAL(merge(low, masked).entropy(), low.entropy());
  CHECK_EQUAL(merge(merge(nothing, masked), low).entropy(), low.entropy());
  const ExactSums<double> far{1e4, 0.0, 0.0};
  CHECK_EQUAL(merge(low, far).entropy(), 0.0);
}

void entropies_of_parts_make_one_of_all() {
  const double first[2] = {5.0, 3.0};
  const double second[2] = {4.5, 1.0};
  const double all[4] = {5.0, 4.5, 3.0, 1.0};
  EntropyOfParts<double> parts;
  parts.add((std::exp(4.5) + std::exp(1.0)) / (std::exp(5.0) + std::exp(3.0)),
            topk_entropy(second, 2));
  parts.add_first(topk_entropy(first, 2));
  parts.add(0.0, std::nan(""));
  CHECK_BELOW(std::fabs(parts.get() - topk_entropy(all, 4)), 1e-15);
}

void what_is_told_besides() {
  const auto top = token_stats(Gate{}, 2.0, 1.5, 2.0, {0.25, 0.75});
  CHECK_EQUAL(extra_stat(top, 0), 3.5);
  CHECK_EQUAL(extra_stat(top, 1), 1.0);
  CHECK_EQUAL(extra_stat(top, 2), 0.75);
  CHECK_EQUAL(top.entropy, 0.25);
  CHECK_EQUAL(token_stats(Gate{}, 2.0, 1.5, 1.0, {0.25}).is_top, 0.0);
  const auto spoiled = token_stats(Gate{}, 2.0, std::nan(""), 2.0, {0.25, 0.75});
  CHECK_EQUAL(std::isnan(spoiled.entropy_of_all), true);
}

void a_muted_token_adds_nothing() {
  Gate gate;
  gate.kind = GateKind::kEntropy;
  gate.first = 1;
  gate.normalizer = std::log(20.0);
  const auto token = token_stats(gate, 2.0, 0.0, -kInfinity, {0.0});
  CHECK_EQUAL(token.nll, kInfinity);
  CHECK_EQUAL(token.gate, 0.0);
  CHECK_EQUAL(token.loss, 0.0);
}

void nan_reaches_every_gate() {
  for (int kind = 0; kind <= static_cast<int>(GateKind::kFocal); ++kind) {
    Gate gate;
    gate.kind = static_cast<GateKind>(kind);
    gate.first = 0.5;
    CHECK_EQUAL(std::isnan(token_stats(gate, 2.0, std::nan(""), 1.0, {1.0}).loss), true);
  }
}

void rows_are_found_through_strides() {
  RowLayout layout;
  layout.num_dims = 2;
  layout.sizes[0] = 3;
  layout.sizes[1] = 4;
  layout.strides[0] = 100;
  layout.strides[1] = 7;
  CHECK_EQUAL(layout.offset(0), 0);
  CHECK_EQUAL(layout.offset(5), 107);
  CHECK_EQUAL(layout.offset(11), 221);
  CHECK_EQUAL(RowLayout{}.offset(0), 0);
  RowLayout large;
  large.num_dims = 1;
  large.sizes[0] = 1 << 20;
  large.strides[0] = 1 << 20;
  CHECK_EQUAL(large.offset((1 << 20) - 1), (int64_t{1} << 40) - (1 << 20));
}

}  // namespace

int main() {
  parts_merge_to_the_whole();
  entropy_of_equals_is_the_logarithm();
  exact_sums_merge();
  entropies_of_parts_make_one_of_all();
  what_is_told_besides();
  a_muted_token_adds_nothing();
  nan_reaches_every_gate();
  rows_are_found_through_strides();
  return failures == 0 ? 0 : 1;
}
