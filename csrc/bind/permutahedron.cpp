// Python boundary of the permutahedron operators: decodes and checks, releases the GIL, calls the
// kernels.
#include "cpu/permutahedron.h"

#include <pybind11/pybind11.h>

#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/permutahedron.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, rows, n, dtype, rank, kl, centred, strength);

permutahedron::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  permutahedron::Problem p{};
  p.rows = r.integer(Problem::rows);
  p.n = r.integer(Problem::n);
  checked_count("x", {p.rows, p.n});
  if (p.n > permutahedron::kMaxElements) r.bad(Problem::n, "more than 2^30 - 1 elements");
  p.dtype = r.float32_or_float64(Problem::dtype);
  p.rank = r.flag(Problem::rank);
  p.kl = r.flag(Problem::kl);
  p.centred = r.flag(Problem::centred);
  p.strength = r.number(Problem::strength);
  if (!(p.strength > 0) || !std::isfinite(p.strength)) {
    r.bad(Problem::strength, "not positive, finite");
  }
  return p;
}

template <class T = void>
T* rows(const char* name, int64_t address, const permutahedron::Problem& p) {
  return checked_pointer<T>(name, address, p.rows * p.n);
}

// What a backward kernel reads beside g: x where the weights depend on it.
const void* values(int64_t x, const permutahedron::Problem& p) {
  return p.kl ? rows("x", x, p) : nullptr;
}

}  // namespace

void register_permutahedron(py::module_& m) {
  declare_records<Problem>(m, "permutahedron");
  m.def("permutahedron_fwd",
        [](py::handle problem, int64_t x, int64_t y, int64_t packed, int64_t threads) {
          const auto p = decode(problem);
          without_gil(cpu::permutahedron_forward, p, rows("x", x, p), rows("y", y, p),
                      rows<int32_t>("packed", packed, p), checked_threads(threads));
        });
  m.def("permutahedron_bwd",
        [](py::handle problem, int64_t g, int64_t x, int64_t packed, int64_t dx, int64_t threads) {
          const auto p = decode(problem);
          without_gil(cpu::permutahedron_backward, p, rows("g", g, p), values(x, p),
                      rows<const int32_t>("packed", packed, p), rows("dx", dx, p),
                      checked_threads(threads));
        });

#if PYLOSS_WITH_CUDA
  m.def("cuda_permutahedron_scratch_bytes", [](py::handle problem, int64_t device) {
    return on_device(device, cuda::permutahedron_scratch_bytes, decode(problem));
  });
  m.def("cuda_permutahedron_fwd",
        [](py::handle problem, int64_t sorted, int64_t order, int64_t y, int64_t packed,
           int64_t scratch, int64_t scratch_bytes, int64_t device, int64_t stream) {
          const auto p = decode(problem);
          on_device(device, cuda::permutahedron_forward, p, rows("sorted", sorted, p),
                    rows<const int64_t>("order", order, p), rows("y", y, p),
                    rows<int32_t>("packed", packed, p), optional_pointer("scratch", scratch),
                    scratch_bytes, optional_pointer("stream", stream));
        });
  m.def("cuda_permutahedron_bwd", [](py::handle problem, int64_t g, int64_t x, int64_t packed,
                                     int64_t dx, int64_t device, int64_t stream) {
    const auto p = decode(problem);
    on_device(device, cuda::permutahedron_backward, p, rows("g", g, p), values(x, p),
              rows<const int32_t>("packed", packed, p), rows("dx", dx, p),
              optional_pointer("stream", stream));
  });
#endif
}

}  // namespace pyloss
