// How far the margins of the label's class moved between two sets of logits x and x':
//
//   e = x' - x,   Q^2 = sum_{j != y} (e_y - e_j)^2,   the result Q or Q^2
//   d(x'_j) = c (e_j - e_y) for j != y,   d(x'_y) = c sum_j (e_y - e_j),   dx = -dx'
//   c = g / Q (0 at Q = 0), or 2 g
//
// The differences are summed as they are: n e_y^2 - 2 e_y sum e + sum e^2 would cancel.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#pragma once

#include "common/row_softmax.h"  // Strides

namespace pyloss::margin_shift {

// Logits are [outer][classes][inner] through strides, rows are [outer][inner].
struct Problem {
  int64_t outer, classes, inner;
  DType dtype;    // of x, adv and their gradients
  const void* x;  // strided
  Strides x_strides;
  const void* adv;  // strided
  Strides adv_strides;
  const void* target;  // [rows] labels
  DType target_dtype;
  bool squared;
  int64_t ignore_index;

  PYLOSS_HD int64_t rows() const { return outer * inner; }
};

// R is float, or double for doubles.
struct Backward {
  const void* g;      // R [rows]
  const void* shift;  // R [rows], the result
  const void* total;  // R [rows], sum_j (e_y - e_j)
  void* dx;           // dtype, strided; or null
  Strides dx_strides;
  void* dadv;  // dtype, strided; or null
  Strides dadv_strides;
};

// The label of a row: a class, or one of these.
inline constexpr int64_t kIgnored = -1, kOutOfRange = -2;

PYLOSS_HD inline int64_t label_of(const Problem& p, int64_t row) {
  const int64_t y = load_index(p.target, p.target_dtype, row);
  if (y == p.ignore_index) return kIgnored;
  return y < 0 || y >= p.classes ? kOutOfRange : y;
}

PYLOSS_HD inline float root(float x) {
  return ::sqrtf(x);
}
PYLOSS_HD inline double root(double x) {
  return ::sqrt(x);
}

// The result of a row from the sum of squares.
template <class R>
PYLOSS_HD R result_of(const Problem& p, R squares) {
  return p.squared ? squares : root(squares);
}

// The factor c of a row.
template <class R>
PYLOSS_HD R factor_of(const Problem& p, const Backward& b, int64_t row) {
  const R g = static_cast<const R*>(b.g)[row], shift = static_cast<const R*>(b.shift)[row];
  if (p.squared) return 2 * g;
  return shift == 0 ? R(0) : g / shift;
}

// What stands in the result, and in the gradients, of a row whose label is no class.
template <class R>
PYLOSS_HD R unlabelled(int64_t label) {
  return label == kIgnored ? R(0) : nan_<R>();
}

}  // namespace pyloss::margin_shift
