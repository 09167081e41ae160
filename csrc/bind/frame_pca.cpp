// Python boundary of frame_pca: decodes and checks, releases the GIL, calls the kernels. The
// records are those of pyloss/ops/frame_pca/records.py.
#include "cpu/frame_pca.h"

#include <pybind11/pybind11.h>

#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/frame_pca.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, clouds, points, dim, dtype, x, weight, offsets, offsets_dtype, centred);
PYLOSS_RECORD(Backward, frames, grad, dx, dw, tolerance);

frame_pca::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  frame_pca::Problem p{};
  p.clouds = r.integer(Problem::clouds);
  p.points = r.integer(Problem::points);
  p.dim = r.integer(Problem::dim);
  if (p.dim != 2 && p.dim != 3) r.bad(Problem::dim, "neither 2 nor 3");
  const int64_t n = checked_count("x", {p.points, p.dim});
  checked_count("frames", {p.clouds, frame_pca::width_of(p.dim)});
  p.dtype = r.floating(Problem::dtype);
  p.x = r.pointer(Problem::x, n);
  p.weight = r.optional(Problem::weight);
  p.offsets = r.optional(Problem::offsets);
  p.offsets_dtype = r.dtype(Problem::offsets_dtype);
  p.centred = r.flag(Problem::centred);
  if (p.offsets_dtype != DType::kI32 && p.offsets_dtype != DType::kI64) {
    r.bad(Problem::offsets_dtype, "must be int32 or int64");
  }
  if (!p.offsets && (p.clouds == 0 ? p.points != 0 : p.points % p.clouds != 0)) {
    r.bad(Problem::points, "not a multiple of the clouds");
  }
  return p;
}

frame_pca::Backward decode_backward(const frame_pca::Problem& p, const py::handle& record) {
  const Reader<Backward> r(record);
  frame_pca::Backward b{};
  b.frames = r.pointer(Backward::frames, p.clouds);
  b.grad = r.pointer(Backward::grad, p.clouds);
  b.dx = r.pointer(Backward::dx, p.points);
  b.dw = r.optional(Backward::dw);
  b.tolerance = r.number(Backward::tolerance);
  if (!(b.tolerance >= 0) || !std::isfinite(b.tolerance)) {
    r.bad(Backward::tolerance, "negative or not finite");
  }
  return b;
}

}  // namespace

void register_frame_pca(py::module_& m) {
  declare_records<Problem, Backward>(m, "frame_pca");
  m.def("frame_pca_fwd", [](py::handle problem, int64_t frames, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::frame_pca_forward, p, checked_pointer("frames", frames, p.clouds),
                checked_threads(threads));
  });
  m.def("frame_pca_bwd", [](py::handle problem, py::handle backward, int64_t threads) {
    const auto p = decode(problem);
    without_gil(cpu::frame_pca_backward, p, decode_backward(p, backward), checked_threads(threads));
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_frame_pca_fwd",
        [](py::handle problem, int64_t frames, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::frame_pca_forward, p, checked_pointer("frames", frames, p.clouds),
                    optional_pointer("stream", stream));
        });
  m.def("cuda_frame_pca_bwd",
        [](py::handle problem, py::handle backward, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::frame_pca_backward, p, decode_backward(p, backward),
                    optional_pointer("stream", stream));
        });
#endif
}

}  // namespace pyloss
