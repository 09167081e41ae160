// Python boundary of similarity_softmax: decodes and checks, releases the GIL, calls the kernels.
#include "cpu/similarity_softmax.h"

#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/attention.h"
#include "bind/register.h"
#include "cpu/similarity_counts.h"
#include "cpu/similarity_softmax_loss.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using cpu::SimilarityBackward;
using cpu::SimilarityForward;
using cpu::SimilarityProblem;

constexpr int64_t kMostRows = int64_t(1) << 40, kMostElements = int64_t(1) << 44;

// Rows are contiguous. scales: none, one or (with scale_of_each) n, of the accumulator's dtype.
PYLOSS_RECORD(Problem, n, m, d, dtype, itself, queries, keys, scale, scales, scale_of_each, target,
              query_ids, key_ids, first, flags);
// The results; of the columns 0 where they are not wanted.
PYLOSS_RECORD(Forward, lse, positive, count, positives, mean, column_lse, column_positive,
              column_count, column_positives);
PYLOSS_RECORD(Backward, lse, column_lse, g, g_positive, column_g, column_g_positive, dq, dk,
              dscale);
// Of similarity_counts: rows of float or double, labels from 0 to classes.
PYLOSS_RECORD(Counts, n, d, classes, steps, dtype, x, half, labels, edges);

SimilarityProblem decode(py::handle record) {
  const Reader<Problem> r(record);
  SimilarityProblem p{};
  p.n = r.integer(Problem::n);
  p.m = r.integer(Problem::m);
  p.d = r.integer(Problem::d);
  for (const int64_t rows : {p.n, p.m}) {
    if (checked_count("queries or keys", {rows, p.d}) > kMostElements || rows > kMostRows) {
      bad_argument("queries or keys", "too many");
    }
  }
  p.dtype = r.floating(Problem::dtype);
  p.itself = r.flag(Problem::itself);
  if (p.itself && p.n != p.m) r.bad(Problem::m, "must be n where the keys are the queries");
  p.queries = r.pointer(Problem::queries, p.n * p.d);
  p.keys = r.pointer(Problem::keys, p.m * p.d);
  p.scale = r.number(Problem::scale);
  p.scale_of_each = r.flag(Problem::scale_of_each);
  p.scales = r.pointer(Problem::scales, p.scale_of_each ? p.n : 0);
  if (p.itself && p.scale_of_each) {
    r.bad(Problem::scale_of_each, "needs keys that are not the queries");
  }
  similarity::Kinds& k = p.kinds;
  k.flags = static_cast<int>(r.code<int64_t>(Problem::flags, 1 << 5));
  k.target = r.optional<int64_t>(Problem::target);
  if (k.flags & (similarity::kPositive | similarity::kDrop)) {
    k.query_ids = r.pointer<int64_t>(Problem::query_ids, p.n);
    k.key_ids = r.pointer<int64_t>(Problem::key_ids, p.m);
  }
  k.first = r.integer(Problem::first);
  if (k.first > kMostRows) r.bad(Problem::first, "too large");
  return p;
}

SimilarityForward decode_forward(py::handle record, const SimilarityProblem& p) {
  const Reader<Forward> r(record);
  SimilarityForward f{};
  f.rows = {r.pointer(Forward::lse, p.n), r.pointer(Forward::positive, p.n),
            r.pointer(Forward::count, p.n), r.pointer(Forward::positives, p.n)};
  f.mean = r.optional(Forward::mean);
  if (r.optional(Forward::column_lse)) {
    if (p.itself) r.bad(Forward::column_lse, "needs keys that are not the queries");
    f.columns = {r.pointer(Forward::column_lse, p.m), r.pointer(Forward::column_positive, p.m),
                 r.pointer(Forward::column_count, p.m), r.pointer(Forward::column_positives, p.m)};
  }
  return f;
}

