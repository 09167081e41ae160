// Python boundary of near-linear tensor attention: decodes and checks, releases the GIL, calls the
// kernels.
#include "cpu/tensor_attention_lowrank.h"

#include <pybind11/pybind11.h>

#include <array>
#include <vector>

#include "bind/args.h"
#include "bind/attention.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using cpu::LowrankAxis;
using cpu::LowrankProblem;

constexpr int64_t kMostElements = int64_t(1) << 40, kMostPosition = INT32_MAX, kMostAxes = 64;

// Strides are of all dimensions, in elements; the last is 1 where it has more than one. `axes` are
// as many records; `coefficients` those of the polynomial in the unscaled logit.
PYLOSS_RECORD(Problem, batch, heads, kv_heads, n_q, d, dv, dtype, causal, q_offset, centre,
              coefficients, q, q_strides, axes);
PYLOSS_RECORD(Axis, n, window, k, k_strides, v, v_strides, mask, mask_strides);
// `states`: one per axis, or none where queries see different keys; `dk`, `dv`: one per axis.
PYLOSS_RECORD(Forward, out, lse, y, states);
PYLOSS_RECORD(Backward, dout, dout_strides, dlse, out, y, states, dq, dk, dv);

bool is_wide(DType t) {
  return t == DType::kF32 || t == DType::kF64;
}

LowrankAxis decode_axis(const Reader<Axis>& r, const LowrankProblem& p, bool causal,
                        int64_t q_offset) {
  LowrankAxis axis{};
  axis.band = band(r, Axis::n, Axis::window, q_offset, causal, kMostPosition);
  const int64_t n = axis.band.n;
  axis.k = head_rows(r, Axis::k, Axis::k_strides, {p.batch, p.kv_heads, n, p.d}, kMostElements,
                     axis.k_strides);
  axis.v = head_rows(r, Axis::v, Axis::v_strides, {p.batch, p.kv_heads, n, p.dv}, kMostElements,
                     axis.v_strides);
  axis.mask = r.optional<const uint8_t>(Axis::mask);
  if (axis.mask) {
    const auto strides = r.strides<3>(Axis::mask_strides, {p.batch, p.kv_heads, n});
    if (strides[2] != 1 && n > 1) r.bad(Axis::mask_strides, "the last must be 1");
    axis.mask_strides[0] = strides[0];
    axis.mask_strides[1] = strides[1];
  }
  return axis;
}

LowrankProblem decode(py::handle record) {
  const Reader<Problem> r(record);
  const int64_t m = r.length(Problem::axes), terms = r.length(Problem::coefficients);
  if (m < 1 || m > kMostAxes) r.bad(Problem::axes, "needs 1 to 64");
  if (terms < 1) r.bad(Problem::coefficients, "none");
  LowrankProblem p{};
  p.batch = r.integer(Problem::batch);
  p.heads = r.integer(Problem::heads);
  p.kv_heads = r.integer(Problem::kv_heads);
  p.n_q = r.integer(Problem::n_q);
  p.d = r.integer(Problem::d);
  p.dv = r.integer(Problem::dv);
  p.dtype = r.dtype(Problem::dtype);
  if (!is_wide(p.dtype)) r.bad(Problem::dtype, "needs float32 or float64");
  p.q = head_rows(r, Problem::q, Problem::q_strides, {p.batch, p.heads, p.n_q, p.d}, kMostElements,
                  p.q_strides);
  check_sizes("out", {p.batch, p.heads, p.n_q}, kMostElements);  // also where d or dv is 0
  check_sizes("out", {p.batch, p.heads, p.n_q, p.dv}, kMostElements);
  if (p.d < 1) r.bad(Problem::d, "no features");
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    r.bad(Problem::kv_heads, "does not divide the heads of q");
  }
  p.centre = r.number(Problem::centre);
  for (int64_t t = 0; t < terms; ++t) {
    p.coefficients.push_back(r.number(Problem::coefficients, t));
  }
  const int64_t count = cpu::monomial_count(p.d, p.degree());
  if (count < 0) r.bad(Problem::coefficients, "more than 2^31 - 1 monomials");
  // Monomials of a block and sums of all heads.
  check_sizes("coefficients", {count, 2 * m + 2, 16 * 64}, kMostElements);
  check_sizes("coefficients", {p.batch * p.kv_heads, count, p.dv + 32, 2 * m + 16}, kMostElements);
  const bool causal = r.flag(Problem::causal);
  const int64_t q_offset = position(r, Problem::q_offset, kMostPosition);
  for (int64_t x = 0; x < m; ++x) {
    p.axes.push_back(decode_axis(r.record<Axis>(Problem::axes, x), p, causal, q_offset));
  }
  return p;
}

