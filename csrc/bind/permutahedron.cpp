// Python boundary of the permutahedron operators: decodes and checks, releases the GIL, calls the
// kernels.
//
//     problem   rows, n, dtype (float32 or float64), rank (else sort), kl (else l2)
#include "cpu/permutahedron.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "cuda/permutahedron.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

using ProblemInts = std::array<int64_t, 5>;

permutahedron::Problem decode(const ProblemInts& a, double strength) {
  permutahedron::Problem p{};
  p.rows = a[0];
  p.n = a[1];
  checked_count("x", {p.rows, p.n});
  if (p.n > permutahedron::kMaxElements) bad_argument("x", "rows of more than 2^30 - 1 elements");
  p.dtype = checked_dtype("x", a[2]);
  if (p.dtype != DType::kF64 && p.dtype != DType::kF32) {
    bad_argument("x", "must be float32 or float64");
  }
  p.rank = a[3] != 0;
  p.kl = a[4] != 0;
  p.strength = strength;
  if (!(strength > 0) || !std::isfinite(strength)) bad_argument("strength", "not positive, finite");
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
  m.def("permutahedron_fwd", [](const ProblemInts& problem, double strength, int64_t x, int64_t y,
                                int64_t packed, int64_t threads) {
    const auto p = decode(problem, strength);
    const void* in = rows("x", x, p);
    void* out = rows("y", y, p);
    int32_t* marks = rows<int32_t>("packed", packed, p);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::permutahedron_forward(p, in, out, marks, width);
  });
  m.def("permutahedron_bwd", [](const ProblemInts& problem, double strength, int64_t g, int64_t x,
                                int64_t packed, int64_t dx, int64_t threads) {
    const auto p = decode(problem, strength);
    const void* up = rows("g", g, p);
    const void* in = values(x, p);
    const int32_t* marks = rows<const int32_t>("packed", packed, p);
    void* out = rows("dx", dx, p);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::permutahedron_backward(p, up, in, marks, out, width);
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_permutahedron_scratch_bytes", [](const ProblemInts& problem, double strength) {
    return cuda::permutahedron_scratch_bytes(decode(problem, strength));
  });
  m.def("cuda_permutahedron_fwd",
        [](const ProblemInts& problem, double strength, int64_t sorted, int64_t order, int64_t y,
           int64_t packed, int64_t scratch, int64_t scratch_bytes, int64_t stream) {
          const auto p = decode(problem, strength);
          const void* in = rows("sorted", sorted, p);
          const int64_t* index = rows<const int64_t>("order", order, p);
          void* out = rows("y", y, p);
          int32_t* marks = rows<int32_t>("packed", packed, p);
          py::gil_scoped_release nogil;
          cuda::permutahedron_forward(p, in, index, out, marks, optional_pointer(scratch),
                                      scratch_bytes, optional_pointer(stream));
        });
  m.def("cuda_permutahedron_bwd", [](const ProblemInts& problem, double strength, int64_t g,
                                     int64_t x, int64_t packed, int64_t dx, int64_t stream) {
    const auto p = decode(problem, strength);
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
