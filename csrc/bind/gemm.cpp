// Python boundary of the matrix products: decodes and checks, releases the GIL, calls them.
#include "cpu/gemm.h"

#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/register.h"
#include "cpu/instruction_set.h"

namespace py = pybind11;

namespace pyloss {
namespace {

template <class R>
cpu::gemm::MatrixView<R> matrix(const char* name, int64_t data, int64_t rows, int64_t columns,
                                int64_t row_stride, int64_t column_stride) {
  const int64_t count = checked_count(name, {rows, columns});
  check_strides(name, {rows, columns}, {row_stride, column_stride});
  return {checked_pointer<const R>(name, data, count), rows, columns, row_stride, column_stride};
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("gemm", [](int64_t dtype, int64_t m, int64_t n, int64_t k, int64_t a, int64_t a_row,
                   int64_t a_column, int64_t b, int64_t b_row, int64_t b_column, int64_t c,
                   int64_t c_row, int64_t bias, bool add, int64_t threads) {
    const DType t = checked_float32_or_float64("dtype", dtype);
    const int width = checked_threads(threads);
    const auto multiply = [&](auto x) {
      using R = decltype(x);
      const auto left = matrix<R>("a", a, m, k, a_row, a_column);
      const auto right = matrix<R>("b", b, k, n, b_row, b_column);
      R* const to = checked_pointer<R>("c", c, checked_count("c", {m, n}));
      check_strides("c", {m, n}, {c_row, 1});
      if (m > 1 && c_row < n) bad_argument("c", "rows overlap");
      const R* const row = optional_pointer<const R>("bias", bias);
      py::gil_scoped_release nogil;
      cpu::gemm::multiply(left, right, to, c_row, add, width, row);
    };
    t == DType::kF64 ? multiply(double{}) : multiply(float{});
  });
  m.def("multiply_adds", [](int64_t dtype, int64_t operations) {
    const DType t = checked_float32_or_float64("dtype", dtype);
    if (operations < 0 || operations > int64_t(1) << 40) {
      bad_argument("operations", std::to_string(operations));
    }
    py::gil_scoped_release nogil;
    return t == DType::kF64 ? cpu::gemm::multiply_adds<double>(operations)
                            : cpu::gemm::multiply_adds<float>(operations);
  });
  m.def("prefers_own_gemm",
        [] { return cpu::instruction_set() != cpu::InstructionSet::kBase && !cpu::is_intel(); });
}

}  // namespace pyloss
