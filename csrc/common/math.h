// Scalar functions that CPU loops, CUDA kernels and the C++ tests share.
//
// The polynomials were fitted for this file (weighted least squares iterated to equal ripple, in
// float64): the stated errors are those of the rounded coefficients.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYLOSS_HD __host__ __device__
#else
#define PYLOSS_HD
#endif

namespace pyloss {

PYLOSS_HD inline float exp_(float x) {
  return ::expf(x);
}
PYLOSS_HD inline double exp_(double x) {
  return ::exp(x);
}
PYLOSS_HD inline float log_(float x) {
  return ::logf(x);
}
PYLOSS_HD inline double log_(double x) {
  return ::log(x);
}
PYLOSS_HD inline float log1p_(float x) {
  return ::log1pf(x);
}
PYLOSS_HD inline double log1p_(double x) {
  return ::log1p(x);
}
PYLOSS_HD inline float expm1_(float x) {
  return ::expm1f(x);
}
PYLOSS_HD inline double expm1_(double x) {
  return ::expm1(x);
}
PYLOSS_HD inline float pow_(float x, float y) {
  return ::powf(x, y);
}
PYLOSS_HD inline double pow_(double x, double y) {
  return ::pow(x, y);
}
PYLOSS_HD inline float tanh_(float x) {
  return ::tanhf(x);
}
PYLOSS_HD inline double tanh_(double x) {
  return ::tanh(x);
}

template <class R>
PYLOSS_HD inline R max_(R a, R b) {
  return a > b ? a : b;
}

template <class R>
PYLOSS_HD inline R infinity_();
template <>
PYLOSS_HD inline float infinity_<float>() {
  return HUGE_VALF;
}
template <>
PYLOSS_HD inline double infinity_<double>() {
  return HUGE_VAL;
}
template <class R>
PYLOSS_HD inline R nan_() {
  return infinity_<R>() - infinity_<R>();
}

// exp(r) = 1 + r (1 + r (c2 + c3 r + ...)), expm1(r) the same without the 1, |r| <= ln2/2, relative
// error 1.4e-8 (of expm1; less of exp).
namespace exp_poly {
inline constexpr float kC2 = 0.4999999701976776f, kC3 = 0.1666654348373413f,
                       kC4 = 0.04166720062494278f, kC5 = 0.008366580121219158f,
                       kC6 = 0.0013882509665563703f;
inline constexpr float kLog2e = 1.44269504088896341f;
// ln2 in two parts; the first has 9 significant bits, so that n * kLn2Hi is exact.
inline constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
inline constexpr float kMin = -87.33654f;  // exp below it is subnormal: flushed to zero
inline constexpr float kMax = 88.0f;       // exp above it is near overflow
}  // namespace exp_poly

// log(1 + f) = f - f^2/2 + f^3 (c3 + c4 f + ...), sqrt(1/2) <= 1 + f < sqrt(2), relative
// error 6.2e-9.
namespace log_poly {
inline constexpr float kC3 = 0.3333333134651184f, kC4 = -0.250008225440979f,
                       kC5 = 0.20001234114170074f, kC6 = -0.16623298823833466f,
                       kC7 = 0.14201553165912628f, kC8 = -0.1316058337688446f,
                       kC9 = 0.12763330340385437f, kC10 = -0.07635658979415894f;
inline constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;
}  // namespace log_poly

// tanh(x) = x P(x^2) / Q(x^2), |x| <= 9.02 (beyond it tanh rounds to 1), relative error 2.1e-8.
namespace tanh_ratio {
inline constexpr float kP0 = 0.9999999790134189f, kP1 = 0.13379718117941633f,
                       kP2 = 0.003494034715939948f, kP3 = 2.05834817204312e-05f,
                       kP4 = 1.3319069092140122e-08f;
inline constexpr float kQ1 = 0.46713033358670913f, kQ2 = 0.025871073938015986f,
                       kQ3 = 0.000328309300082503f, kQ4 = 7.762018985640709e-07f;
inline constexpr float kMax = 9.02f;
}  // namespace tanh_ratio

}  // namespace pyloss
