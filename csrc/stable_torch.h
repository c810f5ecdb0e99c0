// What this library takes of torch: tensors, their memory, threads. All of it is in torch's stable
// ABI, so that one build loads into every torch from 2.10 on (TORCH_TARGET_VERSION, setup.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "sentence.h"

namespace eaft_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A string as the dispatcher hands it over, to be freed by who takes it. torch's conversion to
// std::string leaks one at each call.
class OwnedString {
 public:
  explicit OwnedString(StringHandle handle) : handle_(handle) {}
  ~OwnedString() { torch_delete_string(handle_); }
  OwnedString(const OwnedString&) = delete;
  OwnedString& operator=(const OwnedString&) = delete;

  std::string_view view() const {
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

// Contiguous and uninitialised, on the device of another. Errors of torch do not cross the ABI:
// that there is no memory is said anew, in the words by which training loops know it.
inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               code, device_type, like.get_device_index(),
                               &made) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(sentence(
        like.is_cpu() ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.",
        " eaft_ext tried to allocate ", dtype, " of sizes ", sizes, " on ", like.device()));
  }
  return Tensor(made);
}

inline Tensor zeros_on_host(Sizes sizes, ScalarType dtype, const Tensor& like) {
  const Tensor result = empty(sizes, dtype, like);
  // Without elements there may be no memory.
  const int64_t bytes = result.numel() * result.element_size();
  if (bytes > 0) std::memset(result.mutable_data_ptr(), 0, bytes);
  return result;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of a dtype, and contiguous: the tensor itself where it is so.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// Columns [begin, begin + count) of (..., V).
inline Tensor columns(const Tensor& tensor, int64_t begin, int64_t count) {
  if (begin == 0 && count == tensor.size(-1)) return tensor;
  Tensor all = tensor;
  return torch::stable::narrow(all, -1, begin, count);
}

inline void set_zero(const Tensor& tensor) {
  Tensor target = tensor;
  torch::stable::zero_(target);
}

inline void copy_into(const Tensor& target, const Tensor& source) {
  Tensor written = target;
  torch::stable::copy_(written, source);
}

// aten::mul or mul_: what the stable headers have no function for goes through the dispatcher.
inline Tensor call_mul(const char* op, const Tensor& first, const Tensor& second) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(first),
                                    torch::stable::detail::from(second)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Lets autograd notice that what it may have saved for another operator is gone. The ABI has no
// version counters; a copy to itself moves nothing and counts as writing.
inline void mark_written(const Tensor& tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(tensor.get(), tensor.get(), 0));
}

}  // namespace eaft_ext