SimilarityBackward decode_backward(py::handle record, const SimilarityProblem& p) {
  const Reader<Backward> r(record);
  SimilarityBackward b{};
  b.rows = {r.pointer(Backward::lse, p.n), r.optional(Backward::g),
            r.optional(Backward::g_positive)};
  b.columns = {nullptr, r.optional(Backward::column_g), r.optional(Backward::column_g_positive)};
  if (b.columns.of_lse) b.columns.lse = r.pointer(Backward::column_lse, p.m);
  b.to.dq = r.optional(Backward::dq);
  b.to.dk = r.optional(Backward::dk);
  b.to.dscale = r.optional(Backward::dscale);
  if (p.itself && (b.to.dk || b.columns.of_lse || b.columns.of_positive)) {
    r.bad(Backward::dk, "needs keys that are not the queries, as cotangents of columns do");
  }
  return b;
}

cpu::CountsProblem decode_counts(py::handle record) {
  const Reader<Counts> r(record);
  cpu::CountsProblem p{};
  p.n = r.integer(Counts::n);
  p.d = r.integer(Counts::d);
  p.classes = r.integer(Counts::classes);
  p.steps = r.integer(Counts::steps);
  if (checked_count("x", {p.n, p.d}) > kMostElements || p.n > kMostRows) {
    bad_argument("x", "too many");
  }
  if (p.classes < 0 || p.classes > p.n) r.bad(Counts::classes, "not from 0 to n");
  if (p.steps < 1) r.bad(Counts::steps, "needs at least one");
  if (checked_count("counts", {p.classes + 1, p.steps}) > kMostElements) {
    bad_argument("counts", "too many");
  }
  p.dtype = r.float32_or_float64(Counts::dtype);
  p.x = r.pointer(Counts::x, p.n * p.d);
  p.half = r.pointer(Counts::half, p.n);
  p.labels = r.pointer<const int64_t>(Counts::labels, p.n);
  p.edges = r.pointer(Counts::edges, p.steps);
  return p;
}

// They index the counts.
void check_labels(const cpu::CountsProblem& p) {
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.labels[i] < 0 || p.labels[i] > p.classes) {
      bad_argument("labels", "not from 0 to the number of classes");
    }
  }
}

// Sums that are no softmax. bias: one number of the accumulator's dtype, or 0; numbers: the bias,
// or what is above and below.
PYLOSS_RECORD(PairSums, kind, bias, number1, number2);
PYLOSS_RECORD(PairSumResults, sum1, count1, sum2, count2);
PYLOSS_RECORD(PairSumGradients, g1, g2, dq, dk, dscale, dbias);

// One number of the accumulator's dtype, or else the other one.
double bias_of(const void* bias, DType dtype, double otherwise) {
  if (!bias) return otherwise;
  return dtype == DType::kF64 ? *static_cast<const double*>(bias)
                              : double(*static_cast<const float*>(bias));
}

cpu::PairSumOptions decode_sums(py::handle record, const SimilarityProblem& p) {
  const Reader<PairSums> r(record);
  cpu::PairSumOptions s{};
  s.kind = r.code<cpu::PairSum>(PairSums::kind, 2);
  s.above = r.number(PairSums::number1);
  s.below = r.number(PairSums::number2);
  s.bias = bias_of(r.optional(PairSums::bias), p.dtype, s.above);
  if (p.kinds.flags & similarity::kNegatives) {
    bad_argument("flags", "sums over pairs have no denominator");
  }
  return s;
}

cpu::PairSumForward decode_results(py::handle record, const SimilarityProblem& p,
                                   const cpu::PairSumOptions& s) {
  const Reader<PairSumResults> r(record);
  const bool one = s.kind == cpu::PairSum::kSigmoid;
  return {{r.pointer(PairSumResults::sum1, p.n), r.pointer(PairSumResults::sum2, one ? 0 : p.n)},
          {r.optional(PairSumResults::count1), r.optional(PairSumResults::count2)}};
}

cpu::PairSumBackward decode_gradients(py::handle record, const SimilarityProblem& p,
                                      const cpu::PairSumOptions& s) {
  const Reader<PairSumGradients> r(record);
  const bool one = s.kind == cpu::PairSum::kSigmoid;
  cpu::PairSumBackward b{};
  b.cotangents[0] = r.pointer(PairSumGradients::g1, one ? p.n : 0);
  b.cotangents[1] = r.optional(PairSumGradients::g2);
  b.to = {r.optional(PairSumGradients::dq), r.optional(PairSumGradients::dk),
          r.optional(PairSumGradients::dscale), r.optional(PairSumGradients::dbias)};
  if (p.itself && b.to.dk) r.bad(PairSumGradients::dk, "needs keys that are not the queries");
  return b;
}

