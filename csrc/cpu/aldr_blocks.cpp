// See aldr_blocks.h.
#include "cpu/aldr_blocks.h"

#include "common/compiler.h"
#include "cpu/lanes.h"
#include "cpu/row_blocks.h"

namespace pyloss {
namespace {

template <class R>
PYLOSS_INLINE void scan_of(const R* z, int64_t n, R* sum, R* top) {
  R acc[kLanes] = {}, most[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) most[l] = -infinity_<R>();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R v = z[i + l];
      acc[l] += v < 0 ? -v : v;
      most[l] = v > most[l] ? v : most[l];
    }
  }
  for (; i < n; ++i) {
    acc[0] += z[i] < 0 ? -z[i] : z[i];
    most[0] = z[i] > most[0] ? z[i] : most[0];
  }
  *sum = sum_lanes(acc);
  R m = most[0];
  for (int64_t l = 1; l < kLanes; ++l) m = most[l] > m ? most[l] : m;
  *top = m;
}

// Half the usual lanes: three sums of all of them would not fit the registers.
template <class R>
PYLOSS_INLINE aldr::Moments<R> moments_of(const R* z, int64_t n, R top, R slope) {
  constexpr int64_t kHalf = kLanes / 2;
  R s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {};
  for (int64_t i = 0; i < padded(n); i += kHalf) {
    for (int64_t l = 0; l < kHalf; ++l) {
      const R u = (z[i + l] - top) * slope;
      const R bounded = u < R(-1e4) ? R(-1e4) : u;  // 0 * -inf
      const R e = exp_lane(u), w = e * bounded;
      s0[l] += e;
      s1[l] += w;
      s2[l] += w * bounded;
    }
  }
  return {sum_lanes(s0), sum_lanes(s1), sum_lanes(s2)};
}

template <class R>
PYLOSS_INLINE void gradient_of(const R* z, int64_t n, const aldr::Coeffs<R>& c, R* out) {
  const R top = c.top, slope = c.slope, a = c.a, f = c.f;
  const int64_t n_pad = padded(n);
  if (f == 0) {
    for (int64_t i = 0; i < n_pad; ++i) out[i] = a * exp_lane((z[i] - top) * slope);
    return;
  }
  for (int64_t i = 0; i < n_pad; ++i) {
    const R side = z[i] > 0 ? f : (z[i] < 0 ? -f : R(0));
    out[i] = a * exp_lane((z[i] - top) * slope) - side;
  }
}

}  // namespace

PYLOSS_MULTIVERSION void aldr_scan(const float* z, int64_t n, float* sum, float* top) {
  scan_of(z, n, sum, top);
}
void aldr_scan(const double* z, int64_t n, double* sum, double* top) {
  scan_of(z, n, sum, top);
}

PYLOSS_MULTIVERSION aldr::Moments<float> aldr_moments(const float* z, int64_t n, float top,
                                                      float slope) {
  return moments_of(z, n, top, slope);
}
aldr::Moments<double> aldr_moments(const double* z, int64_t n, double top, double slope) {
  return moments_of(z, n, top, slope);
}

PYLOSS_MULTIVERSION void aldr_gradient(const float* z, int64_t n, const aldr::Coeffs<float>& c,
                                       float* out) {
  gradient_of(z, n, c, out);
}
void aldr_gradient(const double* z, int64_t n, const aldr::Coeffs<double>& c, double* out) {
  gradient_of(z, n, c, out);
}

}  // namespace pyloss
