// Top-k selection with a threshold: the k largest elements of a row, without sorting it and without
// reading it twice.
//
// The scan of the row leaves the maximum of every group of kGroupSize elements. The k-th largest of
// any k or more disjoint maxima is a threshold: k elements are at least as large. So the selection
// looks only into the groups whose maximum reaches it, about k of them, wherever the large elements
// lie and in whatever order they come.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "../core/limits.h"
#include "block_kernels.h"

namespace eaft_ext::cpu {

template <typename Real>
struct Candidate {
  Real value;
  int64_t index;
};

// The larger value first, the lower index first among equals. A type, not a function: that would be
// called for every comparison of a sort.
struct ComesFirst {
  template <typename Real>
  bool operator()(const Candidate<Real>& a, const Candidate<Real>& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
};

// The k best of the candidates offered, which come in the order of their indices.
template <typename Real>
class CandidateList {
 public:
  CandidateList(int k, Real threshold) : k_(k), threshold_(threshold) {
    candidates_.reserve(kSlack * k);
  }

  // Whether a candidate of this value, with a higher index than all before, can be among the k
  // best: once k of them are known, one that equals the last comes too late.
  bool accepts(Real value) const { return full_ ? value > threshold_ : value >= threshold_; }

  // No smaller value is accepted.
  Real threshold() const { return threshold_; }

  void offer(Real value, int64_t index) {
    if (!accepts(value)) return;
    candidates_.push_back({value, index});
    if (candidates_.size() == static_cast<size_t>(kSlack * k_)) shrink();
  }

  // The k best in their order. Where fewer were offered, the rest are -inf at index 0.
  const std::vector<Candidate<Real>>& sorted() {
    if (candidates_.size() > static_cast<size_t>(k_)) shrink();
    candidates_.resize(k_, {-std::numeric_limits<Real>::infinity(), 0});
    std::sort(candidates_.begin(), candidates_.end(), ComesFirst());
    return candidates_;
  }

 private:
  static constexpr int kSlack = 4;

  void shrink() {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end(),
                     ComesFirst());
    candidates_.resize(k_);
    threshold_ = candidates_.back().value;
    full_ = true;
  }

  int k_;
  Real threshold_;
  bool full_ = false;
  std::vector<Candidate<Real>> candidates_;
};

}  // namespace eaft_ext::cpu
