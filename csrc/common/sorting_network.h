// Differentiable sorting networks: the relaxed comparator and the networks, for CPU and CUDA.
//
// A comparator (lo, hi) mixes two wires; the mix is symmetric, so that its transpose is itself:
//
//     x_lo' = alpha x_lo + beta x_hi        d = x_hi - x_lo, alpha = f(s d), beta = 1 - alpha
//     x_hi' = beta x_lo + alpha x_hi        both act on values, features and rows of P alike
//
// Numerics: the weight of the wrong side, tau = f(-|s d|) <= 1/2, comes from a formula of its own,
// without a subtraction from 1; alpha and beta are tau and 1 - tau. Values are min + tau |d| and
// max - tau |d|. Infinite wires compare hard, and no gradient reaches them; NaN stays NaN.
//
// The functions are templates over a class of elementary functions: ScalarMath below, or the
// vectors of csrc/cpu/sorting_network_tile.h. Conditions are selections, so that both serve.
//
// Papers: arXiv 2105.04019, 2203.09630, 2206.07290; Knuth, volume 3, 5.2.2 (algorithm M).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/compiler.h"
#include "common/dtype.h"
#include "common/math.h"

namespace pyloss {
namespace sorting {

enum class Network : int32_t { kBitonic = 0, kOddEven = 1, kBatcher = 2, kSplitter = 3 };
enum class Distribution : int32_t {
  kLogistic = 0,
  kLogisticPhi = 1,
  kGaussian = 2,
  kCauchy = 3,
  kReciprocal = 4,
  kOptimal = 5
};
enum class Loss : int32_t { kBce = 0, kRowCe = 1, kColCe = 2 };
inline constexpr int kNetworkCount = 4, kDistributionCount = 6, kLossCount = 3;

inline constexpr int64_t kMaxWires = int64_t{1} << 29;

// Rows and the network that sorts them, in host memory or on a device.
struct Problem {
  int64_t items, n;
  DType dtype;  // kF32 or kF64, of every floating array
  Network network;
  Distribution distribution;
  double steepness, art_lambda;
  const void* x;  // [items][n]
  // kSplitter, which has no formula: pairs (lo, hi) of wires, and where each layer starts.
  const int32_t* table;    // [comparators][2]
  const int32_t* offsets;  // [layers + 1]
  int32_t comparators, layers;
};

// Of P^T f (transpose) or P f.
struct Features {
  const void* f;  // [items][n][width], or [n][width] where the batch shares it
  bool shared, transpose;
  int64_t width;
};

// --------------------------------------------------------------------------------------------------
// Networks

struct Comparator {
  int32_t lo, hi;  // the wires of the soft minimum and the soft maximum
};

// Comparators c = 0 .. count - 1 of a layer, by arithmetic: see comparator().
struct Layer {
  int32_t count;
  int32_t period;     // a power of two: the lower wires come in runs of this length
  int32_t distance;   // between the two wires
  int32_t shift;      // of the lower wire
  int32_t skip;       // of the number of the comparator
  int32_t flip_mask;  // bitonic: where the order is descending
  int32_t block;      // bitonic, batcher: which block of layers this one belongs to
};

PYLOSS_HD constexpr int ceil_log2(int64_t n) {
  int k = 0;
  while ((int64_t(1) << k) < n) ++k;
  return k;
}

// Of a network without a table.
PYLOSS_HD constexpr int layer_count(Network network, int64_t n) {
  const int k = ceil_log2(n);
  return network == Network::kOddEven ? (n < 2 ? 0 : int(n)) : k * (k + 1) / 2;
}

// How many of 0 .. m - 1 have the bit `period` clear.
PYLOSS_HD constexpr int32_t count_clear(int32_t m, int32_t period) {
  const int32_t rest = m % (2 * period);
  return m / (2 * period) * period + (rest < period ? rest : period);
}

// Layer l of a network without a table, n <= 2^29 wires.
PYLOSS_HD constexpr Layer layer_of(Network network, int32_t n, int32_t l) {
  if (network == Network::kOddEven) return {(n - (l & 1)) / 2, 1, 1, l & 1, 0, 0, l};
  // Block k has layers j = 0 .. k.
  int32_t k = 0;
  int32_t j = l;
  while (j > k) j -= ++k;
  const int t = ceil_log2(n);
  if (network == Network::kBitonic) {
    // The last n of 2^t wires; a comparator of a wire that is not there falls away.
    const int32_t m = int32_t(1) << (k - j), absent = (int32_t(1) << t) - n;
    const int32_t skip = count_clear(absent, m);
    return {(int32_t(1) << t) / 2 - skip, m, m, -absent, skip, int32_t(2) << k, k};
  }
  const int32_t p = int32_t(1) << (t - 1 - k);
  const int32_t distance = j == 0 ? p : (int32_t(1) << (t - j)) - p;
  const int32_t lower = n > distance ? n - distance : 0;  // wires with a partner above
  const int32_t clear = count_clear(lower, p);
  return j == 0 ? Layer{clear, p, distance, 0, 0, 0, k}
                : Layer{lower - clear, p, distance, p, 0, 0, k};
}

PYLOSS_HD constexpr Comparator comparator(const Layer& layer, int32_t c) {
  const int32_t j = c + layer.skip;
  const int32_t i = 2 * j - (j & (layer.period - 1));
  const int32_t a = i + layer.shift, b = a + layer.distance;
  return (i & layer.flip_mask) ? Comparator{b, a} : Comparator{a, b};
}

// --------------------------------------------------------------------------------------------------
// Elementary functions

template <class T>
PYLOSS_HD PYLOSS_INLINE T atan_over_pi(const T& z) {
  // atan(z) / (pi z) in z^2, 0 <= z <= 1, relative error 4.1e-8.
  constexpr float kC[] = {0.31830987334251404f,   -0.10610246658325195f,  0.06363850086927414f,
                          -0.045211710035800934f, 0.03387146443128586f,   -0.02388743869960308f,
                          0.013589611276984215f,  -0.005115022882819176f, 0.000907186302356422f};
  const T s = z * z;
  return z * (kC[0] +
              s * (kC[1] +
                   s * (kC[2] +
                        s * (kC[3] +
                             s * (kC[4] + s * (kC[5] + s * (kC[6] + s * (kC[7] + s * kC[8]))))))));
}
// From e = e^(-u^2/2).
template <class T>
PYLOSS_HD PYLOSS_INLINE T normal_tail(const T& u, const T& e) {
  // (1 + u) e^(u^2/2) erfc(u / sqrt 2) / 2 in (u - 2.5) / (u + 2.5), 0 <= u <= 15, relative error
  // 8.8e-9.
  constexpr float kC[] = {0.4946596622467041f,      -0.09158747643232346f,  -0.03771665319800377f,
                          0.04606280475854874f,     -0.008699891157448292f, -0.0060469298623502254f,
                          0.0012844169978052378f,   0.0012622176436707377f, -4.937787139169814e-07f,
                          -0.00022559170611202717f, -6.201571522979066e-05f};
  const T q = (u - 2.5f) / (u + 2.5f);
  const T p =
      kC[0] +
      q * (kC[1] +
           q * (kC[2] +
                q * (kC[3] +
                     q * (kC[4] +
                          q * (kC[5] +
                               q * (kC[6] +
                                    q * (kC[7] + q * (kC[8] + q * (kC[9] + q * kC[10])))))))));
  return e * p / (1.0f + u);
}
// The second factor of e^(-u^2/2) = e^(-h^2/2) e^(-x), where h is the upper half of the digits of
// u, so that h^2 is exact, and x = (u - h)(u + h)/2 <= 0.05.
template <class T>
PYLOSS_HD PYLOSS_INLINE T exp_of_small(const T& x) {
  return 1.0f - x * (1.0f - x * (0.5f - x * (0.16666667f - x * 0.041666668f)));
}

// e^(-u^2/2) and erfc(u / sqrt 2) / 2, u >= 0.
template <class M>
PYLOSS_HD PYLOSS_INLINE void float_normal(float u, float* density, float* tail) {
  const float v = u > 15.0f ? 15.0f : u;
  const float h = bits_to_float(float_to_bits(v) & 0xfffff000u);  // 12 digits
  const float e = M::exp(-0.5f * h * h) * exp_of_small(0.5f * (v - h) * (v + h));
  *density = u > 15.0f ? 0.0f : e;
  *tail = u > 15.0f ? 0.0f : normal_tail(v, e);
}

template <class R>
struct ScalarMath;

template <>
struct ScalarMath<float> {
  using T = float;
  using R = float;
  PYLOSS_HD static float exp(float x) { return ::expf(x); }
  PYLOSS_HD static float sqrt(float x) { return ::sqrtf(x); }
  PYLOSS_HD static float power(float x, float y) { return ::powf(x, y); }
  PYLOSS_HD static float atan_pi(float z) { return atan_over_pi(z); }
  PYLOSS_HD static void normal(float u, float* density, float* tail) {
    float_normal<ScalarMath<float>>(u, density, tail);
  }
};

template <>
struct ScalarMath<double> {
  using T = double;
  using R = double;
  PYLOSS_HD static double exp(double x) { return ::exp(x); }
  PYLOSS_HD static double sqrt(double x) { return ::sqrt(x); }
  PYLOSS_HD static double power(double x, double y) { return ::pow(x, y); }
  PYLOSS_HD static double atan_pi(double z) { return ::atan(z) * 0.31830988618379067; }
  PYLOSS_HD static void normal(double u, double* density, double* tail) {
    // erfc multiplies the error of its argument by its square, so u / sqrt 2 gets a second word.
    const double v = u > 40.0 ? 40.0 : u, x = v * 0.70710678118654752;
    const double r =
        (::fma(-x, 1.4142135623730951, v) + x * 9.6672933134529135e-17) * 0.70710678118654752;
    const double h2 = v * v, e = ::exp(-0.5 * h2) * (1.0 - 0.5 * ::fma(v, v, -h2));
    *density = u > 40.0 ? 0.0 : e;
    *tail = 0.5 * (::erfc(x) - 1.1283791670955126 * r * ::exp(-x * x));
  }
};

template <class R>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kMax = 3.402823466e+38f;
};
template <>
struct Limits<double> {
  static constexpr double kMax = 1.7976931348623157e+308;
};

// --------------------------------------------------------------------------------------------------
// The comparator

template <class R>
struct Relaxation {
  R steepness, art_lambda;
};

// tau and d alpha / d d at ad = |d|.
template <class T>
struct WrongSide {
  T tau, slope;
};

template <Distribution kKind, class M>
PYLOSS_HD PYLOSS_INLINE WrongSide<typename M::T> wrong_side(
    const typename M::T& ad, const Relaxation<typename M::R>& relaxation) {
  using T = typename M::T;
  using R = typename M::R;
  const R s = relaxation.steepness;
  if constexpr (kKind == Distribution::kLogistic) {
    const T e = M::exp(-(s * ad));
    const T tau = e / (R(1) + e);
    return {tau, s * tau * (R(1) - tau)};
  } else if constexpr (kKind == Distribution::kLogisticPhi) {
    const R lambda = relaxation.art_lambda;
    const T w = ad + R(1e-10);
    const T scale = s * (lambda == R(0.25) ? R(1) / M::sqrt(M::sqrt(w)) : M::power(w, -lambda));
    const T e = M::exp(-(scale * ad));
    const T tau = e / (R(1) + e);
    return {tau, scale * (R(1) - lambda * (ad / w)) * tau * (R(1) - tau)};
  } else if constexpr (kKind == Distribution::kGaussian) {
    T density, tail;
    M::normal(s * ad, &density, &tail);
    return {tail, s * R(0.3989422804014327) * density};
  } else if constexpr (kKind == Distribution::kCauchy) {
    const T u = s * ad;
    const T z = u > R(1) ? R(1) / u : u;
    const T angle = M::atan_pi(z);
    const T z2 = z * z;
    const T slope = s * R(0.3183098861837907) / (R(1) + z2);
    return {u > R(1) ? angle : R(0.5) - angle, u > R(1) ? slope * z2 : slope};
  } else if constexpr (kKind == Distribution::kReciprocal) {
    const T tau = R(1) / (R(2) + s * ad);
    return {tau, s * tau * tau};
  } else {
    const T u = s * ad;
    const T far = R(0.0625) / u;
    const T steep = T{} + s;
    return {u > R(0.25) ? far : R(0.5) - u, u > R(0.25) ? steep * (R(16) * far * far) : steep};
  }
}

// What a comparator is to the sweeps.
template <class T>
struct Mixed {
  T lo, hi;       // the values of the two wires behind it
  T alpha, beta;  // beta = 1 - alpha
  T slope;        // d alpha / d d; 0 if a wire is infinite
  T d;            // x_hi - x_lo; 0 if that is infinite
};

template <Distribution kKind, class M>
PYLOSS_HD PYLOSS_INLINE Mixed<typename M::T> mix_values(
    const typename M::T& x_lo, const typename M::T& x_hi,
    const Relaxation<typename M::R>& relaxation) {
  using T = typename M::T;
  using R = typename M::R;
  const R most = Limits<R>::kMax;
  const T zero = T{};
  const T difference = x_hi - x_lo;
  const T d = x_lo == x_hi ? zero : difference;  // inf - inf is NaN
  const T ad = d < zero ? -d : d;
  const WrongSide<T> side = wrong_side<kKind, M>(ad, relaxation);
  const T tau = ad > most ? zero : side.tau;
  const T finite_ad = ad > most ? zero : ad;
  const T size = x_lo < zero ? -x_lo : x_lo;
  const T right = R(1) - tau, shift = tau * finite_ad;
  Mixed<T> m{};
  m.alpha = d < zero ? tau : right;
  m.beta = d < zero ? right : tau;
  m.lo = (d < zero ? x_hi : x_lo) + shift;
  m.hi = (d < zero ? x_lo : x_hi) - shift;
  m.slope = ad > most ? zero : side.slope;
  m.slope = size > most ? zero : m.slope;  // two equal infinities; of different ones ad is infinite
  m.d = ad > most ? zero : d;
  return m;
}

// The value sweep backwards: from g of the wires behind a comparator to g of those before it.
// `dp` is dL / d alpha by way of P or of features.
template <class T>
PYLOSS_HD PYLOSS_INLINE void mix_gradients(T* g_lo, T* g_hi, const T& alpha, const T& beta,
                                           const T& slope, const T& d, const T& dp) {
  const T lo = *g_lo, hi = *g_hi;
  const T e = (dp - (lo - hi) * d) * slope;
  *g_lo = alpha * lo + beta * hi - e;
  *g_hi = beta * lo + alpha * hi + e;
}

}  // namespace sorting
}  // namespace pyloss
