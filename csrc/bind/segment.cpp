// Python boundary of the segment ops: decodes and checks, releases the GIL, calls the kernels. The
// record is that of pyloss/ops/segment/records.py.
#include "cpu/segment.h"

#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/segment.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, sizes, dtype, x, x_stride, other, other_stride, offsets, offsets_dtype,
              given);

// Of a call that reads `given` tensors, x or not, and another one or not.
segment::Problem decode(const py::handle& record, int given, bool reads_x, bool reads_other) {
  const Reader<Problem> r(record);
  segment::Problem p{};
  const auto sizes = r.integers<3>(Problem::sizes);
  p.rows = sizes[0];
  p.width = sizes[1];
  p.segments = sizes[2];
  const int64_t n = checked_count("x", {p.rows, p.width});
  const int64_t each = checked_count("results", {p.segments, p.width, 2});
  if (p.segments > INT64_MAX / 16) r.bad(Problem::sizes, "too many segments");
  p.dtype = r.floating(Problem::dtype);
  p.x = r.pointer(Problem::x, reads_x ? n : 0);
  p.other = r.pointer(Problem::other, reads_other ? n : 0);
  p.x_stride = r.integer(Problem::x_stride);
  p.other_stride = r.integer(Problem::other_stride);
  check_strides("x_stride", {p.rows, p.width}, {p.x_stride, 1});
  check_strides("other_stride", {p.rows, p.width}, {p.other_stride, 1});
  p.offsets = r.pointer(Problem::offsets, 1);
  p.offsets_dtype = r.dtype(Problem::offsets_dtype);
  if (p.offsets_dtype != DType::kI64 && p.offsets_dtype != DType::kI32) {
    r.bad(Problem::offsets_dtype, "not int32 or int64");
  }
  if (r.length(Problem::given) > segment::kMostGiven || r.length(Problem::given) < given) {
    r.bad(Problem::given, "needs a tuple of " + std::to_string(given));
  }
  for (int i = 0; i < given; ++i) {
    p.given[i] = checked_pointer("given", r.integer(Problem::given, i), each);
  }
  return p;
}

template <class Kind>
Kind kind_of(int64_t code) {
  if (code < 0 || code >= int64_t(Kind::kCount)) {
    bad_argument("kind", "unknown code " + std::to_string(code));
  }
  return static_cast<Kind>(code);
}

segment::Problem decode(const py::handle& record, segment::Fold f) {
  return decode(record, segment::given(f), true, f == segment::Fold::kInner);
}
segment::Problem decode(const py::handle& record, segment::Map f) {
  const bool spreads = segment::form_of(f) == segment::Form::kSpread;
  return decode(record, segment::given(f), !spreads, f == segment::Map::kFromNormalized);
}

}  // namespace

void register_segment(py::module_& m) {
  declare_records<Problem>(m, "segment");
  m.def("segment_fold", [](py::handle problem, int64_t kind, int64_t out, int64_t threads) {
    const auto f = kind_of<segment::Fold>(kind);
    const auto p = decode(problem, f);
    without_gil(cpu::segment_fold, p, f, checked_pointer("out", out, p.segments * p.width),
                checked_threads(threads));
  });
  m.def("segment_map", [](py::handle problem, int64_t kind, int64_t out, int64_t threads) {
    const auto f = kind_of<segment::Map>(kind);
    const auto p = decode(problem, f);
    without_gil(cpu::segment_map, p, f, checked_pointer("out", out, p.rows * p.width),
                checked_threads(threads));
  });
  // For the parts of long segments on a GPU; 0: none can be long.
  m.def("segment_scratch_numbers", [](int64_t rows, int64_t width) {
    checked_count("x", {rows, width});
    segment::Problem p{};
    p.rows = rows;
    p.width = width;
    if (rows <= segment::part_rows(width)) return int64_t(0);
    return checked_count("scratch", {segment::windows(p), 2 * segment::kPartNumbers, width});
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_segment_fold", [](py::handle problem, int64_t kind, int64_t out, int64_t scratch,
                                int64_t device, int64_t stream) {
    const auto f = kind_of<segment::Fold>(kind);
    const auto p = decode(problem, f);
    const bool has_parts = p.rows > segment::part_rows(p.width);
    on_device(device, cuda::segment_fold, p, f, checked_pointer("out", out, p.segments * p.width),
              checked_pointer("scratch", scratch, has_parts ? p.width : 0),
              optional_pointer("stream", stream));
  });
  m.def("cuda_segment_map",
        [](py::handle problem, int64_t kind, int64_t out, int64_t device, int64_t stream) {
          const auto f = kind_of<segment::Map>(kind);
          const auto p = decode(problem, f);
          on_device(device, cuda::segment_map, p, f, checked_pointer("out", out, p.rows * p.width),
                    optional_pointer("stream", stream));
        });
#endif
}

}  // namespace pyloss
