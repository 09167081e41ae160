// Python boundary of the row-moments op: decodes and checks, releases the GIL, calls the kernels.
// The records are those of pyloss/ops/row_moments/records.py.
#include "cpu/row_moments.h"

#include <pybind11/pybind11.h>

#include "bind/logits.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/row_moments.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, sizes, dtype, x, x_strides, target, target_dtype, ignore_index);
PYLOSS_RECORD(Backward, moments, grad, out, out_strides);

row_moments::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  row_moments::Problem p{};
  decode_logits(r, p);
  checked_count("moments", {p.outer, p.inner, row_moments::kCount});
  decode_labels(r, p);
  return p;
}

row_moments::Backward decode_backward(const row_moments::Problem& p, const py::handle& record) {
  const Reader<Backward> r(record);
  row_moments::Backward b{};
  b.moments = r.pointer(Backward::moments, p.rows());
  b.grad = r.pointer(Backward::grad, p.rows());
  b.out = r.pointer(Backward::out, p.rows());
  b.out_strides = strides(r, Backward::out_strides, p);
  return b;
}

}  // namespace

void register_row_moments(py::module_& m) {
  declare_records<Problem, Backward>(m, "row_moments");
  m.def("row_moments_fwd", [](py::handle problem, int64_t moments, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::row_moments_forward, p, checked_pointer("moments", moments, p.rows()),
                checked_threads(threads));
  });
  m.def("row_moments_bwd", [](py::handle problem, py::handle backward, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::row_moments_backward, p, decode_backward(p, backward),
                checked_threads(threads));
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_row_moments_fwd", [](py::handle problem, int64_t moments, int64_t device,
                                   int64_t stream) {
    const auto p = decode(problem);
    on_device(device, cuda::row_moments_forward, p, checked_pointer("moments", moments, p.rows()),
              optional_pointer("stream", stream));
  });
  m.def("cuda_row_moments_bwd",
        [](py::handle problem, py::handle backward, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::row_moments_backward, p, decode_backward(p, backward),
                    optional_pointer("stream", stream));
        });
#endif
}

}  // namespace pyloss