// A loss from the features to the mean; unit and stats are written by its forward, read by its
// backward.
// bias: as of PairSums.
PYLOSS_RECORD(Loss, rows, d, dtype, views, columns, sigmoid, sum, scale, scales, bias, biases,
              labels, unit, stats);

PYLOSS_RECORD(LossGradients, g, dx1, dx2, dscale, dbias);

cpu::SimilarityLoss decode_loss(py::handle record) {
  const Reader<Loss> r(record);
  cpu::SimilarityLoss l{};
  l.rows = r.integer(Loss::rows);
  l.d = r.integer(Loss::d);
  if (checked_count("features", {l.rows, l.d}) > kMostElements || l.rows > kMostRows) {
    bad_argument("features", "too many");
  }
  l.dtype = r.float32_or_float64(Loss::dtype);
  l.views = r.flag(Loss::views);
  l.columns = r.flag(Loss::columns);
  if (l.views && l.columns) r.bad(Loss::columns, "needs keys that are not the queries");
  l.sigmoid = r.flag(Loss::sigmoid);
  if (l.sigmoid && (l.views || l.columns)) r.bad(Loss::sigmoid, "needs plain keys");
  l.sum = r.flag(Loss::sum);
  l.scale = r.number(Loss::scale);
  l.scales = r.optional(Loss::scales);
  l.bias = bias_of(r.optional(Loss::biases), l.dtype, r.number(Loss::bias));
  l.labels = r.optional<const int64_t>(Loss::labels);
  if (l.labels && (l.views || l.columns || l.sigmoid)) r.bad(Loss::labels, "need plain rows");
  l.unit = r.pointer(Loss::unit, l.rows * l.d);
  l.stats = r.pointer(Loss::stats, l.rows);
  return l;
}

}  // namespace

