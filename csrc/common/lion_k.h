// Lion-K: scalar mathematics that CPU and CUDA share. Definition: pyloss/reference/lion_k.py.
//
//   c = beta1 m + (1 - beta1) g
//   x <- x (1 - lr weight_decay) - lr dK(c)
//   m <- beta2 m + (1 - beta2) g
//
// Each line is one product and one fused multiply-add, which are the operations, and the bits, of
// torch's mul_ and add_(alpha=). A gradient K' of norms is not elementwise: the caller gives it.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss::lion_k {

enum class Kappa : int32_t { kL1 = 0, kSoft = 1, kHuber = 2, kSmooth = 3, kGiven = 4 };
inline constexpr int kKappaCount = 5;

// How a parameter of a half type is stored. Beside a number of 8 or 11 bits a small step, such as
// that of the decay, is lost when rounded to nearest.
enum class Rounding : int32_t {
  kNearest = 0,
  kStochastic = 1,   // up with the probability that keeps the mean
  kCompensated = 2,  // to nearest; what was rounded away is kept in a second number
};
inline constexpr int kRoundingCount = 3;

struct Options {
  Kappa kappa;
  Rounding rounding;
  bool maximize;
  double lr, beta1, beta2, weight_decay;
  double e;            // of soft, huber and smooth
  int64_t seed, step;  // of stochastic rounding
};

// ---- A call -------------------------------------------------------------------------------------

// One parameter; all arrays have n elements in the same order.
struct Tensor {
  void* x;
  const void* g;
  void* m;
  const void* given;   // dK(c) as float or double; Kappa::kGiven only
  void* compensation;  // dtype of x; Rounding::kCompensated only
  int64_t n;
  int64_t position;  // tells the random numbers of tensors apart
};

struct Problem {
  const Tensor* tensors;
  const int64_t* first;  // [count + 1], padded elements before each tensor
  int64_t count;
  DType x_dtype, g_dtype, m_dtype;
  Options options;
};

// Elements of a tensor, rounded up so that ranges of elements begin at whole vectors.
inline int64_t padded(int64_t n) {
  return (n + 63) / 64 * 64;
}

// ---- An element ---------------------------------------------------------------------------------

// The factors, each rounded once from double.
template <class R>
struct Factors {
  R beta1, rest1, beta2, rest2, decay, minus_lr, e;
};
template <class R>
PYLOSS_HD inline Factors<R> factors(const Options& o, double lr) {
  const double sign = o.maximize ? -1.0 : 1.0;  // exact: as if the gradient had changed its sign
  return {R(o.beta1),
          R(sign * (1 - o.beta1)),
          R(o.beta2),
          R(sign * (1 - o.beta2)),
          R(1 - lr * o.weight_decay),
          R(-lr),
          R(o.e)};
}

PYLOSS_HD inline float fma_(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
PYLOSS_HD inline double fma_(double a, double b, double c) {
  return ::fma(a, b, c);
}
PYLOSS_HD inline float sqrt_(float x) {
  return ::sqrtf(x);
}
PYLOSS_HD inline double sqrt_(double x) {
  return ::sqrt(x);
}

// dK(c); NaN for NaN.
template <Kappa kKappa, class R>
PYLOSS_HD inline R direction(R c, R e) {
  if constexpr (kKappa == Kappa::kL1) {
    return c > 0 ? R(1) : (c < 0 ? R(-1) : c - c);
  } else if constexpr (kKappa == Kappa::kSoft) {
    return c > e ? R(1) : (c < -e ? R(-1) : c - c);
  } else if constexpr (kKappa == Kappa::kHuber) {
    return c > e ? R(1) : (c < -e ? R(-1) : c / e);
  } else {
    // c / sqrt(c^2 + e^2) by the larger of the two, so that no square overflows.
    const R a = c < 0 ? -c : c;
    const R high = e > a ? e : a, low = e > a ? a : e;
    const R ratio = low / high;
    return c / high / sqrt_(fma_(ratio, ratio, R(1)));
  }
}

// One element: reads x, m and g, writes x and m.
template <Kappa kKappa, class R>
PYLOSS_HD inline void update(const Factors<R>& f, R g, R given, R* x, R* m) {
  R d = given;
  if constexpr (kKappa != Kappa::kGiven) {
    d = direction<kKappa>(fma_(f.rest1, g, f.beta1 * *m), f.e);
  }
  const R kept = *x * f.decay;
  *x = fma_(f.minus_lr, d, kept);
  const R old = f.beta2 * *m;
  *m = fma_(f.rest2, g, old);
}

// ---- Stochastic rounding -----------------------------------------------------------------------
// Random bits are a function of (seed, step, tensor, element), so that they do not depend on who
// computes them. The same in torch operations: pyloss/ops/lion_k/rounding.py.

PYLOSS_HD inline uint32_t mix_bits(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}
PYLOSS_HD inline uint32_t tensor_key(int64_t seed, int64_t step, int64_t position) {
  uint32_t h = mix_bits(uint32_t(uint64_t(seed)) + 0x9e3779b9u);
  h = mix_bits(h ^ uint32_t(uint64_t(seed) >> 32));
  h = mix_bits(h + uint32_t(uint64_t(position)));
  return mix_bits(h + uint32_t(uint64_t(step)));
}
// `high`: the upper half of the element's index.
PYLOSS_HD inline uint32_t block_key(uint32_t key, uint32_t high) {
  return high == 0 ? key : mix_bits(key + high);
}
PYLOSS_HD inline uint32_t random_bits(uint32_t key, uint32_t element) {
  return mix_bits((element * 0x9e3779b9u) ^ key);
}

PYLOSS_HD inline BF16 round_stochastic(BF16, float x, uint32_t random) {
  const uint32_t u = float_to_bits(x);
  const bool finite = (u & 0x7f800000u) != 0x7f800000u;
  return finite ? BF16{uint16_t((u + (random & 0xffffu)) >> 16)} : float_to_bf16(x);
}
PYLOSS_HD inline F16 round_stochastic(F16, float x, uint32_t random) {
  const uint32_t u = float_to_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a + (random & 0x1fffu) - (112u << 23)) >> 13;
  // Below 2^-14 the spacing is 2^-24.
  const float scaled = bits_to_float(a) * 0x1p24f + float(random & 0x1fffu) * 0x1p-13f;
  const uint32_t tiny = uint32_t(scaled < 2048.0f ? scaled : 0.0f);
  uint32_t r = a < (113u << 23) ? tiny : normal;
  r = r > 0x7c00u ? 0x7c00u : r;
  return a < 0x47800000u ? F16{uint16_t(r | sign)} : float_to_f16(x);
}
template <class T>
PYLOSS_HD inline T round_stochastic(T, T x, uint32_t) {
  return x;
}

}  // namespace pyloss::lion_k
