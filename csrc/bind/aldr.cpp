// Python boundary of ALDR-KL: decodes and checks, releases the GIL, calls the kernels. The record
// is that of pyloss/ops/aldr/records.py.
#include "cpu/aldr.h"

#include <pybind11/pybind11.h>

#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/aldr.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, rows, classes, dtype, x, target, start, lambda0, alpha, margin, ignore_index,
              l1);

aldr::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  aldr::Problem p{};
  p.rows = r.integer(Problem::rows);
  p.classes = r.integer(Problem::classes);
  const int64_t n = checked_count("x", {p.rows, p.classes});
  if (p.classes > INT32_MAX) r.bad(Problem::classes, "more than 2^31 - 1");
  if (p.classes == 0 && p.rows > 0) r.bad(Problem::classes, "rows without classes");
  p.dtype = r.floating(Problem::dtype);
  p.x = r.pointer(Problem::x, n);
  p.target = r.pointer<const int64_t>(Problem::target, p.rows);
  p.start = r.optional(Problem::start);
  p.lambda0 = r.number(Problem::lambda0);
  p.alpha = r.number(Problem::alpha);
  p.margin = r.number(Problem::margin);
  p.ignore_index = r.integer(Problem::ignore_index);
  p.l1 = r.flag(Problem::l1);
  if (!(p.lambda0 > 0) || !std::isfinite(p.lambda0)) r.bad(Problem::lambda0, "not positive");
  if (!(p.alpha > 1) || !std::isfinite(p.alpha)) r.bad(Problem::alpha, "not above 1");
  return p;
}

void* of_rows(const char* name, int64_t address, const aldr::Problem& p) {
  return checked_pointer(name, address, p.rows);
}
void* gradient(int64_t address, const aldr::Problem& p) {
  return checked_pointer("grad", address, p.rows * p.classes);
}

}  // namespace

void register_aldr(py::module_& m) {
  declare_records<Problem>(m, "aldr");
  m.def("aldr_fwd",
        [](py::handle problem, int64_t stats, int64_t factor, int64_t grad, int64_t threads) {
          const auto p = decode(problem);
          void* out = optional_pointer("grad", grad);
          without_gil(cpu::aldr_forward, p, of_rows("stats", stats, p),
                      out ? of_rows("factor", factor, p) : nullptr, out, checked_threads(threads));
        });
  m.def("aldr_bwd",
        [](py::handle problem, int64_t stats, int64_t factor, int64_t grad, int64_t threads) {
          const auto p = decode(problem);
          without_gil(cpu::aldr_backward, p, of_rows("stats", stats, p),
                      of_rows("factor", factor, p), gradient(grad, p), checked_threads(threads));
        });

#if PYLOSS_WITH_CUDA
  m.def("cuda_aldr_fwd", [](py::handle problem, int64_t stats, int64_t factor, int64_t grad,
                            int64_t device, int64_t stream) {
    const auto p = decode(problem);
    void* out = optional_pointer("grad", grad);
    on_device(device, cuda::aldr_forward, p, of_rows("stats", stats, p),
              out ? of_rows("factor", factor, p) : nullptr, out,
              optional_pointer("stream", stream));
  });
  m.def("cuda_aldr_bwd", [](py::handle problem, int64_t stats, int64_t factor, int64_t grad,
                            int64_t device, int64_t stream) {
    const auto p = decode(problem);
    on_device(device, cuda::aldr_backward, p, of_rows("stats", stats, p),
              of_rows("factor", factor, p), gradient(grad, p), optional_pointer("stream", stream));
  });
#endif
}

}  // namespace pyloss