void register_similarity_softmax(py::module_& m) {
  declare_records<Problem, Forward, Backward, Counts, PairSums, PairSumResults, PairSumGradients,
                  Loss, LossGradients>(m, "similarity_softmax");
  m.def("similarity_counts_scratch_bytes", [](py::handle problem, int64_t threads) {
    return cpu::similarity_counts_scratch(decode_counts(problem), checked_threads(threads));
  });
  m.def("similarity_counts", [](py::handle problem, int64_t counts, int64_t scratch,
                                int64_t scratch_bytes, int64_t threads) {
    const cpu::CountsProblem p = decode_counts(problem);
    const int width = checked_threads(threads);
    void* buffer =
        checked_scratch(scratch, scratch_bytes, cpu::similarity_counts_scratch(p, width));
    auto* to = checked_pointer<int64_t>("counts", counts, 2 * (p.classes + 1) * p.steps);
    check_labels(p);
    without_gil(cpu::similarity_counts, p, to, buffer, width);
  });
  m.def("similarity_softmax_fwd_scratch_bytes",
        [](py::handle problem, bool columns, int64_t threads) {
          return cpu::similarity_softmax_forward_scratch(decode(problem), columns,
                                                         checked_threads(threads));
        });
  m.def("similarity_softmax_bwd_scratch_bytes",
        [](py::handle problem, bool dq, bool dk, bool dscale, bool dbias, int64_t threads) {
          return cpu::similarity_softmax_backward_scratch(decode(problem), {dq, dk, dscale, dbias},
                                                          checked_threads(threads));
        });
  m.def("similarity_softmax_fwd", [](py::handle problem, py::handle forward, int64_t scratch,
                                     int64_t scratch_bytes, int64_t threads) {
    const SimilarityProblem p = decode(problem);
    const SimilarityForward f = decode_forward(forward, p);
    const int width = checked_threads(threads);
    const int64_t needed =
        cpu::similarity_softmax_forward_scratch(p, f.columns.lse != nullptr, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    without_gil(cpu::similarity_softmax_forward, p, f, buffer, width);
  });
  m.def("similarity_softmax_bwd", [](py::handle problem, py::handle backward, int64_t scratch,
                                     int64_t scratch_bytes, int64_t threads) {
    const SimilarityProblem p = decode(problem);
    const SimilarityBackward b = decode_backward(backward, p);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::similarity_softmax_backward_scratch(p, wants_of(b.to), width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    without_gil(cpu::similarity_softmax_backward, p, b, buffer, width);
  });
  m.def("similarity_loss_fwd_scratch_bytes", [](py::handle loss, int64_t threads) {
    return cpu::similarity_loss_forward_scratch(decode_loss(loss), checked_threads(threads));
  });
  m.def("similarity_loss_fwd", [](py::handle loss, int64_t x1, int64_t x2, int64_t result,
                                  int64_t scratch, int64_t scratch_bytes, int64_t threads) {
    const cpu::SimilarityLoss l = decode_loss(loss);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::similarity_loss_forward_scratch(l, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    const void* first = checked_pointer("x1", x1, l.rows * l.d);
    const void* second = checked_pointer("x2", x2, l.labels ? 0 : l.rows * l.d);
    void* to = checked_pointer("loss", result, 1);
    without_gil(cpu::similarity_loss_forward, l, first, second, to, buffer, width);
  });
  m.def("similarity_loss_bwd_scratch_bytes",
        [](py::handle loss, bool dx1, bool dx2, bool dscale, bool dbias, int64_t threads) {
          return cpu::similarity_loss_backward_scratch(decode_loss(loss), {dx1, dx2, dscale, dbias},
                                                       checked_threads(threads));
        });
  m.def("similarity_loss_bwd", [](py::handle loss, py::handle gradients, int64_t scratch,
                                  int64_t scratch_bytes, int64_t threads) {
    const cpu::SimilarityLoss l = decode_loss(loss);
    const Reader<LossGradients> r(gradients);
    const void* of_loss = r.pointer(LossGradients::g, 1);
    const cpu::SimilarityLossGradients to{
        r.optional(LossGradients::dx1), r.optional(LossGradients::dx2),
        r.optional(LossGradients::dscale), r.optional(LossGradients::dbias)};
    if (l.views && to.dx2) r.bad(LossGradients::dx2, "of views dx1 has both");
    if (l.labels && to.dx2) r.bad(LossGradients::dx2, "with labels there is one tensor");
    if (!l.sigmoid && to.dbias) r.bad(LossGradients::dbias, "needs the sigmoid loss");
    const int width = checked_threads(threads);
    const cpu::SimilarityWants wants{to.dx1 != nullptr, to.dx2 != nullptr, to.dscale != nullptr,
                                     to.dbias != nullptr};
    const int64_t needed = cpu::similarity_loss_backward_scratch(l, wants, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    without_gil(cpu::similarity_loss_backward, l, of_loss, to, buffer, width);
  });
  m.def("pair_sums_fwd_scratch_bytes", [](py::handle problem, int64_t threads) {
    return cpu::pair_sums_forward_scratch(decode(problem), checked_threads(threads));
  });
  m.def("pair_sums_fwd", [](py::handle problem, py::handle sums, py::handle results,
                            int64_t scratch, int64_t scratch_bytes, int64_t threads) {
    const SimilarityProblem p = decode(problem);
    const cpu::PairSumOptions s = decode_sums(sums, p);
    const cpu::PairSumForward f = decode_results(results, p, s);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::pair_sums_forward_scratch(p, width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    without_gil(cpu::pair_sums_forward, p, s, f, buffer, width);
  });
  m.def("pair_sums_bwd", [](py::handle problem, py::handle sums, py::handle gradients,
                            int64_t scratch, int64_t scratch_bytes, int64_t threads) {
    const SimilarityProblem p = decode(problem);
    const cpu::PairSumOptions s = decode_sums(sums, p);
    const cpu::PairSumBackward b = decode_gradients(gradients, p, s);
    const int width = checked_threads(threads);
    const int64_t needed = cpu::similarity_softmax_backward_scratch(p, wants_of(b.to), width);
    void* buffer = checked_scratch(scratch, scratch_bytes, needed);
    without_gil(cpu::pair_sums_backward, p, s, b, buffer, width);
  });
}

}  // namespace pyloss
