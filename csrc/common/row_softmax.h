// Row softmax losses: everything that happens once per row, shared by the CPU and CUDA kernels.
//
//   z_j = transform(x_j)                                             (RowTransform)
//   one pass over a row leaves   m = max_j z_j,  rest = sum_{j != y} exp(z_j - m),  zy = z_y
//   the epilogue turns these into the row's loss f(nll), nll = -log p_y     (loss_of_nll)
//   every gradient is  dz_j = p_j (A + B (z_j - m)) - c1 [j = y] - c2 [j = y2] - spread w_j
//                                                                    (RowCoeffs, row_coeffs)
//
// The target is left out of the sum because 1 - p_y = rest / sum and log1p(rest) keep their
// relative accuracy when p_y rounds to 1; a full sum has lost it there.
//
// A new loss of the form f(-log p_y) is one more case of loss_of_nll: its value and first two
// derivatives. Reductions, class and token weights, MixUp, z-loss, soft capping, both backward
// passes, CPU and CUDA then work for it unchanged.
//
// Papers: Poly-1, Leng et al. (arXiv 2204.12511); label relaxation, Lienen, Huellermeier
// (AAAI 2021); LDR-KL, Zhu et al. (arXiv 2112.14869); comp-sum losses, Mao, Mohri, Zhong (arXiv
// 2304.07288); generalized cross entropy, Zhang, Sabuncu (arXiv 1805.07836); focal loss, Lin et al.
// (arXiv 1708.02002).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/math.h"
#include "common/reduction.h"

namespace pyloss {

// The codes are part of the Python boundary (pyloss/ops/row_softmax/records.py).
enum class TargetKind : int32_t { kIndex = 0, kMix = 1, kDense = 2 };
enum class LossKind : int32_t {
  kCompSum = 0,
  kFocal = 1,
  kPoly1 = 2,
  kRelaxed = 3,
  kLdr = 4,
};
constexpr int kLossKindCount = 5;

struct RowSoftmaxOptions {
  double logit_scale, softcap, temperature;  // softcap 0: none
  double tau, max_nll, gamma;                // max_nll = -log(truncate), +inf: none
  double poly1, relaxation;
  double margin, offset;                // margin: taken from the label's z, one label
  double z_loss, smoothing, num_items;  // num_items 0: count the rows
  double spread;                        // smoothing / classes
  int64_t ignore_index;
  LossKind loss;
  Reduction reduction;
  bool zero_if_empty;  // mean over no rows is 0 instead of NaN
};

struct Strides {
  int64_t outer, cls, inner;  // in elements
};

// Rows of `stats` (fp32, fp64 for fp64 input), each [rows]; the last two exist for MixUp and soft
// targets only.
enum StatRow { kStatMax, kStatRest, kStatTarget, kStatLoss, kStatTarget2, kStatSoft };
// Rows of `extras` and of the integer `index`; both exist only when asked for.
enum ExtraRow { kExtraLse, kExtraLogprob, kExtraEntropy, kExtraZLoss, kExtraCount };
enum IndexRow { kIndexArgmax, kIndexRank, kIndexCount };
// Elements of `norm`: factors of the loss part and of the z-loss part, and the sum of the class
// weights.
enum NormItem { kNormLoss, kNormZ, kNormWeightSum, kNormCount };

// One call: logits x of rows = outer * inner, row r = (r / inner, r % inner). R below is float, or
// double for double logits. No pointer is owned.
struct RowSoftmaxProblem {
  int64_t outer, classes, inner;
  DType dtype;    // of x, of its gradient and of its tangent
  const void* x;  // strided
  Strides x_strides;
  TargetKind kind;
  const void* target;  // [rows] labels, or strided probabilities
  DType target_dtype;
  Strides target_strides;    // probabilities only
  const void* target2;       // [rows] second label (MixUp)
  const void* mix;           // R [rows] weight of the first label (MixUp)
  const void* weight;        // R [classes] or null
  const void* token_weight;  // R [rows] or null
  RowSoftmaxOptions options;

