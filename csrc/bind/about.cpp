// What the compiled module says of itself: version, CUDA, instruction set, records.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/register.h"
#include "common/compiler.h"
#if PYLOSS_WITH_CUDA
#include "cuda/device.h"
#endif

#ifndef PYLOSS_VERSION
#error "PYLOSS_VERSION comes from the build system"
#endif
#ifndef PYLOSS_CUDA_ARCHS
#define PYLOSS_CUDA_ARCHS ""
#endif
#ifndef PYLOSS_WITH_CUDA
#define PYLOSS_WITH_CUDA 0
#endif

namespace pyloss {
namespace {

const char* simd_level() {
#if PYLOSS_HAS_MULTIVERSION
  const int level = x86_level();
  return level == 4 ? "x86-64-v4 (AVX-512)" : level == 3 ? "x86-64-v3 (AVX2)" : "x86-64";
#else
  return "compiler default";
#endif
}

std::string cuda_driver_problem() {
#if PYLOSS_WITH_CUDA
  return cuda::driver_problem();
#else
  return {};
#endif
}

int cuda_device_count() {
#if PYLOSS_WITH_CUDA
  return cuda::device_count();
#else
  return 0;
#endif
}

}  // namespace

void register_about(pybind11::module_& m) {
  m.attr("version") = PYLOSS_VERSION;
  m.attr("built_with_cuda") = bool(PYLOSS_WITH_CUDA);
  m.attr("cuda_archs") = PYLOSS_CUDA_ARCHS;
  m.def("cuda_device_count", [] { return cuda_device_count(); });
  m.def("cuda_driver_problem", [] { return cuda_driver_problem(); });
  m.def("simd_level", [] { return simd_level(); });
  // The fields of the records that the functions of ops read: {record: (field, ...)}, filled by
  // declare_records.
  m.attr("_records") = pybind11::dict();
}

}  // namespace pyloss
