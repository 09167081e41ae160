// Contrastive losses from the features to the mean, around the kernels of similarity_softmax.cpp.
//
// Decomposition: rows are normalised by blocks, as are their gradients, in the place of those of
// the normalised rows. Numerics: norms as torch's, in R; the loss is a sum of doubles in the order
// of the rows.
#include "cpu/similarity_softmax_loss.h"

#include <algorithm>
#include <cmath>

#include "cpu/arena.h"
#include "cpu/similarity_softmax.h"
#include "cpu/similarity_softmax_math.h"
#include "cpu/similarity_softmax_plan.h"
#include "cpu/tasks.h"

namespace pyloss::cpu {
namespace {

using similarity_tiles::tile_math;

// Below so many elements a second thread is not woken up for them.
constexpr int64_t kFewElements = 1 << 16;

template <class R>
R clamped(R norm) {
  return norm < R(1e-12) ? R(1e-12) : norm;  // what is no number stays
}

template <class Fn>
void for_row_blocks(int64_t rows, int64_t d, int threads, Fn&& fn) {
  const int64_t blocks = blocks_of(rows, kPackRows);
  const int64_t slots = rows * d < kFewElements ? 1 : slots_for(blocks, threads);
  run_tasks(blocks, slots, [&](int64_t, int64_t block) {
    const int64_t first = block * kPackRows, last = std::min(rows, first + kPackRows);
    for (int64_t i = first; i < last; ++i) fn(i);
  });
}

SimilarityProblem problem_of(const SimilarityLoss& l) {
  SimilarityProblem p{};
  p.n = p.m = l.views ? 2 * l.rows : l.rows;
  p.d = l.d;
  p.dtype = l.dtype;
  p.itself = l.views || l.labels;
  p.unit_rows = true;
  p.queries = l.unit;
  const int64_t keys = p.itself ? 0 : l.rows * l.d * dtype_size(l.dtype);
  p.keys = static_cast<const char*>(l.unit) + keys;
  p.scale = l.scale;
  p.scales = l.scales;
  p.kinds.first = p.itself ? 0 : -1;
  if (l.labels) {
    p.kinds.flags = similarity::kPositive;
    p.kinds.query_ids = p.kinds.key_ids = l.labels;
  }
  return p;
}

PairSumOptions options_of(const SimilarityLoss& l) {
  return {PairSum::kSigmoid, l.bias, 0.0, 0.0};
}

// Of both tensors, where there are two.
int64_t rows_of(const SimilarityLoss& l) {
  return l.labels ? l.rows : 2 * l.rows;
}

template <class R>
struct Saved {
  R *norms, *lse, *column_lse, *weights;
  explicit Saved(const SimilarityLoss& l)
      : norms(static_cast<R*>(l.stats)),
        lse(norms + rows_of(l)),
        column_lse(lse + l.rows),
        weights(column_lse) {}
};

// The statistics that the loss has no use for, or the cotangents, beside the scratch of the op.
template <class R>
struct LossBuffers {
  int64_t* target;
  R *positive, *column_positive, *unused;
  char* rest;

