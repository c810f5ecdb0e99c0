// Sentences put together from values, and the error that says one.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace eaft_ext {

template <typename Value>
void write(std::ostream& stream, const Value& value) {
  stream << value;
}

inline void write(std::ostream& stream, torch::headeronly::ScalarType dtype) {
  stream << torch::headeronly::toString(dtype);
}

template <typename Value>
void write(std::ostream& stream, torch::headeronly::HeaderOnlyArrayRef<Value> values) {
  stream << '[';
  const char* separator = "";
  for (const Value& value : values) {
    stream << separator << value;
    separator = ", ";
  }
  stream << ']';
}

template <typename Value>
void write(std::ostream& stream, const std::vector<Value>& values) {
  write(stream, torch::headeronly::HeaderOnlyArrayRef<Value>(values));
}

inline void write(std::ostream& stream, const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  switch (device.type()) {
    case DeviceType::CPU:
      stream << "cpu";
      return;
    case DeviceType::CUDA:
      stream << "cuda:" << device.index();
      return;
    case DeviceType::Meta:
      stream << "meta";
      return;
    default:
      stream << "another device";
  }
}

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream stream;
  (write(stream, parts), ...);
  return stream.str();
}

// A ValueError, to Python.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(sentence(parts...));
}

}  // namespace eaft_ext
