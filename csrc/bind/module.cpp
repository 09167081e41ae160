// The extension module pyloss._C. No torch header is included anywhere in csrc/: one build serves
// every torch version.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/register.h"
#include "common/multiversion.h"
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

namespace {

const char* simd_level() {
#if PYLOSS_HAS_MULTIVERSION
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#else
  return "compiler default";
#endif
}

std::string cuda_driver_problem() {
#if PYLOSS_WITH_CUDA
  return pyloss::cuda::driver_problem();
#else
  return {};
#endif
}

int cuda_device_count() {
#if PYLOSS_WITH_CUDA
  return pyloss::cuda::device_count();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of pyloss. Private: called by pyloss.ops only.";
  m.attr("version") = PYLOSS_VERSION;
  m.attr("built_with_cuda") = bool(PYLOSS_WITH_CUDA);
  m.attr("cuda_archs") = PYLOSS_CUDA_ARCHS;
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_driver_problem", &cuda_driver_problem);
  m.def("simd_level", &simd_level);
  // The fields of the records that the functions below read: {record: (field, ...)}, filled by
  // declare_records.
  m.attr("_records") = pybind11::dict();
  m.def("fields", [m](const char* op) { return pybind11::dict(m.attr("_records"))[op]; });
  pyloss::register_aldr(m);
  pyloss::register_betti_matching(m);
  pyloss::register_gemm(m);
  pyloss::register_linear_cross_entropy(m);
  pyloss::register_lion_k(m);
  pyloss::register_margin_shift(m);
  pyloss::register_permutahedron(m);
  pyloss::register_row_moments(m);
  pyloss::register_row_softmax(m);
  pyloss::register_segment(m);
  pyloss::register_similarity_softmax(m);
  pyloss::register_similarity_topk(m);
  pyloss::register_sorting_network(m);
  pyloss::register_tensor_attention(m);
  pyloss::register_tensor_attention_lowrank(m);
}
