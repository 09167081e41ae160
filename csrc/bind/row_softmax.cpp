// Python boundary of the row-softmax op: decodes and checks, releases the GIL, calls the kernels.
// The records are those of pyloss/ops/row_softmax/records.py.
#include "common/row_softmax.h"

#include <pybind11/pybind11.h>

#include <array>
#include <cmath>

#include "bind/logits.h"
#include "bind/register.h"
#include "cpu/row_softmax.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/row_softmax.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Options, logit_scale, softcap, temperature, tau, max_nll, gamma, poly1, relaxation,
              margin, offset, z_loss, smoothing, num_items);
PYLOSS_RECORD(Codes, kind, ignore_index, loss, reduction, zero_if_empty);
PYLOSS_RECORD(Problem, sizes, dtype, x, x_strides, target, target_dtype, target_strides, target2,
              mix, weight, token_weight, codes, options);
PYLOSS_RECORD(Forward, loss, loss_dtype, stats, norm, extras, index, grad, grad_strides);
PYLOSS_RECORD(Backward, grad_loss, grad_extras, stats, norm, extras, grad, grad_strides);
PYLOSS_RECORD(Hvp, v, v_strides, grad_rows, grad_grad_extras);

RowSoftmaxOptions decode_options(const Reader<Options>& o, const Reader<Codes>& c,
                                 int64_t classes) {
  RowSoftmaxOptions r{};
  r.ignore_index = c.integer(Codes::ignore_index);
  r.loss = c.code<LossKind>(Codes::loss, kLossKindCount);
  r.reduction = c.code<Reduction>(Codes::reduction, kReductionCount);
  r.zero_if_empty = c.flag(Codes::zero_if_empty);
  r.logit_scale = o.number(Options::logit_scale);
  r.softcap = o.number(Options::softcap);
  r.temperature = o.number(Options::temperature);
  r.tau = o.number(Options::tau);
  r.max_nll = o.number(Options::max_nll);
  r.gamma = o.number(Options::gamma);
  r.poly1 = o.number(Options::poly1);
  r.relaxation = o.number(Options::relaxation);
  r.margin = o.number(Options::margin);
  r.offset = o.number(Options::offset);
  r.z_loss = o.number(Options::z_loss);
  r.smoothing = o.number(Options::smoothing);
  r.num_items = o.number(Options::num_items);
  r.spread = r.smoothing / double(classes > 0 ? classes : 1);
  return r;
}

RowSoftmaxProblem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  const auto codes = r.record<Codes>(Problem::codes);
  RowSoftmaxProblem p{};
  const int64_t n = decode_logits(r, p), rows = p.rows();
  p.kind = codes.code<TargetKind>(Codes::kind, 3);
  p.target = r.pointer(Problem::target, p.kind == TargetKind::kDense ? n : rows);
  p.target_dtype = r.dtype(Problem::target_dtype);
  if (is_float(p.target_dtype) != (p.kind == TargetKind::kDense)) {
    r.bad(Problem::target_dtype, "does not fit the kind of target");
  }
  p.target_strides = strides(r, Problem::target_strides, p);
  p.target2 = r.pointer(Problem::target2, p.kind == TargetKind::kMix ? rows : 0);
  p.mix = r.pointer(Problem::mix, p.kind == TargetKind::kMix ? rows : 0);
  p.weight = r.optional(Problem::weight);
  p.token_weight = r.optional(Problem::token_weight);
  p.options = decode_options(r.record<Options>(Problem::options), codes, p.classes);
  if (p.options.margin != 0 && (p.kind != TargetKind::kIndex || p.options.smoothing > 0)) {
    r.bad(Problem::options, "a margin needs one label, not smoothed");
  }
  return p;
}

RowSoftmaxForward decode_forward(const RowSoftmaxProblem& p, const py::handle& record) {
  const Reader<Forward> r(record);
  const bool rowwise = p.options.reduction == Reduction::kNone;
  RowSoftmaxForward f{};
  f.loss = r.pointer(Forward::loss, rowwise ? p.rows() : 1);
  f.loss_dtype = r.floating(Forward::loss_dtype);
  f.stats = r.pointer(Forward::stats, p.rows());
  f.norm = r.pointer(Forward::norm, kNormCount);
  f.extras = r.optional(Forward::extras);
  f.index = r.optional<int64_t>(Forward::index);
  f.grad = r.optional(Forward::grad);
  f.grad_strides = strides(r, Forward::grad_strides, p);
  if (f.grad && rowwise) r.bad(Forward::grad, "needs a scalar reduction");
  return f;
}

RowSoftmaxBackward decode_backward(const RowSoftmaxProblem& p, const py::handle& record) {
  const Reader<Backward> r(record);
  const bool rowwise = p.options.reduction == Reduction::kNone;
  RowSoftmaxBackward b{};
  b.grad_loss = r.pointer(Backward::grad_loss, rowwise ? p.rows() : 1);
  b.grad_extras = r.optional(Backward::grad_extras);
  b.stats = r.pointer(Backward::stats, p.rows());
  b.norm = r.pointer(Backward::norm, kNormCount);
  b.extras = r.pointer(Backward::extras, b.grad_extras ? p.rows() : 0);
  b.grad = r.pointer(Backward::grad, p.rows());
  b.grad_strides = strides(r, Backward::grad_strides, p);
  return b;
}

