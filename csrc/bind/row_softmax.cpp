// Python boundary of the row-softmax op: decodes and checks, releases the GIL, calls the kernels.
// pyloss/ops/row_softmax.py packs the tuples in the order that is read here.
#include "common/row_softmax.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bind/args.h"
#include "bind/register.h"
#include "cpu/row_softmax.h"
#if PYLOSS_WITH_CUDA
#include "cuda/row_softmax.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

using ProblemInts = std::array<int64_t, 22>;
using OptionFloats = std::array<double, 9>;
using StrideInts = std::array<int64_t, 3>;

Strides checked(const char* name, const RowSoftmaxProblem& p, const StrideInts& s) {
  check_strides(name, {p.outer, p.classes, p.inner}, {s[0], s[1], s[2]});
  return {s[0], s[1], s[2]};
}

RowSoftmaxProblem decode(const ProblemInts& a, const OptionFloats& o) {
  RowSoftmaxProblem p{};
  p.outer = a[0];
  p.classes = a[1];
  p.inner = a[2];
  const int64_t n = checked_count("input", {p.outer, p.classes, p.inner});
  const int64_t rows = checked_count("target", {p.outer, p.inner});
  if (p.classes > INT32_MAX) bad_argument("input", "more than 2^31 - 1 classes");
  if (p.classes == 0 && rows > 0) bad_argument("input", "rows without classes");
  p.dtype = checked_float("input", a[3]);
  p.x = checked_pointer("input", a[4], n);
  p.x_strides = checked("input", p, {a[5], a[6], a[7]});
  p.kind = checked_enum<TargetKind>("target kind", a[8], 3);
  p.target = checked_pointer("target", a[9], p.kind == TargetKind::kDense ? n : rows);
  p.target_dtype = checked_dtype("target", a[10]);
  if (is_float(p.target_dtype) != (p.kind == TargetKind::kDense)) {
    bad_argument("target", "dtype does not fit the kind of target");
  }
  p.target_strides = checked("target", p, {a[11], a[12], a[13]});
  p.target2 = checked_pointer("target2", a[14], p.kind == TargetKind::kMix ? rows : 0);
  p.mix = checked_pointer("mix", a[15], p.kind == TargetKind::kMix ? rows : 0);
  p.weight = optional_pointer(a[16]);
  p.token_weight = optional_pointer(a[17]);

  RowSoftmaxOptions& r = p.options;
  r.ignore_index = a[18];
  r.loss = checked_enum<LossKind>("loss", a[19], 2);
  r.reduction = checked_enum<Reduction>("reduction", a[20], 3);
  r.zero_if_empty = a[21] != 0;
  r.logit_scale = o[0];
  r.softcap = o[1];
  r.temperature = o[2];
  r.tau = o[3];
  r.max_nll = o[4];
  r.gamma = o[5];
  r.z_loss = o[6];
  r.smoothing = o[7];
  r.num_items = o[8];
  r.spread = r.smoothing / double(p.classes > 0 ? p.classes : 1);
  return p;
}

RowSoftmaxForward decode_forward(const RowSoftmaxProblem& p, int64_t loss, int64_t loss_dtype,
                                 int64_t stats, int64_t norm, int64_t extras, int64_t index,
                                 int64_t grad, const StrideInts& grad_strides) {
  const bool rowwise = p.options.reduction == Reduction::kNone;
  RowSoftmaxForward f{};
  f.loss = checked_pointer("loss", loss, rowwise ? p.rows() : 1);
  f.loss_dtype = checked_float("loss", loss_dtype);
  f.stats = checked_pointer("stats", stats, p.rows());
  f.norm = checked_pointer("norm", norm, kNormCount);
  f.extras = optional_pointer(extras);
  f.index = optional_pointer<int64_t>(index);
  f.grad = optional_pointer(grad);
  f.grad_strides = checked("grad", p, grad_strides);
  if (f.grad && rowwise) bad_argument("grad", "needs a scalar reduction");
  return f;
}

RowSoftmaxBackward decode_backward(const RowSoftmaxProblem& p, int64_t grad_loss,
                                   int64_t grad_extras, int64_t stats, int64_t norm, int64_t extras,
                                   int64_t grad, const StrideInts& grad_strides) {
  const bool rowwise = p.options.reduction == Reduction::kNone;
  RowSoftmaxBackward b{};
  b.grad_loss = checked_pointer("grad_loss", grad_loss, rowwise ? p.rows() : 1);
  b.grad_extras = optional_pointer(grad_extras);
  b.stats = checked_pointer("stats", stats, p.rows());
  b.norm = checked_pointer("norm", norm, kNormCount);
  b.extras = checked_pointer("extras", extras, grad_extras ? p.rows() : 0);
  b.grad = checked_pointer("grad", grad, p.rows());
  b.grad_strides = checked("grad", p, grad_strides);
  return b;
}

RowSoftmaxHvp decode_hvp(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int64_t v,
                         const StrideInts& v_strides, int64_t grad_rows, int64_t grad_extras) {
  if (p.soft()) bad_argument("target", "soft targets have no fused second derivative");
  RowSoftmaxHvp h{};
  h.backward = b;
  h.v = checked_pointer("v", v, p.rows());
  h.v_strides = checked("v", p, v_strides);
  h.grad_rows = checked_pointer("grad_rows", grad_rows, p.rows());
  h.grad_grad_extras = checked_pointer("grad_grad_extras", grad_extras, b.grad_extras ? 1 : 0);
  return h;
}

}  // namespace

