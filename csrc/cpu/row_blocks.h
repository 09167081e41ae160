// The inner loops of the row-softmax kernels, on one block of a row in the first-level cache.
//
// A block is an array of `Real` (float, or double for double logits) padded with -inf to whole
// groups of kLanes, so that no loop has a tail. Sums keep kLanes partial sums: they vectorise
// without -ffast-math, and their error grows with n / kLanes. Each function exists for float, in
// three instruction sets, and for double.
#pragma once

#include <cstdint>

#include "common/compiler.h"
#include "common/dtype.h"
#include "common/row_softmax.h"

namespace pyloss {

inline constexpr int64_t kLanes = 64;
inline constexpr int64_t kBlock = 2048;  // columns; a float block takes 8 KiB

inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

template <class R>
PYLOSS_INLINE R sum_lanes(const R* acc) {
  R t[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) t[l] = acc[l];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) t[l] += t[l + half];
  }
  return t[0];
}

// z = transform(x) for n <= kBlock contiguous elements of type t; pads; returns the maximum.
// Doubles come from doubles only.
float load_block(const void* x, DType t, int64_t n, const RowTransform<float>& f, float* z);
double load_block(const void* x, DType t, int64_t n, const RowTransform<double>& f, double* z);
// z = x of float or bfloat16, and m <- max(m, z), each for itself; pads.
void load_lines(const void* x, DType t, int64_t n, float* z, float* m);
// The conversion alone, without padding.
void load_values(const void* x, DType t, int64_t n, float* z);
void load_values(const void* x, DType t, int64_t n, double* z);

// z <- exp(z - m); returns the sum. Meanwhile fetches into the cache the bytes that the next block
// will be loaded from, kLanes elements of `ahead_size` bytes for each group: memory would idle
// otherwise. An address that is not mapped does no harm.
float block_exp_sum(float* z, int64_t n, float m, const void* ahead, int64_t ahead_size);
double block_exp_sum(double* z, int64_t n, double m, const void* ahead, int64_t ahead_size);

// sum exp(u) u, u = z - m; z stays.
float block_entropy_sum(const float* z, int64_t n, float m);
double block_entropy_sum(const double* z, int64_t n, double m);

// sum w (z - m) and sum w over the first n entries; w null: ones; w = 0 adds nothing.
void block_weighted_sum(const float* z, const float* w, int64_t n, float m, float* wz, float* ws);
void block_weighted_sum(const double* z, const double* w, int64_t n, double m, double* wz,
                        double* ws);

// The largest of n padded entries; NaN counts for nothing.
float block_max(const float* z, int64_t n);
double block_max(const double* z, int64_t n);

// Number of entries above zy.
int64_t block_count_above(const float* z, int64_t n, float zy);
int64_t block_count_above(const double* z, int64_t n, double zy);

// out = exp(z - m) (a + b (z - m)) - spread w; w null: ones.
struct GradientTerms {
  double m, a, b, spread;
};
void block_gradient(const float* z, int64_t n, const GradientTerms& g, const float* w, float* out);
void block_gradient(const double* z, int64_t n, const GradientTerms& g, const double* w,
                    double* out);

// out *= dz/dx.
void block_chain(const float* z, int64_t n, const RowTransform<float>& f, float* out);
void block_chain(const double* z, int64_t n, const RowTransform<double>& f, double* out);

// out = dz/dx of a capped transform, and out *= v.
void block_slope(const float* z, int64_t n, const RowTransform<float>& f, float* out);
void block_slope(const double* z, int64_t n, const RowTransform<double>& f, double* out);
void block_multiply(const float* v, int64_t n, float* out);
void block_multiply(const double* v, int64_t n, double* out);

// Soft targets, nll_c = log_sum - (z_c - m), a = 1 - tau:
//   mass = sum r exp(a nll), loss = sum r expm1(a nll) / a  (r nll at a = 0); r = 0 adds nothing.
struct SoftTerms {
  double m, log_sum, a;
};
void block_soft_sums(const float* z, const float* r, int64_t n, const SoftTerms& s, float* mass,
                     float* loss);
void block_soft_sums(const double* z, const double* r, int64_t n, const SoftTerms& s, double* mass,
                     double* loss);
// out -= scale r exp(a nll).
void block_soft_gradient(const float* z, const float* r, int64_t n, const SoftTerms& s,
                         double scale, float* out);
void block_soft_gradient(const double* z, const double* r, int64_t n, const SoftTerms& s,
                         double scale, double* out);

// out = scale in - shift w; w null: ones.
void block_affine(const float* in, int64_t n, float scale, float shift, const float* w, float* out);
void block_affine(const double* in, int64_t n, double scale, double shift, const double* w,
                  double* out);

// The gradient of the losses that scale the softmax and change one entry, into rows of float or
// bfloat16 (writes_rows): dst = scale e, or scale exp(x - m), and the value given at the entry. Any
// n; `stream` bypasses the cache.
struct Entry {
  int64_t at;  // outside [0, n): none
  float value;
};
inline bool writes_rows(DType t) {
  return t == DType::kF32 || t == DType::kBF16;
}
void scale_row(const float* e, int64_t n, float scale, Entry entry, DType t, void* dst,
               bool stream);
void exp_row(const void* x, int64_t n, float m, float scale, Entry entry, DType t, void* dst,
             bool stream);

// Stores n <= kBlock values as type t; `stream` bypasses the cache.
void store_block(const float* v, int64_t n, DType t, void* dst, bool stream);
void store_block(const double* v, int64_t n, DType t, void* dst, bool stream);

}  // namespace pyloss
