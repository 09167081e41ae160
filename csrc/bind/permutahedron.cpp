// Python boundary of the permutahedron operators: decodes and checks, releases the GIL, calls the
// kernels.
#include "cpu/permutahedron.h"

#include <pybind11/pybind11.h>

#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "cuda/permutahedron.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, rows, n, dtype, rank, kl, strength);

permutahedron::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  permutahedron::Problem p{};
  p.rows = r.integer(Problem::rows);
  p.n = r.integer(Problem::n);
  checked_count("x", {p.rows, p.n});
  if (p.n > permutahedron::kMaxElements) r.bad(Problem::n, "more than 2^30 - 1 elements");
  p.dtype = r.dtype(Problem::dtype);
  if (p.dtype != DType::kF64 && p.dtype != DType::kF32) {
    r.bad(Problem::dtype, "must be float32 or float64");
  }
  p.rank = r.flag(Problem::rank);
  p.kl = r.flag(Problem::kl);
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
          const void* in = rows("x", x, p);
          void* out = rows("y", y, p);
          int32_t* marks = rows<int32_t>("packed", packed, p);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::permutahedron_forward(p, in, out, marks, width);
        });
  m.def("permutahedron_bwd",
        [](py::handle problem, int64_t g, int64_t x, int64_t packed, int64_t dx, int64_t threads) {
          const auto p = decode(problem);
          const void* up = rows("g", g, p);
          const void* in = values(x, p);
          const int32_t* marks = rows<const int32_t>("packed", packed, p);
          void* out = rows("dx", dx, p);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::permutahedron_backward(p, up, in, marks, out, width);
        });

#if PYLOSS_WITH_CUDA
  m.def("cuda_permutahedron_scratch_bytes",
        [](py::handle problem) { return cuda::permutahedron_scratch_bytes(decode(problem)); });
  m.def("cuda_permutahedron_fwd",
        [](py::handle problem, int64_t sorted, int64_t order, int64_t y, int64_t packed,
           int64_t scratch, int64_t scratch_bytes, int64_t stream) {
          const auto p = decode(problem);
          const void* in = rows("sorted", sorted, p);
          const int64_t* index = rows<const int64_t>("order", order, p);
          void* out = rows("y", y, p);
          int32_t* marks = rows<int32_t>("packed", packed, p);
          py::gil_scoped_release nogil;
          cuda::permutahedron_forward(p, in, index, out, marks, optional_pointer(scratch),
                                      scratch_bytes, optional_pointer(stream));
        });
  m.def("cuda_permutahedron_bwd",
        [](py::handle problem, int64_t g, int64_t x, int64_t packed, int64_t dx, int64_t stream) {
          const auto p = decode(problem);
          const void* up = rows("g", g, p);
          const void* in = values(x, p);
          const int32_t* marks = rows<const int32_t>("packed", packed, p);
          void* out = rows("dx", dx, p);
          py::gil_scoped_release nogil;
          cuda::permutahedron_backward(p, up, in, marks, out, optional_pointer(stream));
        });
#endif
}

}  // namespace pyloss
