// The extension module pyloss._C. No torch header is included anywhere in csrc/: one build serves
// every torch version.
#include <pybind11/pybind11.h>

#include "bind/register.h"

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of pyloss. Private: called by pyloss.ops only.";
  pyloss::register_about(m);
  m.def("fields", [m](const char* op) { return pybind11::dict(m.attr("_records"))[op]; });
  pyloss::register_aldr(m);
  pyloss::register_betti_matching(m);
  pyloss::register_frame_pca(m);
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
