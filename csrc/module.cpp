// The Python module _C: importing it registers the operators, and it tells how it was built. It
// touches no tensors.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "core/limits.h"

#ifndef EAFT_EXT_VERSION
#define EAFT_EXT_VERSION "unknown"
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
  info["torch_version"] = TORCH_VERSION;
  info["cuda_version"] = EAFT_EXT_CUDA_VERSION;
  info["cuda_arch_list"] = EAFT_EXT_CUDA_ARCH_LIST;
  info["compiler"] = compiler();
  info["cxx_standard"] = std::to_string(__cplusplus);
#if defined(_OPENMP)
  info["openmp"] = "yes";
#else
  info["openmp"] = "no";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of eaft_ext: its operators, torch.ops.eaft_ext.*";
  m.def("build_info", &build_info, "How this module was built, as strings.");
  m.attr("MIN_TOP_K") = eaft_ext::kMinTopK;
  m.attr("MAX_TOP_K") = eaft_ext::kMaxTopK;
}
