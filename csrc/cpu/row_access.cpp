#include "cpu/row_access.h"

#include <stdexcept>
#include <string>

#include "common/compiler.h"

namespace pyloss::cpu {
namespace {

// Counts without branches, so that the usual case, all labels good, is a short loop.
struct Counts {
  int64_t skipped, bad;
};
template <class T>
PYLOSS_INLINE Counts counts_of(const T* labels, int64_t rows, uint64_t classes, int64_t ignored) {
  Counts n{0, 0};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = labels[r];
    n.skipped += y == ignored;
    n.bad += (uint64_t(y) >= classes) & (y != ignored);
  }
  return n;
}
#define PYLOSS_COUNTS(T)                                                             \
  PYLOSS_MULTIVERSION Counts counts(const T* labels, int64_t rows, uint64_t classes, \
                                    int64_t ignored) {                               \
    return counts_of(labels, rows, classes, ignored);                                \
  }
PYLOSS_COUNTS(int64_t)
PYLOSS_COUNTS(int32_t)
PYLOSS_COUNTS(uint8_t)
#undef PYLOSS_COUNTS

template <class T>
int64_t count_labels(const RowSoftmaxProblem& p, const T* labels) {
  const int64_t rows = p.rows(), ignored = p.options.ignore_index;
  const Counts found = counts(labels, rows, uint64_t(p.classes), ignored);
  if (found.bad == 0) return rows - found.skipped;
  for (int64_t r = 0;; ++r) {
    const int64_t y = labels[r];
    if (!in_range(y, p.classes) && y != ignored) {
      throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds.");
    }
  }
}

// Returns the number of labels that are not ignored.
int64_t check_labels(const RowSoftmaxProblem& p, const void* labels) {
  switch (p.target_dtype) {
    case DType::kI64:
      return count_labels(p, static_cast<const int64_t*>(labels));
    case DType::kI32:
      return count_labels(p, static_cast<const int32_t*>(labels));
    default:
      return count_labels(p, static_cast<const uint8_t*>(labels));
  }
}

}  // namespace

template <class R>
void prepare_norm(const RowSoftmaxProblem& p, R* norm) {
  const int64_t active = p.kind != TargetKind::kDense ? check_labels(p, p.target) : p.rows();
  if (p.kind == TargetKind::kMix) check_labels(p, p.target2);
  const R* w = static_cast<const R*>(p.weight);
  double weight_sum = double(p.classes);
  if (w) {
    weight_sum = 0;
    for (int64_t c = 0; c < p.classes; ++c) weight_sum += double(w[c]);
  }
  double loss = 0, z = 0;
  if (p.kind != TargetKind::kMix && !w && !p.token_weight) {
    loss = z = double(active);
  } else if (p.options.reduction == Reduction::kMean && p.options.num_items <= 0) {
    for (int64_t r = 0; r < p.rows(); ++r) {
      double a, b;
      mean_weights<R>(p, r, &a, &b);
      loss += a;
      z += b;
    }
  }
  finish_norm(p, loss, z, weight_sum, norm);
}

template <class R>
void finish_loss(const RowSoftmaxProblem& p, const RowSoftmaxForward& f) {
  const int64_t rows = p.rows();
  const R* losses = static_cast<const R*>(f.stats) + kStatLoss * rows;
  dispatch_float(f.loss_dtype, [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(f.loss);
    if (p.options.reduction == Reduction::kNone) {
      for (int64_t r = 0; r < rows; ++r) out[r] = FromFloat<T>::of(losses[r]);
      return;
    }
    double sums[8] = {};  // eight independent chains hide the latency of the addition
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      for (int64_t k = 0; k < 8; ++k) sums[k] += double(losses[r + k]);
    }
    for (; r < rows; ++r) sums[r % 8] += double(losses[r]);
    double sum = 0;
    for (double s : sums) sum += s;
    *out = FromFloat<T>::of(finish_sum(p, static_cast<const R*>(f.norm), R(sum)));
  });
}

template <class R>
RowTerms<R> load_terms(const RowSoftmaxProblem& p, const void* stats, int64_t row,
                       const RowTarget<R>& t, R* zy, R* zy2, R* soft_mass) {
  const int64_t n = p.rows();
  const R* s = static_cast<const R*>(stats) + row;
  *zy = s[kStatTarget * n];
  const bool more = p.stat_rows() > 4;
  *zy2 = more ? s[kStatTarget2 * n] : R(0);
  *soft_mass = more ? s[kStatSoft * n] : R(0);
  return row_terms(p, t, s[kStatMax * n], s[kStatRest * n], *zy, *zy2);
}

#define PYLOSS_INSTANTIATE(R)                                                        \
  template void prepare_norm<R>(const RowSoftmaxProblem&, R*);                       \
  template void finish_loss<R>(const RowSoftmaxProblem&, const RowSoftmaxForward&);  \
  template RowTerms<R> load_terms<R>(const RowSoftmaxProblem&, const void*, int64_t, \
                                     const RowTarget<R>&, R*, R*, R*);
PYLOSS_INSTANTIATE(float)
PYLOSS_INSTANTIATE(double)
#undef PYLOSS_INSTANTIATE

}  // namespace pyloss::cpu