  PYLOSS_HD int64_t rows() const { return outer * inner; }
  // Losses whose gradient needs sum_c r_c p_c^(tau-1) over all classes, a second pass over the row.
  PYLOSS_HD bool soft() const {
    return kind == TargetKind::kDense || (options.smoothing > 0 && options.tau != 1);
  }
  PYLOSS_HD int stat_rows() const { return kind == TargetKind::kMix || soft() ? 6 : 4; }
};

struct RowSoftmaxForward {
  void* loss;  // loss_dtype, one element or [rows]
  DType loss_dtype;
  void* stats;     // R [4 or 6][rows]
  void* norm;      // R [kNormCount]
  void* extras;    // R [kExtraCount][rows] or null
  int64_t* index;  // [kIndexCount][rows] or null
  void* grad;      // dtype, strided, gradient for an upstream 1; or null
  Strides grad_strides;
};

struct RowSoftmaxBackward {
  const void* grad_loss;    // R, one element or [rows] (reduction none)
  const void* grad_extras;  // R [3][rows] cotangents of lse, logprob, entropy; or null
  const void* stats;
  const void* norm;
  const void* extras;  // R [kExtraCount][rows], needed with grad_extras
  void* grad;          // dtype, strided; may be x itself
  Strides grad_strides;
};

// Second derivative: the vector-Jacobian product of the backward pass with tangent v.
struct RowSoftmaxHvp {
  RowSoftmaxBackward backward;  // its grad receives the derivative with respect to x
  const void* v;                // dtype, strided
  Strides v_strides;
  void* grad_rows;         // R [rows]: derivative with respect to each row's grad_loss
  void* grad_grad_extras;  // R [3][rows] or null
};

// z = a x, or z = post tanh(pre x).
template <class R>
struct RowTransform {
  R pre, post;
  bool cap, identity;

