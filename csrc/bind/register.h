// One registration function per op; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace pyloss {

void register_about(pybind11::module_& m);
void register_aldr(pybind11::module_& m);
void register_betti_matching(pybind11::module_& m);
void register_frame_pca(pybind11::module_& m);
void register_gemm(pybind11::module_& m);
void register_linear_cross_entropy(pybind11::module_& m);
void register_lion_k(pybind11::module_& m);
void register_margin_shift(pybind11::module_& m);
void register_permutahedron(pybind11::module_& m);
void register_row_moments(pybind11::module_& m);
void register_row_softmax(pybind11::module_& m);
void register_segment(pybind11::module_& m);
void register_similarity_softmax(pybind11::module_& m);
void register_similarity_topk(pybind11::module_& m);
void register_sorting_network(pybind11::module_& m);
void register_tensor_attention(pybind11::module_& m);
void register_tensor_attention_lowrank(pybind11::module_& m);

}  // namespace pyloss
