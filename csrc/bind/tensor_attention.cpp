// Python boundary of tensor attention: decodes and checks, releases the GIL, calls the kernels.
// pyloss/ops/tensor_attention.py packs the tuple in the order that is read here.
#include "cpu/tensor_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bind/args.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using cpu::TensorAttentionAxis;
using cpu::TensorAttentionProblem;
using ProblemInts = std::array<int64_t, 41>;
using ProblemFloats = std::array<double, 3>;
using StrideInts = std::array<int64_t, 3>;
using GradientInts = std::array<int64_t, 7>;

// Keeps every product of sizes, and the sum of all buffers in bytes, far from overflow.
constexpr int64_t kMostElements = int64_t(1) << 48, kMostPosition = int64_t(1) << 40;

int64_t bounded_count(const char* name, std::initializer_list<int64_t> sizes) {
  const int64_t n = checked_count(name, sizes);
  for (int64_t s : sizes) {
    if (s > INT32_MAX) bad_argument(name, "size above 2^31 - 1");
  }
  if (n > kMostElements) bad_argument(name, "too many elements");
  return n;
}

int64_t checked_position(const char* name, int64_t value) {
  if (value < -kMostPosition || value > kMostPosition) bad_argument(name, "out of range");
  return value;
}

// `head_strides` of (batch, head, row) with contiguous elements.
template <class Strides>
const void* decode_rows(const char* name, int64_t address, const int64_t* from,
                        std::initializer_list<int64_t> sizes, Strides& head_strides) {
  const int64_t n = bounded_count(name, sizes);
  check_strides(name, sizes, {from[0], from[1], from[2], 1});
  for (int i = 0; i < 3; ++i) head_strides[i] = from[i];
  return checked_pointer(name, address, n);
}

TensorAttentionProblem decode(const ProblemInts& a, const ProblemFloats& o) {
  TensorAttentionProblem p{};
  p.batch = a[0];
  p.heads = a[1];
  p.kv_heads = a[2];
  p.n_q = a[3];
  const int64_t n[2] = {a[4], a[5]};
  p.d = a[6];
  p.dv = a[7];
  p.dtype = checked_float("q", a[8]);
  p.q = decode_rows("q", a[9], &a[10], {p.batch, p.heads, p.n_q, p.d}, p.q_strides);
  bounded_count("lse", {p.batch, p.heads, p.n_q});  // also where d is 0
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    bad_argument("k1", "its heads do not divide those of q");
  }
  bounded_count("out", {p.batch, p.heads, p.n_q, p.dv});
  p.scale = o[0];
  const bool causal = a[13] != 0;
  const int64_t offset = checked_position("q_offset", a[16]);
  for (int x = 0; x < 2; ++x) {
    TensorAttentionAxis& axis = p.axes[x];
    const int64_t* b = &a[17 + 12 * x];
    const char* names[] = {x ? "k2" : "k1", x ? "v2" : "v1", x ? "mask2" : "mask1"};
    const int64_t window = checked_position("window", a[14 + x]);
    if (window < 0) bad_argument("window", "negative");
    axis.band = {n[x], window, offset, causal};
    axis.k = decode_rows(names[0], b[0], b + 1, {p.batch, p.kv_heads, n[x], p.d}, axis.k_strides);
    axis.v = decode_rows(names[1], b[4], b + 5, {p.batch, p.kv_heads, n[x], p.dv}, axis.v_strides);
    axis.mask = optional_pointer(b[8]);
    if (axis.mask) {
      decode_rows(names[2], b[8], b + 9, {p.batch, p.heads, p.n_q, n[x]}, axis.mask_strides);
    }
    // The size of a mask's gradient, and of all pairs' offsets into a mask.
    bounded_count(names[2], {p.batch, p.heads, p.n_q, n[x]});
  }
  p.axes[1].bias_k = o[1];
  p.axes[1].bias_v = o[2];
  return p;
}

void* checked_scratch(int64_t address, int64_t bytes, int64_t needed) {
  if (bytes < needed) {
    bad_argument("scratch",
                 "needs " + std::to_string(needed) + " bytes, got " + std::to_string(bytes));
  }
  return checked_pointer("scratch", address, needed);
}

}  // namespace

void register_tensor_attention(py::module_& m) {
  m.def("tensor_attention_scratch_bytes",
        [](const ProblemInts& problem, const ProblemFloats& floats, bool backward,
           bool mask_gradients, int64_t threads) {
          const TensorAttentionProblem p = decode(problem, floats);
          const int width = checked_threads(threads);
          return backward ? cpu::tensor_attention_backward_scratch(p, mask_gradients, width)
                          : cpu::tensor_attention_forward_scratch(p, width);
        });
  m.def("tensor_attention_fwd",
        [](const ProblemInts& problem, const ProblemFloats& floats, int64_t out, int64_t lse,
           int64_t scratch, int64_t scratch_bytes, int64_t threads) {
          const TensorAttentionProblem p = decode(problem, floats);
          const int width = checked_threads(threads);
          const int64_t rows = p.batch * p.heads * p.n_q;
          cpu::TensorAttentionForward f{};
          f.out = checked_pointer("out", out, rows * p.dv);
          f.lse = checked_pointer("lse", lse, rows);
          const int64_t needed = cpu::tensor_attention_forward_scratch(p, width);
          void* buffer = checked_scratch(scratch, scratch_bytes, needed);
          py::gil_scoped_release nogil;
          cpu::tensor_attention_forward(p, f, buffer, width);
        });
  m.def("tensor_attention_bwd", [](const ProblemInts& problem, const ProblemFloats& floats,
                                   int64_t dout, const StrideInts& dout_strides, int64_t dlse,
                                   int64_t out, int64_t lse, const GradientInts& grads,
                                   int64_t scratch, int64_t scratch_bytes, int64_t threads) {
    const TensorAttentionProblem p = decode(problem, floats);
    const int width = checked_threads(threads);
    const int64_t rows = p.batch * p.heads * p.n_q;
    cpu::TensorAttentionBackward b{};
    b.dout = decode_rows("dout", dout, dout_strides.data(), {p.batch, p.heads, p.n_q, p.dv},
                         b.dout_strides);
    b.dlse = optional_pointer(dlse);
    b.out = checked_pointer("out", out, rows * p.dv);
    b.lse = checked_pointer("lse", lse, rows);
    b.dq = optional_pointer(grads[0]);
    for (int x = 0; x < 2; ++x) {
      b.dk[x] = optional_pointer(grads[1 + x]);
      b.dv[x] = optional_pointer(grads[3 + x]);
      b.dmask[x] = optional_pointer(grads[5 + x]);
    }
    const int64_t needed = cpu::tensor_attention_backward_scratch(p, b.mask_gradients(), width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    py::gil_scoped_release nogil;
    cpu::tensor_attention_backward(p, b, buffer, width);
  });
}

}  // namespace pyloss
