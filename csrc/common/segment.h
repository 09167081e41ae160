// Reductions over the segments of a ragged batch, and what goes back from them to the values.
//
//   x [rows][width], offsets [segments + 1]: segment s is the rows [offsets[s], offsets[s + 1])
//
// A fold gives numbers of each segment and column, a map a number of each value from those of its
// segment. Gradients are maps of what folds have found:
//
//   sum, mean       g, g / n
//   min, max        [x = m] g / t, t = number of values that are m (fold kTies)
//   prod            g times the product p of the values that are not 0, over x; with one zero, at
//                   it alone; with several, nowhere (fold kFactors: p and the number z of zeros)
//   logsumexp l     g exp(x - l)
//   moments         (g_mean + 2 g_var (x - mean)) / n
//   softmax m, d    g_d exp(x - m) + [x = m] (g_m - g_d d) / t, d = sum exp(x - m)
//   y = exp(x - m) / d: y (g - sum g y) (fold kInner)
//
// An infinite maximum is 0 where it is subtracted: what is then infinite or 0 is so by itself.
// Parts of a segment merge in the order of their rows: moments as Chan, Golub and LeVeque merge
// them, exponentials at the larger maximum.
//
// Offsets that do not go from 0 to rows, or decrease: an error on the CPU, NaN on a GPU.
#pragma once

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss::segment {

// clang-format off
enum class Fold {
  kSum, kMean, kProd, kMin, kMax, kLogSumExp, kMoments, kSoftmax, kArgmax, kTies, kFactors, kInner,
  kCount
};
enum class Map {
  kSpread, kSpreadMean, kToTies, kToFactors, kExp, kToMoments, kToSoftmax, kNormalized,
  kFromNormalized, kCount
};
// clang-format on

inline constexpr int kMostGiven = 5;
inline constexpr int kPartNumbers = 3;  // of a part that waits to be merged: m and two sums

struct Problem {
  int64_t rows, width, segments;
  DType dtype, offsets_dtype;
  const void* x;      // [rows][width], columns adjacent
  const void* other;  // the same dtype; kInner, kFromNormalized
  int64_t x_stride, other_stride;
  const void* offsets;            // [segments + 1]
  const void* given[kMostGiven];  // [segments][width] each, fp32, fp64 for fp64 x

  PYLOSS_HD int64_t offset(int64_t s) const {
    return offsets_dtype == DType::kI64 ? static_cast<const int64_t*>(offsets)[s]
                                        : int64_t(static_cast<const int32_t*>(offsets)[s]);
  }
  // The first segment that begins at or after a row; `segments` if none does.
  PYLOSS_HD int64_t first_from(int64_t row) const {
    int64_t low = 0, high = segments;
    while (low < high) {
      const int64_t mid = low + (high - low) / 2;
      if (offset(mid) < row) {
        low = mid + 1;
      } else {
        high = mid;
      }
    }
    return low;
  }
};

PYLOSS_HD inline int results(Fold f) {
  return f == Fold::kMoments || f == Fold::kSoftmax || f == Fold::kFactors ? 2 : 1;
}
PYLOSS_HD inline int given(Fold f) {
  return f == Fold::kTies || f == Fold::kArgmax ? 1 : 0;
}
PYLOSS_HD inline int given(Map f) {
  switch (f) {
    case Map::kToTies:
    case Map::kToFactors:
    case Map::kToMoments:
      return 3;
    case Map::kExp:
    case Map::kNormalized:
      return 2;
    case Map::kToSoftmax:
      return 5;
    default:
      return 1;
  }
}

// Rows of a part: a longer segment is cut there, counted from its own beginning, so that neither
// the other segments nor the threads can change its bits. Parts of long segments have two places in
// every window of so many rows: one for the first of a segment, one for a later one; two of the
// same kind are never so close.
PYLOSS_HD inline int64_t part_rows(int64_t width) {
  const int64_t n = 4096 / (width < 1 ? 1 : width);
  return n < 64 ? 64 : n;
}
PYLOSS_HD inline int64_t windows(const Problem& p) {
  return p.rows / part_rows(p.width) + 1;  // the last has what begins behind the last row, too
}

// ---- One pass over values ----------------------------------------------------------------------

// What a pass sums up; V is a number, or a vector of them. kExp and kSquares are second passes,
// around what the first has found.
enum class Pass { kSum, kProd, kMin, kMax, kExp, kSquares, kTies, kFactors, kInner };

PYLOSS_HD inline constexpr Pass pass_of(Fold f) {
  switch (f) {
    case Fold::kProd:
      return Pass::kProd;
    case Fold::kMin:
      return Pass::kMin;
    case Fold::kMax:
      return Pass::kMax;
    case Fold::kLogSumExp:
    case Fold::kSoftmax:
      return Pass::kExp;
    case Fold::kMoments:
      return Pass::kSquares;
    case Fold::kTies:
      return Pass::kTies;
    case Fold::kFactors:
      return Pass::kFactors;
    case Fold::kInner:
      return Pass::kInner;
    default:
      return Pass::kSum;
  }
}

template <class V>
struct Sums {
  V a, b;
};

template <Pass P, class R>
PYLOSS_HD inline Sums<R> nothing() {
  if constexpr (P == Pass::kProd || P == Pass::kFactors) return {R(1), R(0)};
  if constexpr (P == Pass::kMin) return {infinity_<R>(), R(0)};
  if constexpr (P == Pass::kMax) return {-infinity_<R>(), R(0)};
  return {R(0), R(0)};
}

// A value that changes nothing; m as for `add`.
template <Pass P, class R>
PYLOSS_HD inline R neutral(R m) {
  if constexpr (P == Pass::kProd || P == Pass::kFactors) return R(1);
  if constexpr (P == Pass::kMin) return infinity_<R>();
  if constexpr (P == Pass::kMax || P == Pass::kExp) return -infinity_<R>();
  if constexpr (P == Pass::kTies) return nan_<R>();
  if constexpr (P == Pass::kSquares) return m;
  return R(0);
}

template <class V>
PYLOSS_HD inline V smaller(V a, V b) {  // NaN if one is
  return b < a || b != b ? b : a;
}
template <class V>
PYLOSS_HD inline V larger(V a, V b) {
  return b > a || b != b ? b : a;
}

// Both, as if of all their values.
template <Pass P, class V>
PYLOSS_HD inline Sums<V> join(const Sums<V>& s, const Sums<V>& t) {
  if constexpr (P == Pass::kProd) return {s.a * t.a, s.b};
  if constexpr (P == Pass::kFactors) return {s.a * t.a, s.b + t.b};
  if constexpr (P == Pass::kMin) return {smaller(s.a, t.a), s.b};
  if constexpr (P == Pass::kMax) return {larger(s.a, t.a), s.b};
  return {s.a + t.a, s.b + t.b};
}

template <class R>
PYLOSS_HD inline R finite_or_zero(R m) {
  return m == infinity_<R>() || m == -infinity_<R>() ? R(0) : m;
}

// ---- Parts of a segment ------------------------------------------------------------------------

// n values around m: the maximum, the mean, or nothing.
template <class R>
struct Part {
  R n, m;
  Sums<R> sums;
};

template <class R>
PYLOSS_HD inline Part<R> merge(Pass pass, const Part<R>& s, const Part<R>& t) {
  if (s.n == 0) return t;
  if (t.n == 0) return s;
  const R n = s.n + t.n;
  switch (pass) {
    case Pass::kProd:
      return {n, 0, join<Pass::kProd>(s.sums, t.sums)};
    case Pass::kFactors:
      return {n, 0, join<Pass::kFactors>(s.sums, t.sums)};
    case Pass::kMin:
      return {n, 0, join<Pass::kMin>(s.sums, t.sums)};
    case Pass::kMax:
      return {n, 0, join<Pass::kMax>(s.sums, t.sums)};
    case Pass::kExp: {
      const R m = larger(s.m, t.m), at = finite_or_zero(m);
      const auto moved = [&](const Part<R>& p) {
        return p.sums.a == 0 ? R(0) : p.sums.a * exp_(finite_or_zero(p.m) - at);
      };
      return {n, m, {moved(s) + moved(t), 0}};
    }
    case Pass::kSquares: {
      const R d = t.m - s.m, share = t.n / n;
      const bool infinite = s.m - s.m != 0 || t.m - t.m != 0;
      if (infinite) return {n, s.m + t.m, {0, s.sums.b + t.sums.b + d * d}};
      return {n, s.m + d * share, {0, s.sums.b + t.sums.b + d * d * s.n * share}};
    }
    default:
      return {n, 0, join<Pass::kSum>(s.sums, t.sums)};
  }
}

// The mean that a sum of differences corrects, so that parts need no such sum. An infinite mean
// stays: differences to it say nothing.
template <class R>
PYLOSS_HD inline Part<R> settled(Pass pass, const Part<R>& p) {
  if (pass != Pass::kSquares || p.n == 0 || p.m - p.m != 0) return p;
  const R lost = p.sums.a / p.n;
  return {p.n, p.m + lost, {0, p.sums.b - p.sums.a * lost}};
}

// The results of a settled part that is the whole segment, to out[0] and out[step].
template <class R>
PYLOSS_HD inline void finish(Fold f, const Part<R>& p, R* out, int64_t step) {
  switch (f) {
    case Fold::kMean:
      out[0] = p.sums.a / p.n;
      break;
    case Fold::kLogSumExp:
      out[0] = finite_or_zero(p.m) + log_(p.sums.a);
      break;
    case Fold::kMoments: {
      const R v = p.sums.b / p.n;
      out[0] = p.n == 0 ? nan_<R>() : p.m;
      out[step] = v < 0 ? R(0) : v;  // by rounding; a NaN stays
      break;
    }
    case Fold::kSoftmax:
      out[0] = p.n == 0 ? -infinity_<R>() : p.m;
      out[step] = p.sums.a;
      break;
    case Fold::kFactors:
      out[step] = p.sums.b;
      out[0] = p.sums.a;
      break;
    default:
      out[0] = p.sums.a;
  }
}

// ---- Maps --------------------------------------------------------------------------------------

// What a map does with a value, and the numbers of its segment that it needs for it.
enum class Form { kSpread, kChosen, kQuotient, kExp, kAffine, kSoftmax, kProduct };

PYLOSS_HD inline constexpr Form form_of(Map f) {
  switch (f) {
    case Map::kToTies:
      return Form::kChosen;
    case Map::kToFactors:
      return Form::kQuotient;
    case Map::kExp:
    case Map::kNormalized:
      return Form::kExp;
    case Map::kToMoments:
      return Form::kAffine;
    case Map::kToSoftmax:
      return Form::kSoftmax;
    case Map::kFromNormalized:
      return Form::kProduct;
    default:
      return Form::kSpread;
  }
}
PYLOSS_HD inline constexpr int coefficients(Form f) {
  switch (f) {
    case Form::kChosen:
    case Form::kAffine:
      return 3;
    case Form::kQuotient:
    case Form::kExp:
      return 2;
    case Form::kSoftmax:
      return 4;
    default:
      return 1;
  }
}

template <class V>
struct Coeffs {
  V a, b, c, d;
};

// Of a segment of n values; g holds what is given.
template <class R>
PYLOSS_HD inline Coeffs<R> coeffs(Map f, const R* g, R n) {
  switch (f) {
    case Map::kSpreadMean:
      return {g[0] / n, 0, 0, 0};
    case Map::kToTies:  // none: there is a NaN
      return {g[0] / g[2], g[1], g[2] == 0 ? nan_<R>() : R(0), 0};
    case Map::kToFactors: {
      const R all = g[0] * g[1];
      return {g[2] == 0 ? all : R(0), g[2] == 1 ? all : R(0), 0, 0};
    }
    case Map::kExp:
      return {g[0], g[1] == -infinity_<R>() ? R(0) : g[1], 0, 0};
    case Map::kNormalized:
      return {1 / g[1], g[0], 0, 0};
    case Map::kToMoments:
      return {g[0] / n, 2 * g[1] / n, g[2], 0};
    case Map::kToSoftmax: {
      const R m = finite_or_zero(g[2]), whole = m == g[2] ? g[1] * g[3] : R(0);
      return {g[1], m, g[2], (g[0] - whole) / g[4]};
    }
    default:
      return {g[0], 0, 0, 0};
  }
}

}  // namespace pyloss::segment
