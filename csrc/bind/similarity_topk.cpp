// Python boundary of similarity_topk: decodes and checks, releases the GIL, calls the kernel.
#include "cpu/similarity_topk.h"

#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {

void register_similarity_topk(py::module_& m) {
  m.def("similarity_topk",
        [](int64_t dtype, int64_t rows, int64_t columns, int64_t depth, int64_t queries,
           int64_t query_stride, int64_t keys, int64_t key_stride, int64_t k, int64_t first,
           int64_t values, int64_t indices, int64_t threads) {
          const DType t = checked_float32_or_float64("dtype", dtype);
          const int64_t ours = checked_count("queries", {rows, depth});
          const int64_t theirs = checked_count("keys", {columns, depth});
          check_strides("queries", {rows, depth}, {query_stride, 1});
          check_strides("keys", {columns, depth}, {key_stride, 1});
          const int64_t count = checked_count("values", {rows, k});
          if (k > columns) bad_argument("k", std::to_string(k) + " exceeds the keys");
          if (columns > INT32_MAX) bad_argument("keys", "too many");
          if (first > INT64_MAX / 4) bad_argument("first", std::to_string(first));
          const cpu::SimilarityTopk p{t,
                                      rows,
                                      columns,
                                      depth,
                                      checked_pointer("queries", queries, ours),
                                      checked_pointer("keys", keys, theirs),
                                      query_stride,
                                      key_stride,
                                      k,
                                      first,
                                      checked_pointer("values", values, count),
                                      checked_pointer<int64_t>("indices", indices, count)};
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::similarity_topk(p, width);
        });
}

}  // namespace pyloss
