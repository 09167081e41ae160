// ALDR-KL: a label distributionally robust loss whose temperature each row finds for itself.
//
//   v_j = s x_j - c [j = y]          s = 1 / mean |x| or 1, c the margin
//   p = softmax(v / lambda),         KL = sum p log(C p)
//   lambda = lambda0 - KL / kappa,   kappa = alpha log C / lambda0
//   loss = lambda (lse(v / lambda) - v_y / lambda - log C) - kappa / 2 (lambda - lambda0)^2
//
// The loss is a maximum over lambda and p, so its gradient is that of the scores alone:
//   d loss / d v_j = p_j - [j = y]
//   d loss / d x_j = s (p_j - [j = y] - sign(x_j) pull / C),  pull = sum_j (p_j - [j = y]) s x_j
//
// Everything below happens once per row and pass; the CPU and CUDA kernels share it. A pass over a
// row gives the sums of exp(u), u exp(u) and u^2 exp(u) over the classes but the label, with
// u_j = (x_j - top) s / lambda: the label stays out so that 1 - p_y keeps its digits.
//
// Paper: Zhu, Ying, Yang, arXiv 2112.14869.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss::aldr {

// One call. R below is float, or double for double scores. No pointer is owned.
struct Problem {
  int64_t rows, classes;
  DType dtype;            // of x and its gradient
  const void* x;          // [rows][classes]
  const int64_t* target;  // [rows]
  const void* start;      // R [rows], lambda so far: one step from it; null: to the fixed point
  double lambda0, alpha, margin;
  int64_t ignore_index;
  bool l1;  // scores over their mean absolute value
};

// Rows of `stats`, R [kStatCount][rows]. Those of an ignored row are 0 but for lambda.
enum Stat { kValue, kLambda, kTop, kSum, kMiss, kSlope, kChain, kPull, kStatCount };

template <class R>
struct Moments {
  R s0 = 0, s1 = 0, s2 = 0;
};

// What a row knows before its passes.
template <class R>
struct Row {
  R scale;  // s; 1 where all scores are 0
  R chain;  // s; 0 there: such a row has no gradient
  R label;  // x_y - c / s
  R top;    // of x, the label's less its margin

  PYLOSS_HD Row(const Problem& p, R others, R x_y, R sum_abs) {
    const R mean = sum_abs / R(p.classes);
    const bool zero = p.l1 && mean == 0;
    scale = p.l1 && !zero ? 1 / (mean + R(1e-12)) : R(1);
    chain = zero ? R(0) : scale;
    label = x_y - R(p.margin) / scale;
    top = max_(others, label);
  }
};

// u of the label.
template <class R>
PYLOSS_HD inline R label_exponent(const Row<R>& r, R lambda) {
  return (r.label - r.top) * (r.scale / lambda);
}

// A pass with the label's share.
template <class R>
struct Pass {
  R rest, label, sum, mean;  // mean = E u

  PYLOSS_HD Pass(const Moments<R>& m, R u) : rest(m.s0), label(exp_(u)) {
    sum = rest + label;
    mean = (m.s1 + label * bounded(u)) / sum;
  }
  PYLOSS_HD static R bounded(R u) { return u < R(-1e4) ? R(-1e4) : u; }  // 0 * -inf
  PYLOSS_HD R divergence(R log_classes) const { return mean - log_(sum) + log_classes; }
  PYLOSS_HD R variance(const Moments<R>& m, R u) const {
    const R v = (m.s2 + label * bounded(u) * bounded(u)) / sum - mean * mean;
    return v > 0 ? v : R(0);
  }
};

// The search for lambda = lambda0 - KL(lambda) / kappa from lambda0 downwards: Newton's method
// where it is sure of its slope, the plain iteration, which never passes the largest solution,
// where it is not, with longer and longer steps once it creeps, and halving after a step that has
// passed one.
template <class R>
struct Search {
  static constexpr int kMostPasses = 20, kPatience = 5;
  R lambda0, lowest, inverse_kappa, tolerance;
  R lambda, above, below;  // below < 0: none yet
  int left = kMostPasses, plain_steps = 0;
  R stride = 1;

