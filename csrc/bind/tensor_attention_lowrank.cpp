// Python boundary of near-linear tensor attention: decodes and checks, releases the GIL, calls the
// kernels. pyloss/ops/_tensor_attention_lowrank_cpu.py packs what is read here:
//
//   problem   batch, heads, kv heads, n_q, d, dv, dtype, q and its 3 strides, causal, q_offset;
//   then
//             per axis n, window, k and its 3 strides, v and its 3 strides, mask (or 0) and its 2
//             strides
//   floats    centre, then the polynomial's coefficients
//   results   out, lse, y
//   states    one per axis; not looked at where queries see different keys
//   cotangents  dout and its 3 strides, dlse
//   grads     dq, then dk per axis, then dv per axis; 0 where not wanted
#include "cpu/tensor_attention_lowrank.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bind/args.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using cpu::LowrankAxis;
using cpu::LowrankProblem;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

constexpr size_t kProblemInts = 13, kAxisInts = 13;
// Keeps every product of sizes, and the sum of all buffers in bytes, far from overflow.
constexpr int64_t kMostElements = int64_t(1) << 40, kMostAxes = 64;

void check_length(const char* name, const Ints& values, size_t length) {
  if (values.size() != length) {
    bad_argument(name, "needs " + std::to_string(length) + " integers, got " +
                           std::to_string(values.size()));
  }
}

int64_t bounded_count(const char* name, std::initializer_list<int64_t> sizes) {
  const int64_t n = checked_count(name, sizes);
  for (int64_t s : sizes) {
    if (s > INT32_MAX) bad_argument(name, "size above 2^31 - 1");
  }
  if (n > kMostElements) bad_argument(name, "too many elements");
  return n;
}

int64_t checked_position(const char* name, int64_t value) {
  if (value < -INT32_MAX || value > INT32_MAX) bad_argument(name, "out of range");
  return value;
}

// Strides of (batch, head, row) with contiguous elements.
const void* decode_rows(const char* name, const int64_t* from, std::initializer_list<int64_t> sizes,
                        int64_t* strides) {
  const int64_t n = bounded_count(name, sizes);
  check_strides(name, sizes, {from[1], from[2], from[3], 1});
  for (int i = 0; i < 3; ++i) strides[i] = from[1 + i];
  return checked_pointer(name, from[0], n);
}

LowrankProblem decode(const Ints& a, const Floats& o) {
  if (a.size() < kProblemInts + kAxisInts || (a.size() - kProblemInts) % kAxisInts != 0) {
    bad_argument("problem", "got " + std::to_string(a.size()) + " integers");
  }
  const int64_t m = int64_t((a.size() - kProblemInts) / kAxisInts);
  if (m > kMostAxes) bad_argument("keys", "more than 64");
  if (o.size() < 2) bad_argument("coefficients", "none");
  LowrankProblem p{};
  p.batch = a[0];
  p.heads = a[1];
  p.kv_heads = a[2];
  p.n_q = a[3];
  p.d = a[4];
  p.dv = a[5];
  p.dtype = checked_float("q", a[6]);
  if (p.dtype != DType::kF32 && p.dtype != DType::kF64) {
    bad_argument("q", "needs float32 or float64");
  }
  p.q = decode_rows("q", &a[7], {p.batch, p.heads, p.n_q, p.d}, p.q_strides);
  bounded_count("out", {p.batch, p.heads, p.n_q});  // also where d or dv is 0
  bounded_count("out", {p.batch, p.heads, p.n_q, p.dv});
  if (p.d < 1) bad_argument("q", "no features");
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    bad_argument("keys", "their heads do not divide those of q");
  }
  p.centre = o[0];
  p.coefficients.assign(o.begin() + 1, o.end());
  const int64_t count = cpu::monomial_count(p.d, p.degree());
  if (count < 0) bad_argument("degree", "more than 2^31 - 1 monomials");
  // Monomials of a block and sums of all heads.
  bounded_count("degree", {count, 2 * m + 2, 16 * 64});
  bounded_count("degree", {p.batch * p.kv_heads, count, p.dv + 32, 2 * m + 16});
  const bool causal = a[11] != 0;
  const int64_t offset = checked_position("q_offset", a[12]);
  for (int64_t x = 0; x < m; ++x) {
    const int64_t* b = &a[kProblemInts + x * kAxisInts];
    LowrankAxis axis{};
    const int64_t n = b[0], window = checked_position("windows", b[1]);
    if (window < 0) bad_argument("windows", "negative");
    axis.band = {n, window, offset, causal};
    axis.k = decode_rows("keys", b + 2, {p.batch, p.kv_heads, n, p.d}, axis.k_strides);
    axis.v = decode_rows("values", b + 6, {p.batch, p.kv_heads, n, p.dv}, axis.v_strides);
    axis.mask = optional_pointer<const uint8_t>(b[10]);
    if (axis.mask) {
      check_strides("key_masks", {p.batch, p.kv_heads, n}, {b[11], b[12], 1});
      axis.mask_strides[0] = b[11];
      axis.mask_strides[1] = b[12];
    }
    p.axes.push_back(axis);
  }
  return p;
}

