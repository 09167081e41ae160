// Second derivative of the row softmax on the CPU: the vector-Jacobian product of the backward.
//
// Two passes over a row: the moments of the tangent under p, then the result. Element by element
// through strides, in double: double backward is rare, and its callers want it right.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288 (formula of row_hvp_coeffs).
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_softmax.h"

namespace pyloss::cpu {
namespace {

double load(const char* p, DType t) {
  double v = 0;
  dispatch_float(t, [&](auto tag) {
    using T = decltype(tag);
    v = double(to_float(*reinterpret_cast<const T*>(p)));
  });
  return v;
}

void store(char* p, DType t, double v) {
  dispatch_float(t, [&](auto tag) {
    using T = decltype(tag);
    *reinterpret_cast<T*>(p) = FromFloat<T>::of(v);
  });
}

template <class R>
void hvp_row(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, int64_t row) {
  const RowTransform<R> f(p.options);
  const RowSoftmaxBackward& b = h.backward;
  const int64_t n = p.rows();
  const R* weight = static_cast<const R*>(p.weight);
  const R* norm = static_cast<const R*>(b.norm);
  R* grad_rows = static_cast<R*>(h.grad_rows);
  R* grad_extras = static_cast<R*>(h.grad_grad_extras);
  const auto at = [&](auto* base, const Strides& s, int64_t c) {
    return element(base, p.dtype, s, p.inner, row, c);
  };
  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    for (int64_t c = 0; c < p.classes; ++c)
      store(at(static_cast<char*>(b.grad), b.grad_strides, c), p.dtype, 0);
    grad_rows[row] = 0;
    for (int e = 0; grad_extras && e < 3; ++e) grad_extras[e * n + row] = 0;
    return;
  }
  R zy, zy2, mass;
  const RowTerms<R> r = load_terms(p, b.stats, row, t, &zy, &zy2, &mass);
  const RowUpstream<R> u = load_upstream(p, b, row, t.token);
  const RowCoeffs<R> c = row_coeffs(p, t, r, u, norm[kNormWeightSum], mass);

  const auto shift_of = [&](int64_t j) { return j == t.y ? p.options.margin : 0.0; };
  double vbar = 0, uv = 0, wv = 0, v1 = 0, v2 = 0;
  for (int64_t j = 0; j < p.classes; ++j) {
    const R z = f.value(R(load(at(static_cast<const char*>(p.x), p.x_strides, j), p.dtype)));
    const double v = load(at(static_cast<const char*>(h.v), h.v_strides, j), p.dtype) * f.slope(z);
    const double uj = max_(double(z) - shift_of(j) - double(r.m), -1e4);
    const double pj = exp_(uj) / double(r.sum);
    vbar += pj * v;
    uv += pj * uj * v;
    wv += (weight ? double(weight[j]) : 1.0) * v;
    if (j == t.y) v1 = v;
    if (j == t.y2) v2 = v;
  }
  const RowHvpCoeffs<R> k = row_hvp_coeffs(p, t, r, u, norm, R(vbar), R(uv), R(wv), R(v1), R(v2));
  grad_rows[row] = k.grad_row;
  if (grad_extras) {
    grad_extras[kExtraLse * n + row] = k.grad_lse;
    grad_extras[kExtraLogprob * n + row] = k.grad_logprob;
    grad_extras[kExtraEntropy * n + row] = k.grad_entropy;
  }
  for (int64_t j = 0; j < p.classes; ++j) {
    const R z = f.value(R(load(at(static_cast<const char*>(p.x), p.x_strides, j), p.dtype)));
    const double vx = load(at(static_cast<const char*>(h.v), h.v_strides, j), p.dtype);
    const double slope = f.slope(z), v = vx * slope;
    const double uj = max_(double(z) - shift_of(j) - double(r.m), -1e4), e = exp_(uj);
    double dg = e * ((v - vbar) * (c.a + c.b * uj + c.b) + double(k.da));
    double g = e * (c.a + c.b * uj) - c.spread * (weight ? double(weight[j]) : 1.0);
    if (j == t.y) {
      dg -= k.label;
      g = label_entry(r.m, c, zy, weight ? weight[j] : R(1));
    }
    if (j == t.y2) {
      dg -= k.label2;
      g -= c.label2;
    }
    store(at(static_cast<char*>(b.grad), b.grad_strides, j), p.dtype,
          slope * dg + double(f.curvature(z)) * vx * g);
  }
}

}  // namespace

void row_softmax_hvp(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, int threads) {
  parallel_for(p.rows(), rows_per_range(p.classes), useful_threads(p.rows() * p.classes, threads),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   p.dtype == DType::kF64 ? hvp_row<double>(p, h, row) : hvp_row<float>(p, h, row);
                 }
               });
}

}  // namespace pyloss::cpu