RowSoftmaxHvp decode_hvp(const RowSoftmaxProblem& p, const py::handle& backward,
                         const py::handle& record) {
  if (p.soft()) bad_argument("target", "soft targets have no fused second derivative");
  const Reader<Hvp> r(record);
  RowSoftmaxHvp h{};
  h.backward = decode_backward(p, backward);
  h.v = r.pointer(Hvp::v, p.rows());
  h.v_strides = strides(r, Hvp::v_strides, p);
  h.grad_rows = r.pointer(Hvp::grad_rows, p.rows());
  h.grad_grad_extras = r.pointer(Hvp::grad_grad_extras, h.backward.grad_extras ? 1 : 0);
  return h;
}

}  // namespace

void register_row_softmax(py::module_& m) {
  declare_records<Options, Codes, Problem, Forward, Backward, Hvp>(m, "row_softmax");
  m.def("row_softmax_fwd", [](py::handle problem, py::handle forward, int64_t threads) {
    const RowSoftmaxProblem p = decode(problem);
    const RowSoftmaxForward f = decode_forward(p, forward);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::row_softmax_forward(p, f, width);
  });
  m.def("row_softmax_bwd", [](py::handle problem, py::handle backward, int64_t threads) {
    const RowSoftmaxProblem p = decode(problem);
    const RowSoftmaxBackward b = decode_backward(p, backward);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::row_softmax_backward(p, b, width);
  });
  m.def("row_softmax_hvp",
        [](py::handle problem, py::handle backward, py::handle hvp, int64_t threads) {
          const RowSoftmaxProblem p = decode(problem);
          const RowSoftmaxHvp h = decode_hvp(p, backward, hvp);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::row_softmax_hvp(p, h, width);
        });
  m.def("small_row_softmax",
        [](int64_t rows, int64_t classes, int64_t x, int64_t target, int64_t target_dtype,
           int64_t ignore_index, bool mean, int64_t loss, int64_t grad) {
          cpu::SmallRowSoftmax p{};
          p.rows = rows;
          p.classes = classes;
          p.x = checked_pointer<const float>("x", x, checked_count("x", {rows, classes}));
          if (classes == 0) bad_argument("classes", "none");
          p.target = checked_pointer("target", target, rows);
          p.target_dtype = checked_dtype("target", target_dtype);
          if (is_float(p.target_dtype)) bad_argument("target", "not an integer dtype");
          p.ignore_index = ignore_index;
          p.mean = mean;
          p.loss = checked_pointer<float>("loss", loss, 1);
          p.grad = optional_pointer<float>("grad", grad);
          py::gil_scoped_release nogil;
          cpu::small_row_softmax(p);
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
  m.def("cuda_row_softmax_scratch_bytes", [](py::handle problem, int64_t device) {
    return on_device(device, cuda::row_softmax_scratch_bytes, decode(problem));
  });
  m.def("cuda_row_softmax_fwd", [](py::handle problem, py::handle forward, int64_t scratch,
                                   int64_t scratch_bytes, int64_t device, int64_t stream) {
    const RowSoftmaxProblem p = decode(problem);
    const RowSoftmaxForward f = decode_forward(p, forward);
    on_device(device, cuda::row_softmax_forward, p, f, optional_pointer("scratch", scratch),
              scratch_bytes, optional_pointer("stream", stream));
  });
  m.def("cuda_row_softmax_bwd",
        [](py::handle problem, py::handle backward, int64_t device, int64_t stream) {
          const RowSoftmaxProblem p = decode(problem);
          const RowSoftmaxBackward b = decode_backward(p, backward);
          on_device(device, cuda::row_softmax_backward, p, b, optional_pointer("stream", stream));
        });
  m.def("cuda_row_softmax_hvp", [](py::handle problem, py::handle backward, py::handle hvp,
                                   int64_t device, int64_t stream) {
    const RowSoftmaxProblem p = decode(problem);
    const RowSoftmaxHvp h = decode_hvp(p, backward, hvp);
    on_device(device, cuda::row_softmax_hvp, p, h, optional_pointer("stream", stream));
  });
  m.def("cuda_scale_inplace", [](int64_t data, int64_t dtype, int64_t n, int64_t factor,
                                 int64_t device, int64_t stream) {
    const DType t = checked_float("data", dtype);
    const int64_t count = checked_count("data", {n});
    void* p = checked_pointer("data", data, count);
    const void* f = checked_pointer("factor", factor, 1);
    on_device(device, cuda::scale_inplace, p, t, count, f, optional_pointer("stream", stream));
  });
#endif
}

}  // namespace pyloss