void register_row_softmax(py::module_& m) {
  m.def("row_softmax_fwd",
        [](const ProblemInts& problem, const OptionFloats& options, int64_t loss,
           int64_t loss_dtype, int64_t stats, int64_t norm, int64_t extras, int64_t index,
           int64_t grad, const StrideInts& grad_strides, int64_t threads) {
          const RowSoftmaxProblem p = decode(problem, options);
          const RowSoftmaxForward f =
              decode_forward(p, loss, loss_dtype, stats, norm, extras, index, grad, grad_strides);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::row_softmax_forward(p, f, width);
        });
  m.def("row_softmax_bwd",
        [](const ProblemInts& problem, const OptionFloats& options, int64_t grad_loss,
           int64_t grad_extras, int64_t stats, int64_t norm, int64_t extras, int64_t grad,
           const StrideInts& grad_strides, int64_t threads) {
          const RowSoftmaxProblem p = decode(problem, options);
          const RowSoftmaxBackward b =
              decode_backward(p, grad_loss, grad_extras, stats, norm, extras, grad, grad_strides);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::row_softmax_backward(p, b, width);
        });
  m.def("row_softmax_hvp",
        [](const ProblemInts& problem, const OptionFloats& options, int64_t grad_loss,
           int64_t grad_extras, int64_t stats, int64_t norm, int64_t extras, int64_t grad,
           const StrideInts& grad_strides, int64_t v, const StrideInts& v_strides,
           int64_t grad_rows, int64_t grad_grad_extras, int64_t threads) {
          const RowSoftmaxProblem p = decode(problem, options);
          const RowSoftmaxBackward b =
              decode_backward(p, grad_loss, grad_extras, stats, norm, extras, grad, grad_strides);
          const RowSoftmaxHvp h = decode_hvp(p, b, v, v_strides, grad_rows, grad_grad_extras);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::row_softmax_hvp(p, h, width);
        });
  m.def("scale_inplace",
        [](int64_t data, int64_t dtype, int64_t n, int64_t factor, int64_t threads) {
          const DType t = checked_float("data", dtype);
          const int64_t count = checked_count("data", {n});
          void* p = checked_pointer("data", data, count);
          const void* f = checked_pointer("factor", factor, 1);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::scale_inplace(p, t, count, f, width);
        });

#if PYLOSS_WITH_CUDA
  m.def("cuda_row_softmax_scratch_bytes",
        [](const ProblemInts& problem, const OptionFloats& options) {
          return cuda::row_softmax_scratch_bytes(decode(problem, options));
        });
  m.def(
      "cuda_row_softmax_fwd",
      [](const ProblemInts& problem, const OptionFloats& options, int64_t loss, int64_t loss_dtype,
         int64_t stats, int64_t norm, int64_t extras, int64_t index, int64_t grad,
         const StrideInts& grad_strides, int64_t scratch, int64_t scratch_bytes, int64_t stream) {
        const RowSoftmaxProblem p = decode(problem, options);
        const RowSoftmaxForward f =
            decode_forward(p, loss, loss_dtype, stats, norm, extras, index, grad, grad_strides);
        py::gil_scoped_release nogil;
        cuda::row_softmax_forward(p, f, optional_pointer(scratch), scratch_bytes,
                                  optional_pointer(stream));
      });
  m.def("cuda_row_softmax_bwd",
        [](const ProblemInts& problem, const OptionFloats& options, int64_t grad_loss,
           int64_t grad_extras, int64_t stats, int64_t norm, int64_t extras, int64_t grad,
           const StrideInts& grad_strides, int64_t stream) {
          const RowSoftmaxProblem p = decode(problem, options);
          const RowSoftmaxBackward b =
              decode_backward(p, grad_loss, grad_extras, stats, norm, extras, grad, grad_strides);
          py::gil_scoped_release nogil;
          cuda::row_softmax_backward(p, b, optional_pointer(stream));
        });
  m.def("cuda_row_softmax_hvp",
        [](const ProblemInts& problem, const OptionFloats& options, int64_t grad_loss,
           int64_t grad_extras, int64_t stats, int64_t norm, int64_t extras, int64_t grad,
           const StrideInts& grad_strides, int64_t v, const StrideInts& v_strides,
           int64_t grad_rows, int64_t grad_grad_extras, int64_t stream) {
          const RowSoftmaxProblem p = decode(problem, options);
          const RowSoftmaxBackward b =
              decode_backward(p, grad_loss, grad_extras, stats, norm, extras, grad, grad_strides);
          const RowSoftmaxHvp h = decode_hvp(p, b, v, v_strides, grad_rows, grad_grad_extras);
          py::gil_scoped_release nogil;
          cuda::row_softmax_hvp(p, h, optional_pointer(stream));
        });
  m.def("cuda_scale_inplace",
        [](int64_t data, int64_t dtype, int64_t n, int64_t factor, int64_t stream) {
          const DType t = checked_float("data", dtype);
          const int64_t count = checked_count("data", {n});
          void* p = checked_pointer("data", data, count);
          const void* f = checked_pointer("factor", factor, 1);
          py::gil_scoped_release nogil;
          cuda::scale_inplace(p, t, count, f, optional_pointer(stream));
        });
#endif
}

}  // namespace pyloss
