// Moments of a row of class scores around its mean, and the gradient of a function of them.
//
//   moments  target entry x_t; x_t - mean; mean = sum x_j / C; var = sum (x_j - mean)^2 / C
//   gradient dx_j = E (x_j - mean) + D + [j = t] T, with upstream g of the four:
//            T = g_target + g_offset, D = (g_mean - g_offset) / C, E = 2 g_var / C
//
// The variance is centred (Welford, Chan): sum x^2 / C - mean^2 has no digits left where the mean
// is large. The sum of squares is C (var + mean^2), which loses none. An ignored row has moments 0
// and no gradient.
//
// Paper: de Brebisson, Vincent, arXiv 1604.08859.
#pragma once

#include "common/dtype.h"
#include "common/math.h"
#include "common/row_softmax.h"

namespace pyloss::row_moments {

struct Problem {
  int64_t outer, classes, inner;  // a row is a pair (outer, inner)
  DType dtype, target_dtype;
  int64_t ignore_index;
  const void* x;       // [outer][classes][inner], with strides
  const void* target;  // [rows]
  Strides x_strides;

  PYLOSS_HD int64_t rows() const { return outer * inner; }
};

struct Backward {
  const void* moments;  // [kCount][rows], fp32, fp64 for fp64 input
  const void* grad;     // the same: upstream
  void* out;            // [outer][classes][inner], with strides
  Strides out_strides;
};

enum Moment { kTarget, kOffset, kMean, kVar, kCount };

PYLOSS_HD inline int64_t offset_of(const Strides& s, int64_t inner, int64_t row) {
  return (row / inner) * s.outer + (row % inner) * s.inner;
}

// Of n numbers: their mean, and the sum of squares around it.
template <class R>
struct Part {
  R n, mean, m2;
};

// Both, as if of all their numbers. The order of the arguments matters to the last bit.
template <class R>
PYLOSS_HD inline Part<R> merge(const Part<R>& a, const Part<R>& b) {
  if (b.n == 0) return a;
  if (a.n == 0) return b;
  const R n = a.n + b.n, share = b.n / n, d = b.mean - a.mean;
  return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.n * share};
}

template <class R>
PYLOSS_HD inline void store(void* moments, int64_t rows, int64_t row, double x_t, double mean,
                            double var) {
  R* m = static_cast<R*>(moments) + row;
  if (var < 0) var = 0;  // by rounding; a NaN stays
  m[kTarget * rows] = R(x_t);
  m[kOffset * rows] = R(x_t - mean);
  m[kMean * rows] = R(mean);
  m[kVar * rows] = R(var);
}

template <class R>
struct Coeffs {
  R mean, slope, shift, target;  // mean, E, D, T
};

template <class R>
PYLOSS_HD inline Coeffs<R> coeffs(const Problem& p, const Backward& b, int64_t row) {
  const int64_t rows = p.rows();
  const R* g = static_cast<const R*>(b.grad) + row;
  const R* m = static_cast<const R*>(b.moments) + row;
  const R each = R(1) / R(p.classes), offset = g[kOffset * rows];
  return {m[kMean * rows], 2 * g[kVar * rows] * each, (g[kMean * rows] - offset) * each,
          g[kTarget * rows] + offset};
}

template <class R>
PYLOSS_HD inline R gradient(const Coeffs<R>& c, R x) {
  return c.slope * (x - c.mean) + c.shift;
}

}  // namespace pyloss::row_moments