  explicit RowTransform(const RowSoftmaxOptions& o) {
    cap = o.softcap > 0;
    pre = R(cap ? o.logit_scale / o.softcap : o.logit_scale / o.temperature);
    post = R(cap ? o.softcap / o.temperature : 1);
    identity = !cap && pre == R(1);
  }
  PYLOSS_HD R value(R x) const { return cap ? post * tanh_(pre * x) : pre * x; }
  // dz/dx from z alone, so that the backward needs no second tanh.
  PYLOSS_HD R slope(R z) const {
    if (!cap) return pre;
    R th = z / post;
    return pre * post * (1 - th) * (1 + th);
  }
  PYLOSS_HD R curvature(R z) const {
    if (!cap) return 0;
    R th = z / post;
    return -2 * pre * pre * post * th * (1 - th) * (1 + th);
  }
};

// Statistics of a part of a row; parts merge in any grouping.
template <class R>
struct RowPart {
  R m = -infinity_<R>();  // max z
  R rest = 0;             // sum of exp(z - m) without the target
  R ez = 0;               // sum of exp(z - m) (z - m) without the target (entropy)
  R wz = 0, w = 0;        // sum of w_c (z_c - m) and of w_c, all classes (label smoothing)
};

template <class R>
PYLOSS_HD inline R finite_floor(R m) {
  // -inf - -inf is NaN: a part whose entries are all -inf is measured from a finite value.
  return m == -infinity_<R>() ? R(-1e30) : m;
}

// exp(d), d <= 0, without libm's slow underflow path.
template <class R>
PYLOSS_HD inline R rescale(R d) {
  return d == 0 ? R(1) : (d < R(-700) ? R(0) : exp_(d));
}

template <class R>
PYLOSS_HD inline RowPart<R> merge(const RowPart<R>& a, const RowPart<R>& b) {
  RowPart<R> r;
  r.m = max_(a.m, b.m);
  R m = finite_floor(r.m), da = finite_floor(a.m) - m, db = finite_floor(b.m) - m;
  R ea = rescale(da), eb = rescale(db);
  r.rest = a.rest * ea + b.rest * eb;
  // exp(da) is 0 long before da reaches the floor; keep 0 * large from touching the sum.
  r.ez = ea * (a.ez + (ea > 0 ? da : R(0)) * a.rest) + eb * (b.ez + (eb > 0 ? db : R(0)) * b.rest);
  r.wz = (a.wz + (a.w != 0 ? da * a.w : R(0))) + (b.wz + (b.w != 0 ? db * b.w : R(0)));
  r.w = a.w + b.w;
  return r;
}

// Loss as a function of nll = -log p_y >= 0, with its first two derivatives.
template <class R>
struct LossOfNll {
  R value, slope, curvature;
};

// miss = 1 - p_y, exact to rounding also where p_y is near 1. kFew: one of the first two kinds; a
// kernel that is launched for no other then has no instruction of the rest.
template <bool kFew = false, class R>
PYLOSS_HD inline LossOfNll<R> loss_of_nll(const RowSoftmaxOptions& o, R nll, R miss) {
  const bool truncated = o.max_nll < HUGE_VAL && nll >= R(o.max_nll);
  if (truncated) {  // the constant f(max_nll), without gradient
    nll = R(o.max_nll);
    miss = -expm1_(-nll);
  }
  LossOfNll<R> f;
  switch (kFew && o.loss != LossKind::kFocal ? LossKind::kCompSum : o.loss) {
    case LossKind::kFocal: {
      // (1-p)^gamma nll; nll / miss -> 1 as p -> 1, and p nll -> 0 as p -> 0.
      R g = R(o.gamma), p = exp_(-nll), ratio = miss > 0 ? nll / miss : R(1);
      R power = pow_(miss, g), p_ratio = p > 0 ? p * ratio : R(0);
      R lower = g == 1 ? R(1) : pow_(miss, g - 1);
      f = {power * nll, power * (1 + g * p_ratio),
           g * (p * lower * (2 + (g - 1) * p_ratio) - power * p_ratio)};
      break;
    }
    case LossKind::kPoly1: {
      R e = R(o.poly1), p = exp_(-nll);
      f = {nll + e * miss, 1 + e * p, -e * p};
      break;
    }
    case LossKind::kRelaxed: {
      // KL(q || p), where q_y = 1 - a and the rest of q is p's own, scaled; 0 once p_y >= 1 - a.
      R a = R(o.relaxation), keep = 1 - a, p = exp_(-nll);
      if (p >= keep) {
        f = {R(0), R(0), R(0)};
      } else {
        R odds = p / miss, entropy = keep * log1p_(-a) + a * log_(a);
        f = {keep * nll - a * log_(miss) + entropy, keep - a * odds, a * odds / miss};
      }
      break;
    }
    case LossKind::kLdr: {
      R lambda = R(o.temperature);
      f = {lambda * (nll - R(o.offset)), lambda, R(0)};
      break;
    }
    default: {
      // Comp-sum Phi^tau: expm1(a nll) / a, a = 1 - tau; one expression for every tau but a = 0.
      R a = R(1 - o.tau);
      if (a == 0) {
        f = {nll, R(1), R(0)};
      } else {
        R slope = exp_(a * nll);
        f = {expm1_(a * nll) / a, slope, a * slope};
      }
    }
  }
  if (truncated) f.slope = f.curvature = 0;
  return f;
}

// The coefficients r_c = first [c = y] + second [c = y2] + spread w_c of one row.
template <class R>
struct RowTarget {
  int64_t y, y2;
  R first, second, spread;
  R token;  // token weight
};

// Labels out of range are kept out of every read: the row becomes NaN (CUDA; the CPU has raised).
PYLOSS_HD inline bool in_range(int64_t y, int64_t classes) {
  return y >= 0 && y < classes;
}

// False: the row is ignored.
template <class R>
PYLOSS_HD inline bool load_target(const RowSoftmaxProblem& p, int64_t row, RowTarget<R>* t) {
  const RowSoftmaxOptions& o = p.options;
  t->token = p.token_weight ? static_cast<const R*>(p.token_weight)[row] : R(1);
  t->spread = R(o.spread);
  t->y = t->y2 = -1;
  t->first = t->second = 0;
  if (p.kind == TargetKind::kDense) return true;
  t->y = load_index(p.target, p.target_dtype, row);
  if (t->y == o.ignore_index) return false;
  R keep = R(1 - o.smoothing);
  const R* w = static_cast<const R*>(p.weight);
  t->first = keep * (w && in_range(t->y, p.classes) ? w[t->y] : R(1));
  if (p.kind == TargetKind::kMix) {
    t->y2 = load_index(p.target2, p.target_dtype, row);
    if (t->y2 == o.ignore_index) return false;
    R mix = static_cast<const R*>(p.mix)[row];
    t->second = (1 - mix) * keep * (w && in_range(t->y2, p.classes) ? w[t->y2] : R(1));
    t->first *= mix;
    if (t->y2 == t->y) {
      t->first += t->second;
      t->second = 0;
    }
  }
  return true;
}

template <class R>
PYLOSS_HD inline bool target_in_range(const RowSoftmaxProblem& p, const RowTarget<R>& t) {
  return p.kind == TargetKind::kDense ||
         (in_range(t.y, p.classes) && (p.kind != TargetKind::kMix || in_range(t.y2, p.classes)));
}

// The weight that a row adds to the denominators of 'mean': of the loss part, and of the z part.
template <class R>
PYLOSS_HD inline void mean_weights(const RowSoftmaxProblem& p, int64_t row, double* loss,
                                   double* z) {
  RowTarget<R> t;
  *loss = *z = 0;
  if (!load_target(p, row, &t)) return;
  *z = double(t.token);
  const R* w = static_cast<const R*>(p.weight);
  double mass = 1;  // sum of w over the targets; probabilities count rows
  if (w && p.kind != TargetKind::kDense) {
    mass = in_range(t.y, p.classes) ? double(w[t.y]) : double(nan_<R>());
    if (p.kind == TargetKind::kMix) {
      double mix = double(static_cast<const R*>(p.mix)[row]);
      double mass2 = in_range(t.y2, p.classes) ? double(w[t.y2]) : double(nan_<R>());
      mass = mix * mass + (1 - mix) * mass2;
    }
  }
  *loss = mass * double(t.token);
}

// Turns the two sums of mean_weights into the factors of `norm`.
template <class R>
PYLOSS_HD inline void finish_norm(const RowSoftmaxProblem& p, double loss, double z,
                                  double weight_sum, R* norm) {
  const RowSoftmaxOptions& o = p.options;
  double a = 1, b = 1;
  if (o.reduction == Reduction::kMean) {
    a = o.num_items > 0 ? o.num_items : loss;
    b = o.num_items > 0 ? o.num_items : z;
    a = a == 0 && o.zero_if_empty ? 0 : 1 / a;
    b = b == 0 && o.zero_if_empty ? 0 : 1 / b;
  }
  norm[kNormLoss] = R(a);
  norm[kNormZ] = R(b);
  norm[kNormWeightSum] = R(weight_sum);
}

// A mean over nothing is 0/0.
template <class R>
PYLOSS_HD inline R finish_sum(const RowSoftmaxProblem& p, const R* norm, R sum) {
  bool empty = p.options.reduction == Reduction::kMean && norm[kNormLoss] == infinity_<R>();
  return empty ? nan_<R>() : sum;
}

// What a finished row knows. `part` holds the whole row's statistics.
template <class R>
struct RowTerms {
  R m, sum, log_sum;   // sum = sum_j exp(z_j - m), all classes
  R nll, nll2;         // -log p_y, -log p_y2
  R miss;              // 1 - p_y
  LossOfNll<R> f, f2;  // losses of the two labels
  PYLOSS_HD R lse() const { return m + log_sum; }
};

// Fills in what follows from m, sum, log_sum and miss.
template <bool kFew = false, class R>
PYLOSS_HD inline void add_losses(const RowSoftmaxProblem& p, const RowTarget<R>& t, R zy, R zy2,
                                 RowTerms<R>* r) {
  r->nll = (r->m - zy) + r->log_sum;
  r->nll2 = 0;
  r->f = r->f2 = {0, 0, 0};
  if (p.kind == TargetKind::kDense) return;
  r->f = loss_of_nll<kFew>(p.options, r->nll, r->miss);
  if (p.kind == TargetKind::kMix) {
    r->nll2 = (r->m - zy2) + r->log_sum;
    R miss2 = t.y2 == t.y ? r->miss : -expm1_(-r->nll2);
    r->f2 = t.y2 == t.y ? r->f : loss_of_nll<kFew>(p.options, r->nll2, miss2);
  }
}

template <bool kFew = false, class R>
PYLOSS_HD inline RowTerms<R> row_terms(const RowSoftmaxProblem& p, const RowTarget<R>& t, R m,
                                       R rest, R zy, R zy2) {
  RowTerms<R> r;
  r.m = m;
  R ey = exp_(zy - m);  // 0 for probability targets, whose zy is -inf
  r.sum = rest + ey;
  r.log_sum = zy == m ? log1p_(rest) : log_(r.sum);
  r.miss = rest / r.sum;
  add_losses<kFew>(p, t, zy, zy2, &r);
  return r;
}

// Row loss. `wz` = sum_c w_c (z_c - m) (smoothing at tau = 1), `soft_loss` = the whole loss part of
// a soft target. Zero coefficients must not meet infinite losses.
template <class R>
PYLOSS_HD inline R row_loss(const RowSoftmaxProblem& p, const RowTarget<R>& t, const RowTerms<R>& r,
                            const R* norm, R wz, R soft_loss, R* z_part) {
  R loss = soft_loss;
  if (!p.soft()) {
    loss = t.first != 0 ? t.first * r.f.value : R(0);
    if (t.second != 0) loss += t.second * r.f2.value;
    if (t.spread != 0) loss += t.spread * (norm[kNormWeightSum] * r.log_sum - wz);
  }
  // A weight of zero hides an infinite loss, never a NaN.
  if (r.nll != r.nll) loss = r.nll;
  R lse = r.lse();
  *z_part = p.options.z_loss != 0 ? R(p.options.z_loss) * lse * lse : R(0);
  R z_term = p.options.z_loss != 0 ? norm[kNormZ] * *z_part : R(0);
  const R total = norm[kNormLoss] * loss + z_term;
  // A token weight of zero hides an infinite loss too.
  return t.token != 0 || total != total ? t.token * total : R(0);
}

// Entropy from ez = sum_j exp(u_j) u_j over all classes.
template <class R>
PYLOSS_HD inline R row_entropy(const RowTerms<R>& r, R ez) {
  return r.log_sum - ez / r.sum;
}

// What a forward leaves behind of a row: stats, and the extras and indices that were asked for.
// Returns the row's loss.
template <class R>
PYLOSS_HD inline R store_row(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int64_t row,
                             const RowTarget<R>& t, const RowTerms<R>& r, R rest, R zy, R zy2, R wz,
                             R ez, R soft_loss, R soft_mass, int64_t argmax, int64_t rank) {
  const int64_t n = p.rows();
  R* stats = static_cast<R*>(f.stats) + row;
  R z_part;
  const R loss = row_loss(p, t, r, static_cast<const R*>(f.norm), wz, soft_loss, &z_part);
  stats[kStatMax * n] = r.m;
  stats[kStatRest * n] = rest;
  stats[kStatTarget * n] = zy;
  stats[kStatLoss * n] = loss;
  if (p.stat_rows() > 4) {
    stats[kStatTarget2 * n] = zy2;
    stats[kStatSoft * n] = soft_mass;
  }
  if (f.extras) {
    R* extras = static_cast<R*>(f.extras) + row;
    extras[kExtraLse * n] = r.lse();
    extras[kExtraLogprob * n] = -r.nll;
    extras[kExtraEntropy * n] = row_entropy(r, ez);
    extras[kExtraZLoss * n] = z_part;
  }
  if (f.index) {
    f.index[kIndexArgmax * n + row] = argmax;
    f.index[kIndexRank * n + row] = rank;
  }
  return loss;
}

template <class R>
PYLOSS_HD inline void store_ignored_row(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                                        int64_t row) {
  const int64_t n = p.rows();
  for (int i = 0; i < p.stat_rows(); ++i) static_cast<R*>(f.stats)[i * n + row] = 0;
  if (f.extras) {
    for (int i = 0; i < kExtraCount; ++i) static_cast<R*>(f.extras)[i * n + row] = 0;
  }
  if (f.index) {
    f.index[kIndexArgmax * n + row] = -1;
    f.index[kIndexRank * n + row] = 0;
  }
}

// The upstream gradients of one row.
template <class R>
struct RowUpstream {
  R loss, z;                // grad_loss times token weight and norm
  R lse, logprob, entropy;  // cotangents of the returned statistics
  R entropy_value;
};

// What comes from above, times a row's token weight. A row of weight 0 adds nothing: 0 * infinity,
// of a mean over no more than such rows, is not its own.
template <class R>
PYLOSS_HD inline R weighted_upstream(R token, R g) {
  return token == 0 ? R(0) : token * g;
}

// The upstream of a gradient that is written in the forward.
template <class R>
PYLOSS_HD inline RowUpstream<R> first_upstream(const R* norm, R token) {
  return {weighted_upstream(token, norm[kNormLoss]),
          weighted_upstream(token, norm[kNormZ]),
          0,
          0,
          0,
          0};
}

template <class R>
PYLOSS_HD inline RowUpstream<R> load_upstream(const RowSoftmaxProblem& p,
                                              const RowSoftmaxBackward& b, int64_t row, R token) {
  const R* norm = static_cast<const R*>(b.norm);
  R g = static_cast<const R*>(b.grad_loss)[p.options.reduction == Reduction::kNone ? row : 0];
  RowUpstream<R> u{weighted_upstream(token, g * norm[kNormLoss]),
                   weighted_upstream(token, g * norm[kNormZ]),
                   0,
                   0,
                   0,
                   0};
  if (b.grad_extras) {
    const R* c = static_cast<const R*>(b.grad_extras);
    const int64_t n = p.rows();
    u.lse = c[kExtraLse * n + row];
    u.logprob = c[kExtraLogprob * n + row];
    u.entropy = c[kExtraEntropy * n + row];
    u.entropy_value = static_cast<const R*>(b.extras)[kExtraEntropy * n + row];
  }
  return u;
}

// Gradient of one row, with u_j = z_j - m:
//   dz_j  = exp(u_j) (a + b u_j)           - spread w_j - soft r_j p_j^(tau-1)
//   dz_y  = exp(u_y) (label_a + b u_y) - label  - (the same)       replaces the line above
//   dz_y2 = dz_y2 - label2
// The label's own share is c1 (p_y - 1) = -c1 miss; p_y c1 - c1 would cancel.
template <class R>
struct RowCoeffs {
  R a, b, spread, soft, label_a, label, label2;
};

// `soft_mass` = sum_c r_c p_c^(tau-1), soft targets only.
template <class R>
PYLOSS_HD inline RowCoeffs<R> row_coeffs(const RowSoftmaxProblem& p, const RowTarget<R>& t,
                                         const RowTerms<R>& r, const RowUpstream<R>& u,
                                         R weight_sum, R soft_mass) {
  const bool soft = p.soft();
  const R zero = 0;
  // A coefficient of zero must not meet an infinite slope.
  R c1 = soft || t.first == 0 ? zero : u.loss * t.first * r.f.slope;
  R c2 = soft || t.second == 0 ? zero : u.loss * t.second * r.f2.slope;
  c1 -= u.logprob;
  RowCoeffs<R> c;
  c.spread = soft ? zero : u.loss * t.spread;
  c.soft = soft ? u.loss : zero;
  R other = c2 + (soft ? u.loss * soft_mass : c.spread * weight_sum) + u.lse;
  if (p.options.z_loss != 0) other += u.z * 2 * R(p.options.z_loss) * r.lse();
  if (u.entropy != 0) other -= u.entropy * (u.entropy_value - r.log_sum);
  const R inverse = 1 / r.sum;
  c.a = (c1 + other) * inverse;
  c.b = -u.entropy * inverse;
  c.label_a = other * inverse;
  c.label = p.kind == TargetKind::kDense ? zero : c1 * r.miss;
  c.label2 = c2;
  return c;
}

// Second derivative of one row along v (already in z space), labels only:
//   d(dz_j) = exp(u_j) ((v_j - vbar) (a + b u_j + b) + da) - label [j=y] - label2 [j=y2]
template <class R>
struct RowHvpCoeffs {
  R vbar, da, label, label2;
  R grad_row, grad_lse, grad_logprob, grad_entropy;  // derivatives of the cotangents
};

// vbar = sum p v, uv = sum p u v, wv = sum w v, v1 = v_y, v2 = v_y2.
template <class R>
PYLOSS_HD inline RowHvpCoeffs<R> row_hvp_coeffs(const RowSoftmaxProblem& p, const RowTarget<R>& t,
                                                const RowTerms<R>& r, const RowUpstream<R>& u,
                                                const R* norm, R vbar, R uv, R wv, R v1, R v2) {
  RowHvpCoeffs<R> h;
  R dnll = vbar - v1, dnll2 = vbar - v2;
  R dlabel = t.first != 0 ? t.first * r.f.curvature * dnll : R(0);
  R dlabel2 = t.second != 0 ? t.second * r.f2.curvature * dnll2 : R(0);
  R dentropy = -(uv - r.log_sum * vbar + u.entropy_value * vbar);
  R z2 = 2 * R(p.options.z_loss);
  h.vbar = vbar;
  h.label = u.loss * dlabel;
  h.label2 = u.loss * dlabel2;
  h.da = h.label + h.label2 + u.z * z2 * vbar;
  if (u.entropy != 0) h.da -= u.entropy * dentropy;
  h.da /= r.sum;
  h.grad_row = t.spread * (norm[kNormWeightSum] * vbar - wv);
  if (t.first != 0) h.grad_row += t.first * r.f.slope * dnll;
  if (t.second != 0) h.grad_row += t.second * r.f2.slope * dnll2;
  h.grad_row *= norm[kNormLoss];
  if (z2 != 0) h.grad_row += norm[kNormZ] * z2 * r.lse() * vbar;
  h.grad_row *= t.token;
  h.grad_lse = vbar;
  h.grad_logprob = -dnll;
  h.grad_entropy = dentropy;
  return h;
}

// r_c of a soft target: probability q (0 without), class weight w.
template <class R>
PYLOSS_HD inline R soft_coefficient(const RowSoftmaxProblem& p, const RowTarget<R>& t, int64_t c,
                                    R q, R w) {
  if (p.kind == TargetKind::kDense) return w * (q * R(1 - p.options.smoothing) + t.spread);
  R r = t.spread * w;
  if (c == t.y) r += t.first;
  if (c == t.y2) r += t.second;
  return r;
}

// A gradient for an upstream 1, scaled by what came from above. Rows that are ignored have the
// gradient 0 whatever that is: 0 * infinity, of a mean over no rows, is not theirs.
template <class R>
PYLOSS_HD inline R scaled_gradient(R g, R upstream) {
  return g == 0 ? g : g * upstream;
}

}  // namespace pyloss
