// Python boundary of tensor attention: decodes and checks, releases the GIL, calls the kernels.
#include "cpu/tensor_attention.h"

#include <pybind11/pybind11.h>

#include <array>

#include "bind/args.h"
#include "bind/attention.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using cpu::TensorAttentionAxis;
using cpu::TensorAttentionProblem;

constexpr int64_t kMostElements = int64_t(1) << 48, kMostPosition = int64_t(1) << 40;

// Strides are of all four dimensions, in elements; the last is 1 where it has more than one.
PYLOSS_RECORD(Problem, batch, heads, kv_heads, n_q, d, dv, dtype, scale, softcap, causal, q_offset,
              q, q_strides, axis1, axis2);
PYLOSS_RECORD(Axis, n, window, k, k_strides, v, v_strides, bias_k, bias_v, mask, mask_strides);
PYLOSS_RECORD(Backward, dout, dout_strides, dlse, out, lse, dq, dk1, dk2, dv1, dv2, dmask1, dmask2);

TensorAttentionAxis decode_axis(const Reader<Axis>& r, const TensorAttentionProblem& p, bool causal,
                                int64_t q_offset) {
  TensorAttentionAxis axis{};
  axis.band = band(r, Axis::n, Axis::window, q_offset, causal, kMostPosition);
  const int64_t n = axis.band.n;
  axis.k = head_rows(r, Axis::k, Axis::k_strides, {p.batch, p.kv_heads, n, p.d}, kMostElements,
                     axis.k_strides);
  axis.v = head_rows(r, Axis::v, Axis::v_strides, {p.batch, p.kv_heads, n, p.dv}, kMostElements,
                     axis.v_strides);
  axis.bias_k = r.number(Axis::bias_k);
  axis.bias_v = r.number(Axis::bias_v);
  if (r.optional(Axis::mask)) {
    axis.mask = head_rows(r, Axis::mask, Axis::mask_strides, {p.batch, p.heads, p.n_q, n},
                          kMostElements, axis.mask_strides);
  }
  // The size of a mask's gradient, and of all pairs' offsets into a mask.
  check_sizes("mask", {p.batch, p.heads, p.n_q, n}, kMostElements);
  return axis;
}

TensorAttentionProblem decode(py::handle record) {
  const Reader<Problem> r(record);
  TensorAttentionProblem p{};
  p.batch = r.integer(Problem::batch);
  p.heads = r.integer(Problem::heads);
  p.kv_heads = r.integer(Problem::kv_heads);
  p.n_q = r.integer(Problem::n_q);
  p.d = r.integer(Problem::d);
  p.dv = r.integer(Problem::dv);
  p.dtype = r.floating(Problem::dtype);
  p.scale = r.number(Problem::scale);
  p.softcap = r.number(Problem::softcap);
  if (!(p.softcap >= 0)) r.bad(Problem::softcap, "must not be negative");
  p.q = head_rows(r, Problem::q, Problem::q_strides, {p.batch, p.heads, p.n_q, p.d}, kMostElements,
                  p.q_strides);
  check_sizes("lse", {p.batch, p.heads, p.n_q}, kMostElements);  // also where d is 0
  check_sizes("out", {p.batch, p.heads, p.n_q, p.dv}, kMostElements);
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    r.bad(Problem::kv_heads, "does not divide the heads of q");
  }
  const bool causal = r.flag(Problem::causal);
  const int64_t q_offset = position(r, Problem::q_offset, kMostPosition);
  p.axes[0] = decode_axis(r.record<Axis>(Problem::axis1), p, causal, q_offset);
  p.axes[1] = decode_axis(r.record<Axis>(Problem::axis2), p, causal, q_offset);
  return p;
}

cpu::TensorAttentionBackward decode_backward(py::handle record, const TensorAttentionProblem& p) {
  const Reader<Backward> r(record);
  const int64_t rows = p.batch * p.heads * p.n_q;
  cpu::TensorAttentionBackward b{};
  b.dout = head_rows(r, Backward::dout, Backward::dout_strides, {p.batch, p.heads, p.n_q, p.dv},
                     kMostElements, b.dout_strides);
  b.dlse = r.optional(Backward::dlse);
  b.out = r.pointer(Backward::out, rows * p.dv);
  b.lse = r.pointer(Backward::lse, rows);
  b.dq = r.optional(Backward::dq);
  b.dk[0] = r.optional(Backward::dk1);
  b.dk[1] = r.optional(Backward::dk2);
  b.dv[0] = r.optional(Backward::dv1);
  b.dv[1] = r.optional(Backward::dv2);
  b.dmask[0] = r.optional(Backward::dmask1);
  b.dmask[1] = r.optional(Backward::dmask2);
  return b;
}

}  // namespace

void register_tensor_attention(py::module_& m) {
  declare_records<Problem, Axis, Backward>(m, "tensor_attention");
  m.def("tensor_attention_scratch_bytes",
        [](py::handle problem, bool backward, bool mask_gradients, int64_t threads) {
          const TensorAttentionProblem p = decode(problem);
          const int width = checked_threads(threads);
          return backward ? cpu::tensor_attention_backward_scratch(p, mask_gradients, width)
                          : cpu::tensor_attention_forward_scratch(p, width);
        });
  m.def("tensor_attention_fwd", [](py::handle problem, int64_t out, int64_t lse, int64_t scratch,
                                   int64_t scratch_bytes, int64_t threads) {
    const TensorAttentionProblem p = decode(problem);
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
  m.def("tensor_attention_bwd", [](py::handle problem, py::handle backward, int64_t scratch,
                                   int64_t scratch_bytes, int64_t threads) {
    const TensorAttentionProblem p = decode(problem);
    const cpu::TensorAttentionBackward b = decode_backward(backward, p);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::tensor_attention_backward_scratch(p, b.mask_gradients(), width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    py::gil_scoped_release nogil;
    cpu::tensor_attention_backward(p, b, buffer, width);
  });
}

}  // namespace pyloss
