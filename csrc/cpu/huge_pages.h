// The gradient of a large batch of logits is hundreds of megabytes of fresh memory. Where the
// system hands out huge pages on request, asking for them saves a page fault for every 4 KB.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace eaft_ext::cpu {

// An uninitialised tensor like the logits: the same dtype, the same strides where those are dense.
inline at::Tensor empty_gradient(const at::Tensor& logits) {
  at::Tensor gradient = at::empty_like(logits);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // From this size on, glibc takes memory from the system and gives it back when it is freed.
  constexpr size_t kFreshMapping = size_t{32} << 20;
  if (gradient.nbytes() < kFreshMapping) return gradient;
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(gradient.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + gradient.nbytes()) / kHugePage * kHugePage;
  // A refusal changes nothing but the speed.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return gradient;
}

}  // namespace eaft_ext::cpu
