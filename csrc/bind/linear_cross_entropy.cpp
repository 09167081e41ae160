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
  m.def("small_linear_cross_entropy",
        [](int64_t rows, int64_t classes, int64_t features, int64_t x, int64_t w, int64_t bias,
           int64_t target, int64_t target_dtype, int64_t ignore_index, bool mean, int64_t loss,
           int64_t dx, int64_t dw, int64_t dbias) {
          cpu::SmallLinearCrossEntropy p{};
          p.rows = rows;
          p.classes = classes;
          p.features = features;
          checked_count("logits", {rows, classes});
          if (classes == 0) bad_argument("classes", "none");
          p.x = checked_pointer<const float>("x", x, checked_count("x", {rows, features}));
          p.w = checked_pointer<const float>("w", w, checked_count("w", {classes, features}));
          p.bias = optional_pointer<const float>("bias", bias);
          p.target = checked_pointer("target", target, rows);
          p.target_dtype = checked_dtype("target", target_dtype);
          if (is_float(p.target_dtype)) bad_argument("target", "not an integer dtype");
          p.ignore_index = ignore_index;
          p.mean = mean;
          p.loss = checked_pointer<float>("loss", loss, 1);
          p.dx = optional_pointer<float>("dx", dx);
          p.dw = optional_pointer<float>("dw", dw);
          p.dbias = optional_pointer<float>("dbias", dbias);
          py::gil_scoped_release nogil;
          cpu::small_linear_cross_entropy(p);
        });
  m.def("advise_huge_pages", [](int64_t data, int64_t bytes) {
    const int64_t count = checked_count("data", {bytes});
    advise_huge_pages(checked_pointer("data", data, count), count);
  });
}

}  // namespace pyloss