// One pointer per axis.
template <class T, class Record>
std::vector<T*> pointers(const Reader<Record>& r, typename Record::Field f,
                         const LowrankProblem& p) {
  if (r.length(f) != Py_ssize_t(p.axes.size())) r.bad(f, "needs one per axis");
  std::vector<T*> found;
  for (size_t x = 0; x < p.axes.size(); ++x) {
    found.push_back(r.template optional<T>(f, Py_ssize_t(x)));
  }
  return found;
}

// None where queries see different keys: the kernels do not look at them there.
template <class T, class Record>
std::vector<T*> states(const Reader<Record>& r, typename Record::Field f, const LowrankProblem& p) {
  if (p.scans()) return std::vector<T*>(p.axes.size());
  const std::vector<T*> found = pointers<T>(r, f, p);
  for (T* s : found) {
    if (!s && p.batch * p.kv_heads > 0) r.bad(f, "no data at this address");
  }
  return found;
}

cpu::LowrankForward decode_forward(py::handle record, const LowrankProblem& p) {
  const Reader<Forward> r(record);
  const int64_t rows = p.batch * p.heads * p.n_q;
  cpu::LowrankForward f{};
  f.out = r.pointer(Forward::out, rows * p.dv);
  f.lse = r.pointer(Forward::lse, rows);
  f.y = r.pointer(Forward::y, rows);
  f.states = states<void>(r, Forward::states, p);
  return f;
}

cpu::LowrankBackward decode_backward(py::handle record, const LowrankProblem& p) {
  const Reader<Backward> r(record);
  const int64_t rows = p.batch * p.heads * p.n_q;
  cpu::LowrankBackward b{};
  b.dout = head_rows(r, Backward::dout, Backward::dout_strides, {p.batch, p.heads, p.n_q, p.dv},
                     kMostElements, b.dout_strides);
  b.dlse = r.optional(Backward::dlse);
  b.out = r.pointer(Backward::out, rows * p.dv);
  b.y = r.pointer(Backward::y, rows);
  b.states = states<const void>(r, Backward::states, p);
  b.dq = r.optional(Backward::dq);
  b.dk = pointers<void>(r, Backward::dk, p);
  b.dv = pointers<void>(r, Backward::dv, p);
  return b;
}

}  // namespace

void register_tensor_attention_lowrank(py::module_& m) {
  declare_records<Problem, Axis, Forward, Backward>(m, "tensor_attention_lowrank");
  m.def("tensor_attention_lowrank_largest",
        [](int64_t x, int64_t dtype, int64_t count, int64_t threads) {
          const DType type = checked_dtype("x", dtype);
          if (!is_wide(type)) bad_argument("x", "needs float32 or float64");
          if (checked_count("x", {count}) > kMostElements) bad_argument("x", "too many elements");
          const void* data = checked_pointer("x", x, count);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          return cpu::largest_entry(data, type, count, width);
        });
  m.def("tensor_attention_lowrank_scratch_bytes",
        [](py::handle problem, bool backward, int64_t threads) {
          const LowrankProblem p = decode(problem);
          const int width = checked_threads(threads);
          return backward ? cpu::tensor_attention_lowrank_backward_scratch(p, width)
                          : cpu::tensor_attention_lowrank_forward_scratch(p, width);
        });
  m.def("tensor_attention_lowrank_fwd", [](py::handle problem, py::handle forward, int64_t scratch,
                                           int64_t scratch_bytes, int64_t threads) {
    const LowrankProblem p = decode(problem);
    const cpu::LowrankForward f = decode_forward(forward, p);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::tensor_attention_lowrank_forward_scratch(p, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    py::gil_scoped_release nogil;
    return cpu::tensor_attention_lowrank_forward(p, f, buffer, width);
  });
  m.def("tensor_attention_lowrank_bwd", [](py::handle problem, py::handle backward, int64_t scratch,
                                           int64_t scratch_bytes, int64_t threads) {
    const LowrankProblem p = decode(problem);
    const cpu::LowrankBackward b = decode_backward(backward, p);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::tensor_attention_lowrank_backward_scratch(p, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    py::gil_scoped_release nogil;
    cpu::tensor_attention_lowrank_backward(p, b, buffer, width);
  });
}

}  // namespace pyloss
