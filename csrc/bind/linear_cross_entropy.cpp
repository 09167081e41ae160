// Python boundary of linear cross entropy: decodes and checks, releases the GIL, calls the kernels.
#include "cpu/linear_cross_entropy.h"

#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/register.h"
#include "cpu/memory.h"

namespace py = pybind11;

namespace pyloss {

void register_linear_cross_entropy(py::module_& m) {
  m.def("accumulate",
        [](int64_t total, int64_t part, int64_t dtype, int64_t n, bool first, int64_t threads) {
          const DType t = checked_float("part", dtype);
          const int64_t count = checked_count("part", {n});
          void* to = checked_pointer("total", total, count);
          const void* from = checked_pointer("part", part, count);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::accumulate(to, from, t, count, first, width);
        });
  m.def("column_sums", [](int64_t total, int64_t x, int64_t dtype, int64_t rows, int64_t columns,
                          int64_t row_stride, bool first, int64_t threads) {
    const DType t = checked_float("x", dtype);
    const int64_t count = checked_count("x", {rows, columns});
    check_strides("x", {rows, columns}, {row_stride, 1});
    void* to = checked_pointer("total", total, columns);
    const void* from = checked_pointer("x", x, count);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::column_sums(to, from, t, rows, columns, row_stride, first, width);
  });
  m.def("advise_huge_pages", [](int64_t data, int64_t bytes) {
    const int64_t count = checked_count("data", {bytes});
    advise_huge_pages(checked_pointer("data", data, count), count);
  });
}

}  // namespace pyloss
