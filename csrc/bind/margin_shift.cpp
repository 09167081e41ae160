// Python boundary of the margin-shift operators: decodes and checks, releases the GIL, calls the
// kernels. The records are those of pyloss/ops/margin_shift/records.py.
#include "cpu/margin_shift.h"

#include <pybind11/pybind11.h>

#include "bind/logits.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/margin_shift.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, sizes, dtype, x, x_strides, adv, adv_strides, target, target_dtype, squared,
              ignore_index);
PYLOSS_RECORD(Backward, g, shift, total, dx, dx_strides, dadv, dadv_strides);

margin_shift::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  margin_shift::Problem p{};
  const int64_t n = decode_logits(r, p);
  p.adv = r.pointer(Problem::adv, n);
  p.adv_strides = strides(r, Problem::adv_strides, p);
  decode_labels(r, p);
  p.squared = r.flag(Problem::squared);
  return p;
}

margin_shift::Backward decode_backward(const margin_shift::Problem& p, const py::handle& record) {
  const Reader<Backward> r(record);
  margin_shift::Backward b{};
  b.g = r.pointer(Backward::g, p.rows());
  b.shift = r.pointer(Backward::shift, p.rows());
  b.total = r.pointer(Backward::total, p.rows());
  b.dx = r.optional(Backward::dx);
  b.dx_strides = strides(r, Backward::dx_strides, p);
  b.dadv = r.optional(Backward::dadv);
  b.dadv_strides = strides(r, Backward::dadv_strides, p);
  return b;
}

void* result(const char* name, int64_t address, const margin_shift::Problem& p) {
  return checked_pointer(name, address, p.rows());
}

}  // namespace

void register_margin_shift(py::module_& m) {
  declare_records<Problem, Backward>(m, "margin_shift");
  m.def("margin_shift_fwd", [](py::handle problem, int64_t shift, int64_t total, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::margin_shift_forward, p, result("shift", shift, p), result("total", total, p),
                checked_threads(threads));
  });
  m.def("margin_shift_bwd", [](py::handle problem, py::handle backward, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::margin_shift_backward, p, decode_backward(p, backward),
                checked_threads(threads));
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_margin_shift_fwd",
        [](py::handle problem, int64_t shift, int64_t total, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::margin_shift_forward, p, result("shift", shift, p),
                    result("total", total, p), optional_pointer("stream", stream));
        });
  m.def("cuda_margin_shift_bwd",
        [](py::handle problem, py::handle backward, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::margin_shift_backward, p, decode_backward(p, backward),
                    optional_pointer("stream", stream));
        });
#endif
}

}  // namespace pyloss
