// The Python module _C: how the compiled part was built, and its limits. It knows nothing of torch:
// the operators are a library of their own, for every Python.
#include <pybind11/pybind11.h>

#include <string>

#include "core/limits.h"

#ifndef EAFT_EXT_VERSION
#define EAFT_EXT_VERSION "unknown"
#endif
#ifndef EAFT_EXT_TORCH_VERSION
#define EAFT_EXT_TORCH_VERSION "unknown"
#endif
#ifndef EAFT_EXT_CUDA_VERSION
#define EAFT_EXT_CUDA_VERSION ""
#endif
#ifndef EAFT_EXT_CUDA_ARCH_LIST
#define EAFT_EXT_CUDA_ARCH_LIST ""
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = EAFT_EXT_VERSION;
  info["torch_version"] = EAFT_EXT_TORCH_VERSION;
  info["cuda_version"] = EAFT_EXT_CUDA_VERSION;
  info["cuda_arch_list"] = EAFT_EXT_CUDA_ARCH_LIST;
  info["compiler"] = compiler();
  info["cxx_standard"] = std::to_string(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the compiled part of eaft_ext was built, and its limits.";
  m.def("build_info", &build_info, "How the compiled part was built, as strings.");
  m.attr("MIN_TOP_K") = eaft_ext::kMinTopK;
  m.attr("MAX_TOP_K") = eaft_ext::kMaxTopK;
}