template <class Pointer>
std::vector<Pointer> decode_states(const LowrankProblem& p, const Ints& states) {
  check_length("states", states, p.axes.size());
  std::vector<Pointer> found;
  for (int64_t s : states) {
    found.push_back(checked_pointer("states", s, p.scans() ? 0 : p.batch * p.kv_heads));
  }
  return found;
}

void* checked_scratch(int64_t address, int64_t bytes, int64_t needed) {
  if (bytes < needed) {
    bad_argument("scratch",
                 "needs " + std::to_string(needed) + " bytes, got " + std::to_string(bytes));
  }
  return checked_pointer("scratch", address, needed);
}

}  // namespace

void register_tensor_attention_lowrank(py::module_& m) {
  m.def("tensor_attention_lowrank_largest",
        [](int64_t x, int64_t dtype, int64_t count, int64_t threads) {
          const DType type = checked_dtype("x", dtype);
          if (type != DType::kF32 && type != DType::kF64) {
            bad_argument("x", "needs float32 or float64");
          }
          if (checked_count("x", {count}) > kMostElements) bad_argument("x", "too many elements");
          const void* data = checked_pointer("x", x, count);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          return cpu::largest_entry(data, type, count, width);
        });
  m.def("tensor_attention_lowrank_scratch_bytes",
        [](const Ints& problem, const Floats& floats, bool backward, int64_t threads) {
          const LowrankProblem p = decode(problem, floats);
          const int width = checked_threads(threads);
          return backward ? cpu::tensor_attention_lowrank_backward_scratch(p, width)
                          : cpu::tensor_attention_lowrank_forward_scratch(p, width);
        });
  m.def("tensor_attention_lowrank_fwd",
        [](const Ints& problem, const Floats& floats, const Ints& results, const Ints& states,
           int64_t scratch, int64_t scratch_bytes, int64_t threads) {
          const LowrankProblem p = decode(problem, floats);
          const int width = checked_threads(threads);
          const int64_t rows = p.batch * p.heads * p.n_q;
          check_length("results", results, 3);
          cpu::LowrankForward f{};
          f.out = checked_pointer("out", results[0], rows * p.dv);
          f.lse = checked_pointer("lse", results[1], rows);
          f.y = checked_pointer("y", results[2], rows);
          f.states = decode_states<void*>(p, states);
          void* buffer = checked_scratch(scratch, scratch_bytes,
                                         cpu::tensor_attention_lowrank_forward_scratch(p, width));
          py::gil_scoped_release nogil;
          return cpu::tensor_attention_lowrank_forward(p, f, buffer, width);
        });
  m.def("tensor_attention_lowrank_bwd", [](const Ints& problem, const Floats& floats,
                                           const Ints& cotangents, const Ints& results,
                                           const Ints& states, const Ints& grads, int64_t scratch,
                                           int64_t scratch_bytes, int64_t threads) {
    const LowrankProblem p = decode(problem, floats);
    const int width = checked_threads(threads);
    const int64_t rows = p.batch * p.heads * p.n_q;
    const size_t axes = p.axes.size();
    check_length("cotangents", cotangents, 5);
    check_length("results", results, 3);
    check_length("grads", grads, 1 + 2 * axes);
    cpu::LowrankBackward b{};
    b.dout =
        decode_rows("dout", cotangents.data(), {p.batch, p.heads, p.n_q, p.dv}, b.dout_strides);
    b.dlse = optional_pointer(cotangents[4]);
    b.out = checked_pointer("out", results[0], rows * p.dv);
    b.y = checked_pointer("y", results[2], rows);
    b.states = decode_states<const void*>(p, states);
    b.dq = optional_pointer(grads[0]);
    for (size_t x = 0; x < axes; ++x) {
      b.dk.push_back(optional_pointer(grads[1 + x]));
      b.dv.push_back(optional_pointer(grads[1 + axes + x]));
    }
    void* buffer = checked_scratch(scratch, scratch_bytes,
                                   cpu::tensor_attention_lowrank_backward_scratch(p, width));
    py::gil_scoped_release nogil;
    cpu::tensor_attention_lowrank_backward(p, b, buffer, width);
  });
}

}  // namespace pyloss
