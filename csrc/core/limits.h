// What the kernels of every device can do; also shown to Python by module.cpp.
#pragma once

namespace eaft_ext {

constexpr int kMinTopK = 2;
constexpr int kMaxTopK = 128;

}  // namespace eaft_ext
