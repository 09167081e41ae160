// See row_lines.h.
#include "cpu/row_lines.h"

#include "cpu/lanes.h"

namespace pyloss {
namespace {

template <class R>
PYLOSS_INLINE void max_of(const R* z, int64_t n, R* m) {
  for (int64_t l = 0; l < padded(n); ++l) m[l] = z[l] > m[l] ? z[l] : m[l];
}

template <class T>
PYLOSS_INLINE void scale_of(const float* __restrict e, int64_t n, const float* __restrict scale,
                            T* __restrict dst) {
  for (int64_t l = 0; l < n; ++l) dst[l] = FromFloat<T>::of(scale[l] * e[l]);
}

template <class R>
PYLOSS_INLINE void exp_sum_of(R* z, int64_t n, const R* m, R* sum) {
  for (int64_t l = 0; l < padded(n); ++l) {
    const R e = exp_lane(z[l] - m[l]);
    z[l] = e;
    sum[l] += e;
  }
}

template <class R>
PYLOSS_INLINE void extras_of(const R* z, int64_t n, const R* m, int32_t c, const LineExtras& e) {
  R* ez = static_cast<R*>(e.ez);
  const R* zy = static_cast<const R*>(e.zy);
  for (int64_t l = 0; l < n; ++l) {
    const R u = z[l] - m[l];
    const R bounded = u < R(-1e4) ? R(-1e4) : u;
    ez[l] += exp_lane(u) * bounded;
  }
  for (int64_t l = 0; l < n; ++l) e.rank[l] += z[l] > zy[l];
  for (int64_t l = 0; l < n; ++l) e.argmax[l] = e.argmax[l] < 0 && z[l] == m[l] ? c : e.argmax[l];
}

template <class R>
PYLOSS_INLINE void weighted_sum_of(const R* z, const R* r, int64_t n, const R* m, R* wz, R* w) {
  for (int64_t l = 0; l < n; ++l) {
    const R v = r[l] * (z[l] - m[l]);
    wz[l] += r[l] == 0 ? R(0) : v;
    w[l] += r[l];
  }
}

template <class R>
PYLOSS_INLINE void soft_sums_of(const R* z, const R* r, int64_t n, const R* m, const R* log_sum,
                                R a, R* loss, R* mass) {
  for (int64_t l = 0; l < n; ++l) {
    const R x = a * (log_sum[l] - (z[l] - m[l]));
    const R v = r[l] * expm1_lane(x) / a, s = r[l] * exp_any_lane(x);
    loss[l] += r[l] == 0 ? R(0) : v;
    mass[l] += r[l] == 0 ? R(0) : s;
  }
}

template <class R>
PYLOSS_INLINE void terms_of(const R* m, const R* rest, const R* zy, int64_t n, R* __restrict sum,
                            R* __restrict log_sum, R* __restrict miss) {
  const int64_t n_pad = padded(n);
  for (int64_t l = 0; l < n_pad; ++l) sum[l] = rest[l] + exp_lane(zy[l] - m[l]);
  for (int64_t l = 0; l < n_pad; ++l) log_sum[l] = log_lane(sum[l]);
  for (int64_t l = 0; l < n_pad; ++l) {
    // log1p(rest) where the label is the maximum: the rounding of 1 + rest is put back.
    const R lost = (rest[l] - (sum[l] - 1)) / sum[l];
    log_sum[l] += zy[l] == m[l] ? lost : R(0);
    miss[l] = rest[l] / sum[l];
  }
}

template <class R>
PYLOSS_INLINE RowTerms<R> plain_terms(const RowSoftmaxProblem& q, const RowTarget<R>& t,
                                      const PlainRows<R>& rows, int64_t l) {
  RowTerms<R> r;
  r.m = rows.m[l];
  r.sum = rows.sum[l];
  r.log_sum = rows.log_sum[l];
  r.miss = rows.miss[l];
  add_losses(q, t, rows.zy[l], R(0), &r);
  return r;
}

// A loop each, because gcc finds control flow in the one that does both.
template <class R>
PYLOSS_INLINE void plain_losses_of(const RowSoftmaxProblem& p, const R* norm, int64_t n,
                                   const PlainRows<R> rows) {
  const RowSoftmaxProblem q = as_plain(p);
  const R factors[kNormCount] = {norm[kNormLoss], norm[kNormZ], norm[kNormWeightSum]};
  R* __restrict loss = rows.loss;
  for (int64_t l = 0; l < padded(n); ++l) {
    const RowTarget<R> t{0, -1, rows.first[l], 0, 0, rows.token[l]};
    R z_part;
    loss[l] = row_loss(q, t, plain_terms(q, t, rows, l), factors, R(0), R(0), &z_part);
  }
}
template <class R>
PYLOSS_INLINE void plain_coeffs_of(const RowSoftmaxProblem& p, int64_t n, const PlainRows<R> rows) {
  const RowSoftmaxProblem q = as_plain(p);
  R* __restrict a = rows.a, * __restrict label = rows.label;
  for (int64_t l = 0; l < padded(n); ++l) {
    const RowTarget<R> t{0, -1, rows.first[l], 0, 0, R(1)};
    const RowUpstream<R> u{rows.above[l], 0, 0, 0, 0, 0};
    const RowCoeffs<R> c = row_coeffs(q, t, plain_terms(q, t, rows, l), u, R(0), R(0));
    a[l] = c.a;
    label[l] = c.label;
  }
}

template <class R>
PYLOSS_INLINE void plain_gradient_of(const R* z, int64_t n, int32_t c, const PlainCoeffs<R> k,
                                     R* __restrict out) {
  for (int64_t l = 0; l < padded(n); ++l) {
    const R v = k.a[l] * exp_lane(z[l] - k.m[l]);
    out[l] = k.y[l] == c ? -k.label[l] : v;
  }
}

template <class R>
PYLOSS_INLINE void affine_of(const R* e, int64_t n, const R* scale, const R* shift, R w, R* out) {
  for (int64_t l = 0; l < padded(n); ++l) out[l] = scale[l] * e[l] - shift[l] * w;
}

template <class R>
PYLOSS_INLINE void gradient_of(const R* z, int64_t n, int32_t c, R w, const LineCoeffs& k, R* out) {
  const R* m = static_cast<const R*>(k.m);
  const R* a = static_cast<const R*>(k.a);
  const R* b = static_cast<const R*>(k.b);
  const R* spread = static_cast<const R*>(k.spread);
  const R* label_a = static_cast<const R*>(k.label_a);
  const R* label = static_cast<const R*>(k.label);
  const R* label2 = static_cast<const R*>(k.label2);
  for (int64_t l = 0; l < n; ++l) {
    const R u = z[l] - m[l];
    const R bounded = u < R(-1e4) ? R(-1e4) : u;
    const bool hit = k.y[l] == c;
    const R factor = (hit ? label_a[l] : a[l]) + b[l] * bounded;
    R v = exp_lane(u) * factor - spread[l] * w;
    v -= hit ? label[l] : R(0);
    v -= k.y2[l] == c ? label2[l] : R(0);
    out[l] = v;
  }
}

template <class R>
PYLOSS_INLINE void soft_gradient_of(const R* z, const R* r, int64_t n, const R* m, const R* log_sum,
                                    const R* soft, R a, R* out) {
  for (int64_t l = 0; l < n; ++l) {
    const R v = soft[l] * r[l] * exp_any_lane(a * (log_sum[l] - (z[l] - m[l])));
    out[l] -= r[l] == 0 ? R(0) : v;
  }
}

template <class T, class R>
PYLOSS_INLINE void gather_of(const void* x, int64_t step, int64_t n, R* z) {
  const T* p = static_cast<const T*>(x);
  for (int64_t l = 0; l < n; ++l) z[l] = R(to_float(p[l * step]));
}
template <class T, class R>
PYLOSS_INLINE void scatter_of(const R* v, int64_t n, int64_t step, void* dst) {
  T* p = static_cast<T*>(dst);
  for (int64_t l = 0; l < n; ++l) p[l * step] = FromFloat<T>::of(v[l]);
}

template <class R>
void gather(const void* x, DType t, int64_t step, int64_t n, R* z) {
  dispatch_float(t, [&](auto tag) { gather_of<decltype(tag)>(x, step, n, z); });
}

}  // namespace

PYLOSS_MULTIVERSION void line_max(const float* z, int64_t n, float* m) {
  max_of(z, n, m);
}
void line_max(const double* z, int64_t n, double* m) {
  max_of(z, n, m);
}

namespace {

PYLOSS_MULTIVERSION void scale_f32(const float* e, int64_t n, const float* scale, float* dst) {
  scale_of(e, n, scale, dst);
}
PYLOSS_MULTIVERSION void scale_bf16(const float* e, int64_t n, const float* scale, BF16* dst) {
  scale_of(e, n, scale, dst);
}

}  // namespace

void line_scale(const float* e, int64_t n, const float* scale, DType t, void* dst) {
  if (t == DType::kBF16) return scale_bf16(e, n, scale, static_cast<BF16*>(dst));
  scale_f32(e, n, scale, static_cast<float*>(dst));
}

PYLOSS_MULTIVERSION void line_exp_sum(float* z, int64_t n, const float* m, float* sum) {
  exp_sum_of(z, n, m, sum);
}
void line_exp_sum(double* z, int64_t n, const double* m, double* sum) {
  exp_sum_of(z, n, m, sum);
}

PYLOSS_MULTIVERSION void line_extras(const float* z, int64_t n, const float* m, int32_t c,
                                     const LineExtras& e) {
  extras_of(z, n, m, c, e);
}
void line_extras(const double* z, int64_t n, const double* m, int32_t c, const LineExtras& e) {
  extras_of(z, n, m, c, e);
}

PYLOSS_MULTIVERSION void line_weighted_sum(const float* z, const float* r, int64_t n,
                                           const float* m, float* wz, float* w) {
  weighted_sum_of(z, r, n, m, wz, w);
}
void line_weighted_sum(const double* z, const double* r, int64_t n, const double* m, double* wz,
                       double* w) {
  weighted_sum_of(z, r, n, m, wz, w);
}

PYLOSS_MULTIVERSION void line_soft_sums(const float* z, const float* r, int64_t n, const float* m,
                                        const float* log_sum, float a, float* loss, float* mass) {
  soft_sums_of(z, r, n, m, log_sum, a, loss, mass);
}
void line_soft_sums(const double* z, const double* r, int64_t n, const double* m,
                    const double* log_sum, double a, double* loss, double* mass) {
  soft_sums_of(z, r, n, m, log_sum, a, loss, mass);
}

PYLOSS_MULTIVERSION void line_terms(const float* m, const float* rest, const float* zy, int64_t n,
                                    float* sum, float* log_sum, float* miss) {
  terms_of(m, rest, zy, n, sum, log_sum, miss);
}
void line_terms(const double* m, const double* rest, const double* zy, int64_t n, double* sum,
                double* log_sum, double* miss) {
  terms_of(m, rest, zy, n, sum, log_sum, miss);
}

PYLOSS_MULTIVERSION void line_plain_losses(const RowSoftmaxProblem& p, const float* norm, int64_t n,
                                           const PlainRows<float>& rows) {
  plain_losses_of(p, norm, n, rows);
}
void line_plain_losses(const RowSoftmaxProblem& p, const double* norm, int64_t n,
                       const PlainRows<double>& rows) {
  plain_losses_of(p, norm, n, rows);
}

PYLOSS_MULTIVERSION void line_plain_coeffs(const RowSoftmaxProblem& p, int64_t n,
                                           const PlainRows<float>& rows) {
  plain_coeffs_of(p, n, rows);
}
void line_plain_coeffs(const RowSoftmaxProblem& p, int64_t n, const PlainRows<double>& rows) {
  plain_coeffs_of(p, n, rows);
}

PYLOSS_MULTIVERSION void line_plain_gradient(const float* z, int64_t n, int32_t c,
                                             const PlainCoeffs<float>& k, float* out) {
  plain_gradient_of(z, n, c, k, out);
}
void line_plain_gradient(const double* z, int64_t n, int32_t c, const PlainCoeffs<double>& k,
                         double* out) {
  plain_gradient_of(z, n, c, k, out);
}

PYLOSS_MULTIVERSION void line_affine(const float* e, int64_t n, const float* scale,
                                     const float* shift, float w, float* out) {
  affine_of(e, n, scale, shift, w, out);
}
void line_affine(const double* e, int64_t n, const double* scale, const double* shift, double w,
                 double* out) {
  affine_of(e, n, scale, shift, w, out);
}

PYLOSS_MULTIVERSION void line_gradient(const float* z, int64_t n, int32_t c, float w,
                                       const LineCoeffs& k, float* out) {
  gradient_of(z, n, c, w, k, out);
}
void line_gradient(const double* z, int64_t n, int32_t c, double w, const LineCoeffs& k,
                   double* out) {
  gradient_of(z, n, c, w, k, out);
}

PYLOSS_MULTIVERSION void line_soft_gradient(const float* z, const float* r, int64_t n,
                                            const float* m, const float* log_sum, const float* soft,
                                            float a, float* out) {
  soft_gradient_of(z, r, n, m, log_sum, soft, a, out);
}
void line_soft_gradient(const double* z, const double* r, int64_t n, const double* m,
                        const double* log_sum, const double* soft, double a, double* out) {
  soft_gradient_of(z, r, n, m, log_sum, soft, a, out);
}

void line_gather(const void* x, DType t, int64_t step, int64_t n, float* z) {
  gather(x, t, step, n, z);
}
void line_gather(const void* x, DType t, int64_t step, int64_t n, double* z) {
  gather(x, t, step, n, z);
}
void line_scatter(const float* v, int64_t n, DType t, int64_t step, void* dst) {
  dispatch_float(t, [&](auto tag) { scatter_of<decltype(tag)>(v, n, step, dst); });
}
void line_scatter(const double* v, int64_t n, DType, int64_t step, void* dst) {
  scatter_of<double>(v, n, step, dst);
}

}  // namespace pyloss
