// Principal axes of a weighted cloud of points in 2 or 3 dimensions, and the gradient of a function
// of them.
//
//   forward   W = sum w_i, t = sum w_i x_i / W (0 when not centred), C = sum w_i (x_i - t)(x_i -
//   t)'
//             C = V diag(lambda) V', lambda ascending, the largest entry of each axis positive
//   backward  with upstream gradients of V, t, lambda and W:
//             F_ij = 1 / (lambda_j - lambda_i), 0 for i = j and within the tolerance
//             G = sym V (diag(g_lambda) + F o V' g_V) V'
//             dx_i = w_i (2 G (x_i - t) + g_t / W)
//             dw_i = (x_i - t)' (G (x_i - t) + g_t / W) + g_W
//
// C depends on t through sum w_i (x_i - t) = 0 alone, so that nothing of C's gradient reaches t. A
// cloud whose weights are all 0, or that has no points, has t = 0 and V = I. What is not finite at
// weight 0 counts as 0. A cloud with any other such number has V and lambda of NaN.
//
// The eigenproblem is solved by cyclic Jacobi rotations, always as many, without a branch: L clouds
// go through it side by side, one SIMD lane each on the CPU, and a lane does not see its
// neighbours. C is divided by its trace before, so that no square over- or underflows.
//
// Paper: Puny et al. arXiv 2110.03336.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/compiler.h"
#include "common/dtype.h"
#include "common/math.h"

namespace pyloss::frame_pca {

struct Problem {
  int64_t clouds, points;  // points of all clouds together
  int64_t dim;             // 2 or 3
  DType dtype, offsets_dtype;
  const void* x;        // [points][dim]
  const void* weight;   // [points], fp32, fp64 for fp64 points; null: ones
  const void* offsets;  // [clouds + 1]; null: points / clouds each
  bool centred;
};

struct Backward {
  const void* frames;  // [clouds][kWidth], fp32, fp64 for fp64 points: results of the forward
  const void* grad;    // the same: upstream
  void* dx;            // [points][dim]
  void* dw;            // [points], as the weights; or null
  double tolerance;    // relative to the largest eigenvalue
};

// A row of the results: V by rows, t, lambda, W.
template <int D>
struct Row {
  static constexpr int kAxes = 0, kCentre = D * D, kValues = kCentre + D, kTotal = kValues + D,
                       kWidth = kTotal + 1;
};
inline int64_t width_of(int64_t dim) {
  return dim * dim + 2 * dim + 1;
}

// A symmetric matrix is its upper triangle by rows.
template <int D>
inline constexpr int kTriangle = D * (D + 1) / 2;
template <int D>
PYLOSS_HD constexpr int entry(int i, int j) {
  return i <= j ? i * D - i * (i - 1) / 2 + (j - i) : j * D - j * (j - 1) / 2 + (i - j);
}

// Points of a cloud: [begin, end), inside of all points whatever the offsets are.
PYLOSS_HD inline int64_t bound_of(const Problem& p, int64_t cloud) {
  if (!p.offsets) return p.clouds > 0 ? p.points / p.clouds * cloud : 0;
  const int64_t at = load_index(p.offsets, p.offsets_dtype, cloud);
  return at < 0 ? 0 : at > p.points ? p.points : at;
}

template <class R>
PYLOSS_HD inline bool is_finite(R v) {
  return v - v == 0;
}

PYLOSS_HD inline float sqrt_(float x) {
  return ::sqrtf(x);
}
PYLOSS_HD inline double sqrt_(double x) {
  return ::sqrt(x);
}
PYLOSS_HD inline float abs_(float x) {
  return ::fabsf(x);
}
PYLOSS_HD inline double abs_(double x) {
  return ::fabs(x);
}

// Sweeps after which no off-diagonal entry is left that is not rounding, graded matrices included.
template <class R, int D>
inline constexpr int kSweeps = D == 2           ? 1
                               : sizeof(R) == 8 ? 6
                                                : 5;

// L eigenproblems: `c` holds the matrices and is destroyed, `v` gets the axes, `value` the rest.
template <class R, int D, int L>
struct Axes {
  R c[kTriangle<D>][L], v[D][D][L], value[D][L];

  PYLOSS_HD PYLOSS_INLINE void solve() {
    R scale[L], fault[L];
    for (int l = 0; l < L; ++l) {
      R trace = 0;
      for (int i = 0; i < D; ++i) trace += c[entry<D>(i, i)][l];
      // Below it a division would overflow; such a matrix is as good as 0.
      scale[l] = trace > R(1e-37) ? trace : R(1);
      fault[l] = is_finite(trace) ? R(0) : nan_<R>();
      const R inverse = 1 / scale[l];
      for (int k = 0; k < kTriangle<D>; ++k) c[k][l] *= inverse;
      for (int i = 0; i < D; ++i) {
        for (int j = 0; j < D; ++j) v[i][j][l] = R(i == j);
      }
    }
    for (int sweep = 0; sweep < kSweeps<R, D>; ++sweep) {
      rotate<0, 1>();
      if constexpr (D == 3) {
        rotate<0, 2>();
        rotate<1, 2>();
      }
    }
    for (int l = 0; l < L; ++l) {
      for (int i = 0; i < D; ++i) value[i][l] = c[entry<D>(i, i)][l] * scale[l];
    }
    if constexpr (D == 3) {
      order<1>();
      order<0>();
    }
    order<D - 2>();
    for (int j = 0; j < D; ++j) orient(j, fault);
  }