  PYLOSS_HD explicit Search(const Problem& p, R log_classes)
      : lambda0(R(p.lambda0)),
        lowest(R(p.lambda0 * (1 - 1 / p.alpha))),
        inverse_kappa(log_classes > 0 ? R(p.lambda0 / p.alpha) / log_classes : R(0)),
        tolerance(R((sizeof(R) == 8 ? 1e-11 : 1e-6) * p.lambda0)),
        lambda(lambda0),
        above(lambda0),
        below(-1) {}

  PYLOSS_HD R plain_step(R divergence) const {
    const R next = lambda0 - (divergence > 0 ? divergence : R(0)) * inverse_kappa;
    return next != next ? next : max_(next, lowest);
  }
  // Moves lambda after a pass at it; false: it stays, and the pass was the last.
  PYLOSS_HD bool move(R divergence, R variance) {
    const R excess = lambda - plain_step(divergence);
    if (--left == 0 || excess != excess) {
      if (excess != excess) lambda = excess;
      return false;
    }
    const R slope = 1 - variance * inverse_kappa / lambda;
    if (excess < 0) {
      below = lambda;
    } else {
      above = lambda;
    }
    R next;
    if (slope > R(0.1)) {
      next = lambda - excess / slope;
    } else {
      if (++plain_steps > kPatience) stride *= 2;
      next = lambda - stride * (excess > 0 ? excess : R(0));
    }
    if (below > 0 && !(next > below && next < above)) next = (below + above) / 2;
    next = max_(next, lowest);
    const R step = next - lambda;
    if ((step < 0 ? -step : step) <= tolerance) return false;
    lambda = next;
    return true;
  }
};

// The statistics of a finished row, from the last pass; `step` lies between them.
template <class R>
PYLOSS_HD inline void store_row(const Problem& p, const Row<R>& r, const Moments<R>& m, R lambda,
                                R log_classes, R* stats, int64_t step) {
  const R u = label_exponent(r, lambda);
  const Pass<R> pass(m, u);
  const R log_sum = u == 0 ? log1p_(pass.rest) : log_(pass.sum), miss = pass.rest / pass.sum;
  const R lambda0 = R(p.lambda0), off = lambda - lambda0;
  const R kappa = R(p.alpha) * log_classes / lambda0;
  stats[kValue * step] = lambda * (log_sum - u - log_classes) - kappa / 2 * off * off;
  stats[kLambda * step] = lambda;
  stats[kTop * step] = r.top;
  stats[kSum * step] = pass.sum;
  stats[kMiss * step] = miss;
  stats[kSlope * step] = r.scale / lambda;
  stats[kChain * step] = r.chain;
  stats[kPull * step] = p.l1 ? lambda * (pass.mean - u) - R(p.margin) * miss : R(0);
}

template <class R>
PYLOSS_HD inline void store_ignored(const Problem& p, R* stats, int64_t row) {
  for (int i = 0; i < kStatCount; ++i) stats[i * p.rows + row] = 0;
  stats[kLambda * p.rows + row] = p.start ? static_cast<const R*>(p.start)[row] : R(p.lambda0);
}

// dx_j = a exp((x_j - top) slope) - f sign(x_j); the label's own entry is l - f sign(x_y).
template <class R>
struct Coeffs {
  R top, slope, a, f, l;

  PYLOSS_HD Coeffs(const Problem& p, const R* stats, int64_t step, R factor) {
    const R chain = factor * stats[kChain * step];
    top = stats[kTop * step];
    slope = stats[kSlope * step];
    a = chain / stats[kSum * step];
    f = chain * stats[kPull * step] / R(p.classes);
    l = -chain * stats[kMiss * step];
  }
};

template <class R>
PYLOSS_HD inline R sign(R x) {
  return x > 0 ? R(1) : (x < 0 ? R(-1) : x);
}

}  // namespace pyloss::aldr
