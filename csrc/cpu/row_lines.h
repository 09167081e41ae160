// The inner loops of the strided kernels: one class of a tile of positions, one SIMD lane each.
//
// A line is an array of n values, padded to whole groups of kLanes. Each function exists for float,
// in three instruction sets, and for double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/compiler.h"
#include "cpu/row_blocks.h"

namespace pyloss {

// m <- max(m, z).
void line_max(const float* z, int64_t n, float* m);
void line_max(const double* z, int64_t n, double* m);

// z <- exp(z - m), sum += that.
void line_exp_sum(float* z, int64_t n, const float* m, float* sum);
void line_exp_sum(double* z, int64_t n, const double* m, double* sum);

// ez += exp(u) u, u = z - m; rank += z > zy; argmax <- c where z is the first to equal m.
struct LineExtras {
  void *ez, *zy;  // R
  int32_t *rank, *argmax;
};
void line_extras(const float* z, int64_t n, const float* m, int32_t c, const LineExtras& e);
void line_extras(const double* z, int64_t n, const double* m, int32_t c, const LineExtras& e);

// wz += r (z - m), w += r; r = 0 adds nothing.
void line_weighted_sum(const float* z, const float* r, int64_t n, const float* m, float* wz,
                       float* w);
void line_weighted_sum(const double* z, const double* r, int64_t n, const double* m, double* wz,
                       double* w);

// loss += r expm1(a nll) / a and mass += r exp(a nll), nll = log_sum - (z - m); a != 0.
void line_soft_sums(const float* z, const float* r, int64_t n, const float* m, const float* log_sum,
                    float a, float* loss, float* mass);
void line_soft_sums(const double* z, const double* r, int64_t n, const double* m,
                    const double* log_sum, double a, double* loss, double* mass);

// What row_terms of common/row_softmax.h computes, without its calls: sum, log_sum and miss from m,
// rest and zy.
void line_terms(const float* m, const float* rest, const float* zy, int64_t n, float* sum,
                float* log_sum, float* miss);
void line_terms(const double* m, const double* rest, const double* zy, int64_t n, double* sum,
                double* log_sum, double* miss);

// The common loss: one label, cross entropy, nothing optional. Its rows need no libm call and no
// decision, so the epilogue of common/row_softmax.h vectorises when it is told so: this returns the
// problem with those choices as constants.
PYLOSS_INLINE RowSoftmaxProblem as_plain(const RowSoftmaxProblem& p) {
  RowSoftmaxProblem q = p;
  q.kind = TargetKind::kIndex;
  q.options.loss = LossKind::kCompSum;
  q.options.tau = 1;
  q.options.max_nll = HUGE_VAL;
  q.options.z_loss = q.options.smoothing = q.options.spread = 0;
  return q;
}
inline bool is_plain(const RowSoftmaxProblem& p) {
  const RowSoftmaxOptions& o = p.options;
  return p.kind == TargetKind::kIndex && o.loss == LossKind::kCompSum && o.tau == 1 &&
         o.max_nll == HUGE_VAL && o.z_loss == 0 && o.smoothing == 0 && o.margin == 0;
}

// n rows of a plain problem. `first` and `token` are RowTarget's, `above` is RowUpstream's loss.
template <class R>
struct PlainRows {
  const R *m, *zy, *sum, *log_sum, *miss, *first, *token, *above;
  R *loss, *a, *label;
};
// Their losses.
void line_plain_losses(const RowSoftmaxProblem& p, const float* norm, int64_t n,
                       const PlainRows<float>& rows);
void line_plain_losses(const RowSoftmaxProblem& p, const double* norm, int64_t n,
                       const PlainRows<double>& rows);
// Their coefficients: a and label.
void line_plain_coeffs(const RowSoftmaxProblem& p, int64_t n, const PlainRows<float>& rows);
void line_plain_coeffs(const RowSoftmaxProblem& p, int64_t n, const PlainRows<double>& rows);

// out = a exp(z - m), and minus their label's coefficient for the rows whose label is c.
template <class R>
struct PlainCoeffs {
  const R *m, *a, *label;
  const int32_t* y;
};
void line_plain_gradient(const float* z, int64_t n, int32_t c, const PlainCoeffs<float>& k,
                         float* out);
void line_plain_gradient(const double* z, int64_t n, int32_t c, const PlainCoeffs<double>& k,
                         double* out);

// out = scale e - shift w.
void line_affine(const float* e, int64_t n, const float* scale, const float* shift, float w,
                 float* out);
void line_affine(const double* e, int64_t n, const double* scale, const double* shift, double w,
                 double* out);

// dst = scale e, as float or bfloat16.
void line_scale(const float* e, int64_t n, const float* scale, DType t, void* dst);

// out = exp(z - m) (a + b (z - m)) - spread w, with the labels' own values where y or y2 is c.
struct LineCoeffs {
  const void *m, *a, *b, *spread, *label_a, *label, *label2;  // R
  const int32_t *y, *y2;
};
void line_gradient(const float* z, int64_t n, int32_t c, float w, const LineCoeffs& k, float* out);
void line_gradient(const double* z, int64_t n, int32_t c, double w, const LineCoeffs& k,
                   double* out);

// out -= soft r exp(a nll).
void line_soft_gradient(const float* z, const float* r, int64_t n, const float* m,
                        const float* log_sum, const float* soft, float a, float* out);
void line_soft_gradient(const double* z, const double* r, int64_t n, const double* m,
                        const double* log_sum, const double* soft, double a, double* out);

// Every step-th element, and back.
void line_gather(const void* x, DType t, int64_t step, int64_t n, float* z);
void line_gather(const void* x, DType t, int64_t step, int64_t n, double* z);
void line_scatter(const float* v, int64_t n, DType t, int64_t step, void* dst);
void line_scatter(const double* v, int64_t n, DType t, int64_t step, void* dst);

}  // namespace pyloss
