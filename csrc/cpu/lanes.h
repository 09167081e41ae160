// Elementwise functions for loops that the compiler vectorises: no branches, no calls. The double
// versions call libm: fp64 is there for gradient checks.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/compiler.h"
#include "common/dtype.h"
#include "common/math.h"

namespace pyloss {

// x = n ln2 + r: returns r, and 2^n as a float. Adding 1.5 * 2^23 + 127 rounds to an integer and
// leaves n + 127, the exponent field of 2^n, in the low bits of the sum.
PYLOSS_INLINE float reduce_lane(float x, float* two_n) {
  using namespace exp_poly;
  const float kRound = 12582912.0f + 127.0f;
  const float t = x * kLog2e + kRound;
  const float n = t - kRound;
  *two_n = bits_to_float(float_to_bits(t) << 23);
  return (x - n * kLn2Hi) - n * kLn2Lo;
}
PYLOSS_INLINE float exp_tail(float r) {
  using namespace exp_poly;
  return 1.0f + r * (kC2 + r * (kC3 + r * (kC4 + r * (kC5 + r * kC6))));
}

// exp for x <= 88, at most 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
PYLOSS_INLINE float exp_lane(float x) {
  float two_n;
  const float r = reduce_lane(x, &two_n);
  const float y = (1.0f + r * exp_tail(r)) * two_n;
  return x < exp_poly::kMin ? 0.0f : y;
}
PYLOSS_INLINE double exp_lane(double x) {
  return ::exp(x);
}

// exp for every x: +inf above 88.
PYLOSS_INLINE float exp_any_lane(float x) {
  const float y = exp_lane(x);
  return x > exp_poly::kMax ? infinity_<float>() : y;
}
PYLOSS_INLINE double exp_any_lane(double x) {
  return ::exp(x);
}

// expm1, relative error of some ulp on the whole range; +inf above 88.
PYLOSS_INLINE float expm1_lane(float x) {
  float two_n;
  const float r = reduce_lane(x < -30.0f ? -30.0f : x, &two_n);
  const float y = two_n * (r * exp_tail(r)) + (two_n - 1.0f);
  return x > exp_poly::kMax ? infinity_<float>() : y;
}
PYLOSS_INLINE double expm1_lane(double x) {
  return ::expm1(x);
}

PYLOSS_INLINE float tanh_lane(float x) {
  using namespace tanh_ratio;
  float c = x > kMax ? kMax : x;
  c = c < -kMax ? -kMax : c;
  const float s = c * c;
  const float p = kP0 + s * (kP1 + s * (kP2 + s * (kP3 + s * kP4)));
  const float q = 1.0f + s * (kQ1 + s * (kQ2 + s * (kQ3 + s * kQ4)));
  const float y = c * p / q;
  return y > 1.0f ? 1.0f : (y < -1.0f ? -1.0f : y);  // 1 - tanh^2 must not turn negative
}
PYLOSS_INLINE double tanh_lane(double x) {
  return ::tanh(x);
}

// log for positive normal x, at most 2 ulp; NaN for NaN and +inf.
PYLOSS_INLINE float log_lane(float x) {
  using namespace log_poly;
  // x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const uint32_t offset = float_to_bits(x) - kSqrtHalfBits;
  const float k = float(int32_t(offset) >> 23);
  const float f = bits_to_float((offset & 0x007fffffu) + kSqrtHalfBits) - 1.0f;
  const float q =
      kC3 + f * (kC4 + f * (kC5 + f * (kC6 + f * (kC7 + f * (kC8 + f * (kC9 + f * kC10))))));
  const float y = (k * exp_poly::kLn2Lo + f * f * (f * q - 0.5f)) + f + k * exp_poly::kLn2Hi;
  return y + (x - x);
}
PYLOSS_INLINE double log_lane(double x) {
  return ::log(x);
}

}  // namespace pyloss