 private:
  // Turns axes p and q so that their off-diagonal entry is 0.
  template <int p, int q>
  PYLOSS_HD PYLOSS_INLINE void rotate() {
    R *pp = c[entry<D>(p, p)], *qq = c[entry<D>(q, q)], *pq = c[entry<D>(p, q)];
    for (int l = 0; l < L; ++l) {
      const R twice = 2 * pq[l], d = qq[l] - pp[l];
      const R below = abs_(d) + sqrt_(d * d + twice * twice);
      const R t = below > 0 ? (d < 0 ? -twice : twice) / below : R(0);
      const R cos = 1 / sqrt_(1 + t * t), sin = t * cos;
      pp[l] -= t * pq[l];
      qq[l] += t * pq[l];
      pq[l] = 0;
      for (int r = 0; r < D; ++r) {
        if (r != p && r != q) {
          R *rp = c[entry<D>(r, p)], *rq = c[entry<D>(r, q)];
          const R a = rp[l], b = rq[l];
          rp[l] = cos * a - sin * b;
          rq[l] = sin * a + cos * b;
        }
        const R a = v[r][p][l], b = v[r][q][l];
        v[r][p][l] = cos * a - sin * b;
        v[r][q][l] = sin * a + cos * b;
      }
    }
  }
  // Axes j and j + 1, ascending.
  template <int j>
  PYLOSS_HD PYLOSS_INLINE void order() {
    for (int l = 0; l < L; ++l) {
      const R a = value[j][l], b = value[j + 1][l];
      const bool swap = b < a;
      value[j][l] = swap ? b : a;
      value[j + 1][l] = swap ? a : b;
      for (int r = 0; r < D; ++r) {
        const R x = v[r][j][l], y = v[r][j + 1][l];
        v[r][j][l] = swap ? y : x;
        v[r][j + 1][l] = swap ? x : y;
      }
    }
  }
  // The largest entry positive, the first of equal ones.
  PYLOSS_HD PYLOSS_INLINE void orient(int j, const R* fault) {
    for (int l = 0; l < L; ++l) {
      R top = v[0][j][l];
      for (int r = 1; r < D; ++r) top = abs_(v[r][j][l]) > abs_(top) ? v[r][j][l] : top;
      for (int r = 0; r < D; ++r) {
        v[r][j][l] = (top < 0 ? -v[r][j][l] : v[r][j][l]) + fault[l];
      }
      value[j][l] += fault[l];
    }
  }
};

// What the gradient of the points of one cloud takes.
template <class R, int D>
struct Slope {
  R g[kTriangle<D>], centre[D], shift[D], total;  // G, t, g_t / W, g_W

  // From a row of the results, and one of upstream gradients.
  PYLOSS_HD inline Slope(const R* row, const R* grad, bool centred, double tolerance) {
    using At = Row<D>;
    const R *v = row + At::kAxes, *value = row + At::kValues, *gv = grad + At::kAxes;
    const R close = R(tolerance) * max_(abs_(value[0]), abs_(value[D - 1]));
    R inner[D][D];  // diag(g_lambda) + F o V' g_V, symmetric part
    for (int i = 0; i < D; ++i) {
      inner[i][i] = grad[At::kValues + i];
      for (int j = i + 1; j < D; ++j) {
        R m = 0;
        for (int r = 0; r < D; ++r) {
          m += v[r * D + i] * gv[r * D + j] - v[r * D + j] * gv[r * D + i];
        }
        const R gap = value[j] - value[i];
        inner[i][j] = inner[j][i] = gap <= close ? R(0) : m / (2 * gap);
      }
    }
    R half[D][D];  // V inner
    for (int r = 0; r < D; ++r) {
      for (int j = 0; j < D; ++j) {
        half[r][j] = 0;
        for (int i = 0; i < D; ++i) half[r][j] += v[r * D + i] * inner[i][j];
      }
    }
    for (int r = 0; r < D; ++r) {
      for (int s = r; s < D; ++s) {
        R sum = 0;
        for (int j = 0; j < D; ++j) sum += half[r][j] * v[s * D + j];
        g[entry<D>(r, s)] = sum;
      }
    }
    const R weight = row[At::kTotal];
    const R inverse = centred && weight != 0 ? 1 / weight : R(0);
    for (int k = 0; k < D; ++k) {
      centre[k] = centred ? row[At::kCentre + k] : R(0);
      shift[k] = inverse == 0 ? R(0) : grad[At::kCentre + k] * inverse;
    }
    total = grad[At::kTotal];
  }

  // Of one point: its gradient, and returns that of its weight.
  PYLOSS_HD PYLOSS_INLINE R point(const R* x, R weight, R* dx) const {
    R d[D], dw = total;
    for (int k = 0; k < D; ++k) d[k] = x[k] - centre[k];
    for (int k = 0; k < D; ++k) {
      R y = 0;
      for (int j = 0; j < D; ++j) y += g[entry<D>(k, j)] * d[j];
      dx[k] = weight * (2 * y + shift[k]);
      dw += d[k] * (y + shift[k]);
    }
    return dw;
  }
};

// Calls fn with an element of the points' type and the dimension as a constant.
template <class Fn>
void dispatch(const Problem& p, const Fn& fn) {
  dispatch_float(p.dtype, [&](auto zero) {
    if (p.dim == 2) return fn(zero, std::integral_constant<int, 2>());
    return fn(zero, std::integral_constant<int, 3>());
  });
}

// A coordinate as it counts.
template <class R>
PYLOSS_HD inline R counted(R x, R weight) {
  return weight == 0 && !is_finite(x) ? R(0) : x;
}

}  // namespace pyloss::frame_pca