  LossBuffers(const SimilarityLoss& l, int64_t n, Arena& arena) {
    target = arena.take<int64_t>(n);
    positive = arena.take<R>(n);
    column_positive = l.columns ? arena.take<R>(n) : nullptr;
    unused = arena.take<R>(n);
    rest = arena.take<char>(0);
  }
  const int64_t* find_targets(const SimilarityLoss& l, int64_t n) const {
    if (l.labels) return nullptr;
    const int64_t half = l.views ? l.rows : 0;
    for (int64_t i = 0; i < n; ++i) target[i] = i < half ? i + half : i - half;
    return target;
  }
};

template <class R>
int64_t buffer_bytes(const SimilarityLoss& l, int64_t n) {
  Arena count(nullptr);
  LossBuffers<R>(l, n, count);
  return count.used();
}

// What the term of a row counts. Of a softmax a positive alone is certain: then it is nothing.
double factor_of(const SimilarityLoss& l, int64_t n) {
  if (l.rows <= (l.sigmoid ? 0 : 1)) return 0;
  return (l.columns ? 0.5 : 1.0) / (l.sum ? 1.0 : double(n));
}

// With labels: of the number of positives of each row one over it, or 0 where it does not count.
template <class R>
void weigh(int64_t n, R* positives) {
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = positives[i] > 0 && positives[i] < R(n - 1);
    positives[i] = counts ? R(1) / positives[i] : R(0);
  }
}
template <class R>
double factor_of(const SimilarityLoss& l, const R* weights) {
  const int64_t none = std::count(weights, weights + l.rows, R(0));
  return l.sum ? 1.0 : 1.0 / double(std::max<int64_t>(1, l.rows - none));
}

template <class R>
void forward_of(const SimilarityLoss& l, const R* x1, const R* x2, R* loss, void* scratch,
                int threads) {
  const auto& math = tile_math<R>();
  const Saved<R> saved(l);
  R* const unit = static_cast<R*>(l.unit);
  for_row_blocks(rows_of(l), l.d, threads, [&](int64_t i) {
    const R* x = i < l.rows ? x1 + i * l.d : x2 + (i - l.rows) * l.d;
    saved.norms[i] = std::sqrt(math.dot(x, x, l.d));
    math.divide(x, l.d, clamped(saved.norms[i]), unit + i * l.d);
  });
  SimilarityProblem p = problem_of(l);
  Arena arena(scratch);
  const LossBuffers<R> b(l, p.n, arena);
  p.kinds.target = b.find_targets(l, p.n);
  double total = 0;
  if (l.sigmoid) {
    const PairSumForward f{{b.unused, nullptr}, {nullptr, nullptr}};
    pair_sums_forward(p, options_of(l), f, b.rest, threads);
    for (int64_t i = 0; i < p.n; ++i) total += b.unused[i];
    *loss = R(total * factor_of(l, p.n));
    return;
  }
  SimilarityForward f{};
  f.rows = {saved.lse, b.positive, b.unused, l.labels ? saved.weights : b.unused};
  if (l.columns) f.columns = {saved.column_lse, b.column_positive, b.unused, b.unused};
  similarity_softmax_forward(p, f, b.rest, threads);
  if (l.labels) {
    weigh(p.n, saved.weights);
    for (int64_t i = 0; i < p.n; ++i) {
      const R weight = saved.weights[i];
      if (weight != 0) total += saved.lse[i] - b.positive[i] * weight;
    }
    *loss = R(total * factor_of(l, saved.weights));
    return;
  }
  for (int64_t i = 0; i < p.n; ++i) {
    total += saved.lse[i] - b.positive[i];
    if (l.columns) total += saved.column_lse[i] - b.column_positive[i];
  }
  *loss = R(total * factor_of(l, p.n));
}

template <class R>
void backward_of(const SimilarityLoss& l, R g, const SimilarityLossGradients& to, void* scratch,
                 int threads) {
  const auto& math = tile_math<R>();
  const Saved<R> saved(l);
  SimilarityProblem p = problem_of(l);
  Arena arena(scratch);
  const LossBuffers<R> b(l, p.n, arena);
  p.kinds.target = b.find_targets(l, p.n);
  R *const of_lse = b.unused, *const of_positive = b.positive;
  const R each = R(double(g) * (l.labels ? factor_of(l, saved.weights) : factor_of(l, p.n)));
  for (int64_t i = 0; i < p.n; ++i) {
    const R weight = l.labels ? saved.weights[i] : R(1);
    of_lse[i] = weight != 0 ? each : R(0);
    of_positive[i] = -each * weight;
  }
  const SimilarityGradients of_unit{to.dx1, to.dx2, to.dscale, to.dbias};
  if (l.sigmoid) {
    pair_sums_backward(p, options_of(l), {{of_lse, nullptr}, of_unit}, b.rest, threads);
  } else {
    SimilarityBackward s{};
    s.rows = {saved.lse, of_lse, of_positive};
    if (l.columns) s.columns = {saved.column_lse, of_lse, of_positive};
    s.to = of_unit;
    similarity_softmax_backward(p, s, b.rest, threads);
  }
  const R* const unit = static_cast<const R*>(l.unit);
  R *const dx1 = static_cast<R*>(to.dx1), *const dx2 = static_cast<R*>(to.dx2);
  for_row_blocks(rows_of(l), l.d, threads, [&](int64_t i) {
    R* const base = l.views || i < l.rows ? dx1 : dx2;
    if (!base) return;
    R* const dx = base + (l.views || i < l.rows ? i : i - l.rows) * l.d;
    const R* const y = unit + i * l.d;
    const R norm = saved.norms[i];
    const R along = norm >= R(1e-12) ? math.dot(y, dx, l.d) : R(0);  // a clamped one is constant
    math.take_away(y, l.d, along, clamped(norm), dx);
  });
}

}  // namespace

int64_t similarity_loss_forward_scratch(const SimilarityLoss& l, int threads) {
  const SimilarityProblem p = problem_of(l);
  const int64_t own =
      l.dtype == DType::kF64 ? buffer_bytes<double>(l, p.n) : buffer_bytes<float>(l, p.n);
  return own + (l.sigmoid ? pair_sums_forward_scratch(p, threads)
                          : similarity_softmax_forward_scratch(p, l.columns, threads));
}
int64_t similarity_loss_backward_scratch(const SimilarityLoss& l, const SimilarityWants& w,
                                         int threads) {
  const SimilarityProblem p = problem_of(l);
  const int64_t own =
      l.dtype == DType::kF64 ? buffer_bytes<double>(l, p.n) : buffer_bytes<float>(l, p.n);
  return own + similarity_softmax_backward_scratch(p, w, threads);
}

void similarity_loss_forward(const SimilarityLoss& l, const void* x1, const void* x2, void* loss,
                             void* scratch, int threads) {
  const auto run = [&](auto r) {
    using R = decltype(r);
    forward_of(l, static_cast<const R*>(x1), static_cast<const R*>(x2), static_cast<R*>(loss),
               scratch, threads);
  };
  l.dtype == DType::kF64 ? run(double()) : run(float());
}
void similarity_loss_backward(const SimilarityLoss& l, const void* g,
                              const SimilarityLossGradients& to, void* scratch, int threads) {
  if (l.dtype == DType::kF64) {
    backward_of(l, *static_cast<const double*>(g), to, scratch, threads);
  } else {
    backward_of(l, *static_cast<const float*>(g), to, scratch, threads);
  }
}

}  // namespace pyloss::cpu
