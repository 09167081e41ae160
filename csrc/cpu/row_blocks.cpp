// See row_blocks.h. Each loop is written once, as a template that is inlined into a float function
// compiled for three instruction sets and into a plain double function.
#include "cpu/row_blocks.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/compiler.h"
#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"

namespace pyloss {
namespace {

// The loops of row_block_kernels.h.
struct BlockMath {
  float (*load_f32)(const float*, int64_t, float*);
  float (*load_bf16)(const BF16*, int64_t, float*);
  void (*lines_f32)(const float*, int64_t, float*, float*);
  void (*lines_bf16)(const BF16*, int64_t, float*, float*);
  float (*exp_sum_half)(float*, int64_t, float, const char*);
  float (*exp_sum)(float*, int64_t, float, const char*);
  void (*scale_f32)(const float*, int64_t, float, Entry, float*, bool);
  void (*scale_bf16)(const float*, int64_t, float, Entry, BF16*, bool);
  void (*exp_f32)(const float*, int64_t, float, float, Entry, float*, bool);
  void (*exp_bf16)(const BF16*, int64_t, float, float, Entry, BF16*, bool);
};

#define PYLOSS_KERNELS "cpu/row_block_kernels.h"
#include "cpu/per_instruction_set.h"

const BlockMath& block_math() {
  static const BlockMath base_math = base::block_math();
#if PYLOSS_HAS_TARGET_PRAGMA
  static const BlockMath v3_math = v3::block_math(), v4_math = v4::block_math();
  switch (cpu::instruction_set()) {
    case cpu::InstructionSet::kV4:
      return v4_math;
    case cpu::InstructionSet::kV3:
      return v3_math;
    default:
      break;
  }
#endif
  return base_math;
}

enum class Transform { kIdentity, kScale, kCap };

// z = transform(x), padded with -inf; returns the maximum. The comparison is false for NaN, as the
// vector maximum instruction wants it: NaN reaches the result through the sums.
template <Transform kTransform, class T, class R>
PYLOSS_INLINE R load_of(const T* x, int64_t n, R pre, R post, R* z) {
  const auto transform = [pre, post](R v) PYLOSS_ALWAYS_INLINE {
    if constexpr (kTransform == Transform::kScale) v = pre * v;
    if constexpr (kTransform == Transform::kCap) v = post * tanh_lane(pre * v);
    return v;
  };
  R acc[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) acc[l] = -infinity_<R>();
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R v = transform(R(to_float(x[i + l])));
      z[i + l] = v;
      acc[l] = v > acc[l] ? v : acc[l];
    }
  }
  if (whole < n) {
    for (int64_t i = whole; i < n; ++i) z[i] = R(to_float(x[i]));
    for (int64_t i = n; i < whole + kLanes; ++i) z[i] = 0;
    for (int64_t i = whole; i < whole + kLanes; ++i) z[i] = transform(z[i]);
    for (int64_t i = n; i < whole + kLanes; ++i) z[i] = -infinity_<R>();
    for (int64_t l = 0; l < kLanes; ++l) acc[l] = z[whole + l] > acc[l] ? z[whole + l] : acc[l];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) acc[l] = acc[l + half] > acc[l] ? acc[l + half] : acc[l];
  }
  return acc[0];
}

template <class R>
PYLOSS_INLINE R entropy_sum_of(const R* z, int64_t n, R m) {
  R acc[kLanes] = {};
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R u = z[i + l] - m;
      const R bounded = u < R(-1e4) ? R(-1e4) : u;  // 0 * -inf
      acc[l] += exp_lane(u) * bounded;
    }
  }
  return sum_lanes(acc);
}

template <class R>
PYLOSS_INLINE void weighted_sum_of(const R* z, const R* w, int64_t n, R m, R* wz, R* ws) {
  R acc[kLanes] = {}, mass[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (w) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const R v = w[i + l] * (z[i + l] - m);
        acc[l] += w[i + l] == 0 ? R(0) : v;
        mass[l] += w[i + l];
      }
    } else {
      for (int64_t l = 0; l < kLanes; ++l) acc[l] += z[i + l] - m;
    }
  }
  R sum = sum_lanes(acc), total = w ? sum_lanes(mass) : R(n);
  for (; i < n; ++i) {
    if (w && w[i] == 0) continue;
    sum += (w ? w[i] : R(1)) * (z[i] - m);
    total += w ? w[i] : R(0);
  }
  *wz = sum;
  *ws = total;
}

template <class R>
PYLOSS_INLINE R max_of(const R* z, int64_t n) {
  R acc[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) acc[l] = -infinity_<R>();
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) acc[l] = z[i + l] > acc[l] ? z[i + l] : acc[l];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) acc[l] = acc[l + half] > acc[l] ? acc[l + half] : acc[l];
  }
  return acc[0];
}

template <class R>
PYLOSS_INLINE int64_t count_above_of(const R* z, int64_t n, R zy) {
  int32_t acc[kLanes] = {};
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) acc[l] += z[i + l] > zy;
  }
  int64_t sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += acc[l];
  return sum;
}

template <class R>
PYLOSS_INLINE void gradient_of(const R* z, int64_t n, const GradientTerms& g, const R* w, R* out) {
  const R m = R(g.m), a = R(g.a), b = R(g.b), spread = R(g.spread);
  const int64_t n_pad = padded(n);
  if (b == 0) {
    for (int64_t i = 0; i < n_pad; ++i) out[i] = a * exp_lane(z[i] - m);
  } else {
    for (int64_t i = 0; i < n_pad; ++i) {
      const R u = z[i] - m;
      const R bounded = u < R(-1e4) ? R(-1e4) : u;
      out[i] = exp_lane(u) * (a + b * bounded);
    }
  }
  if (spread == 0) return;
  if (w) {
    for (int64_t i = 0; i < n; ++i) out[i] -= spread * w[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] -= spread;
  }
}

template <class R>
PYLOSS_INLINE void chain_of(const R* z, int64_t n, const RowTransform<R>& f, R* out) {
  if (f.identity) return;
  const int64_t n_pad = padded(n);
  if (!f.cap) {
    for (int64_t i = 0; i < n_pad; ++i) out[i] *= f.pre;
    return;
  }
  const R inverse = 1 / f.post, scale = f.pre * f.post;
  for (int64_t i = 0; i < n_pad; ++i) {
    const R th = z[i] * inverse;
    out[i] *= scale * (1 - th) * (1 + th);
  }
}

template <class R>
PYLOSS_INLINE void slope_of(const R* z, int64_t n, const RowTransform<R>& f, R* out) {
  const R inverse = 1 / f.post, scale = f.pre * f.post;
  for (int64_t i = 0; i < padded(n); ++i) {
    const R th = z[i] * inverse;
    out[i] = scale * (1 - th) * (1 + th);
  }
}

template <class R>
PYLOSS_INLINE void multiply_of(const R* v, int64_t n, R* out) {
  for (int64_t i = 0; i < padded(n); ++i) out[i] *= v[i];
}

template <class R>
PYLOSS_INLINE void soft_sums_of(const R* z, const R* r, int64_t n, const SoftTerms& k, R* mass,
                                R* loss) {
  const R m = R(k.m), log_sum = R(k.log_sum), a = R(k.a);
  R masses[kLanes] = {}, losses[kLanes] = {};
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    if (a == 0) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const R v = r[i + l] * (log_sum - (z[i + l] - m));
        losses[l] += r[i + l] == 0 ? R(0) : v;
        masses[l] += r[i + l];
      }
    } else {
      for (int64_t l = 0; l < kLanes; ++l) {
        // Not expm1 + 1 for the slope: it has no digits left where p^(tau-1) is small.
        const R x = a * (log_sum - (z[i + l] - m));
        const R v = r[i + l] * expm1_lane(x), s = r[i + l] * exp_any_lane(x);
        losses[l] += r[i + l] == 0 ? R(0) : v;
        masses[l] += r[i + l] == 0 ? R(0) : s;
      }
    }
  }
  *mass = sum_lanes(masses);
  *loss = a == 0 ? sum_lanes(losses) : sum_lanes(losses) / a;
}

template <class R>
PYLOSS_INLINE void soft_gradient_of(const R* z, const R* r, int64_t n, const SoftTerms& s,
                                    double scale, R* out) {
  const R m = R(s.m), log_sum = R(s.log_sum), a = R(s.a), g = R(scale);
  const int64_t n_pad = padded(n);
  if (a == 0) {
    for (int64_t i = 0; i < n_pad; ++i) out[i] -= g * r[i];
    return;
  }
  for (int64_t i = 0; i < n_pad; ++i) {
    const R v = g * r[i] * exp_any_lane(a * (log_sum - (z[i] - m)));
    out[i] -= r[i] == 0 ? R(0) : v;
  }
}

template <class R>
PYLOSS_INLINE void affine_of(const R* in, int64_t n, R scale, R shift, const R* w, R* out) {
  if (shift == 0) {
    for (int64_t i = 0; i < padded(n); ++i) out[i] = scale * in[i];
  } else if (w) {
    for (int64_t i = 0; i < n; ++i) out[i] = scale * in[i] - shift * w[i];
  } else {
    for (int64_t i = 0; i < padded(n); ++i) out[i] = scale * in[i] - shift;
  }
}

template <class T, class R>
PYLOSS_INLINE void convert_from(const T* x, int64_t n, R* z) {
  for (int64_t i = 0; i < n; ++i) z[i] = R(to_float(x[i]));
}
template <class T, class R>
PYLOSS_INLINE void convert_to(const R* v, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = FromFloat<T>::of(float(v[i]));
}

PYLOSS_MULTIVERSION void from_bf16(const BF16* x, int64_t n, float* z) {
  convert_from(x, n, z);
}
PYLOSS_MULTIVERSION void from_f16(const F16* x, int64_t n, float* z) {
  convert_from(x, n, z);
}
PYLOSS_MULTIVERSION void to_bf16(const float* v, int64_t n, BF16* d) {
  convert_to(v, n, d);
}
PYLOSS_MULTIVERSION void to_f16(const float* v, int64_t n, F16* d) {
  convert_to(v, n, d);
}
// One function per element type and transform: the loops are too hot for a choice inside.
#define PYLOSS_LOAD(name, T, kind)                                                         \
  PYLOSS_MULTIVERSION float name(const T* x, int64_t n, float pre, float post, float* z) { \
    return load_of<Transform::kind>(x, n, pre, post, z);                                   \
  }
PYLOSS_LOAD(load_plain, F16, kIdentity)
PYLOSS_LOAD(load_scaled, float, kScale)
PYLOSS_LOAD(load_scaled, BF16, kScale)
PYLOSS_LOAD(load_scaled, F16, kScale)
PYLOSS_LOAD(load_capped, float, kCap)
PYLOSS_LOAD(load_capped, BF16, kCap)
PYLOSS_LOAD(load_capped, F16, kCap)
#undef PYLOSS_LOAD
float load_plain(const float* x, int64_t n, float, float, float* z) {
  return block_math().load_f32(x, n, z);
}
float load_plain(const BF16* x, int64_t n, float, float, float* z) {
  return block_math().load_bf16(x, n, z);
}
double load_plain(const double* x, int64_t n, double pre, double post, double* z) {
  return load_of<Transform::kIdentity>(x, n, pre, post, z);
}
double load_scaled(const double* x, int64_t n, double pre, double post, double* z) {
  return load_of<Transform::kScale>(x, n, pre, post, z);
}
double load_capped(const double* x, int64_t n, double pre, double post, double* z) {
  return load_of<Transform::kCap>(x, n, pre, post, z);
}

template <class T, class R>
R load_block_of(const void* x, int64_t n, const RowTransform<R>& f, R* z) {
  const T* p = static_cast<const T*>(x);
  if (f.identity) return load_plain(p, n, f.pre, f.post, z);
  if (f.cap) return load_capped(p, n, f.pre, f.post, z);
  return load_scaled(p, n, f.pre, f.post, z);
}

}  // namespace

void load_values(const void* x, DType t, int64_t n, float* z) {
  switch (t) {
    case DType::kBF16:
      return from_bf16(static_cast<const BF16*>(x), n, z);
    case DType::kF16:
      return from_f16(static_cast<const F16*>(x), n, z);
    case DType::kF64:
      return convert_from(static_cast<const double*>(x), n, z);
    default:
      memcpy(z, x, n * sizeof(float));
  }
}
void load_values(const void* x, DType t, int64_t n, double* z) {
  switch (t) {
    case DType::kBF16:
      return convert_from(static_cast<const BF16*>(x), n, z);
    case DType::kF16:
      return convert_from(static_cast<const F16*>(x), n, z);
    case DType::kF32:
      return convert_from(static_cast<const float*>(x), n, z);
    default:
      memcpy(z, x, n * sizeof(double));
  }
}

float load_block(const void* x, DType t, int64_t n, const RowTransform<float>& f, float* z) {
  switch (t) {
    case DType::kBF16:
      return load_block_of<BF16>(x, n, f, z);
    case DType::kF16:
      return load_block_of<F16>(x, n, f, z);
    default:
      return load_block_of<float>(x, n, f, z);
  }
}
double load_block(const void* x, DType, int64_t n, const RowTransform<double>& f, double* z) {
  return load_block_of<double>(x, n, f, z);
}

void load_lines(const void* x, DType t, int64_t n, float* z, float* m) {
  const BlockMath& math = block_math();
  if (t == DType::kBF16) return math.lines_bf16(static_cast<const BF16*>(x), n, z, m);
  math.lines_f32(static_cast<const float*>(x), n, z, m);
}

float block_exp_sum(float* z, int64_t n, float m, const void* ahead, int64_t ahead_size) {
  const BlockMath& math = block_math();
  return (ahead_size == 2 ? math.exp_sum_half : math.exp_sum)(z, n, m,
                                                              static_cast<const char*>(ahead));
}
double block_exp_sum(double* z, int64_t n, double m, const void* ahead, int64_t ahead_size) {
  double acc[kLanes] = {};
  const char* next = static_cast<const char*>(ahead);
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    prefetch(next + i * ahead_size, kLanes * ahead_size);
    for (int64_t l = 0; l < kLanes; ++l) acc[l] += z[i + l] = exp_lane(z[i + l] - m);
  }
  return sum_lanes(acc);
}

PYLOSS_MULTIVERSION float block_entropy_sum(const float* z, int64_t n, float m) {
  return entropy_sum_of(z, n, m);
}
double block_entropy_sum(const double* z, int64_t n, double m) {
  return entropy_sum_of(z, n, m);
}

PYLOSS_MULTIVERSION void block_weighted_sum(const float* z, const float* w, int64_t n, float m,
                                            float* wz, float* ws) {
  weighted_sum_of(z, w, n, m, wz, ws);
}
void block_weighted_sum(const double* z, const double* w, int64_t n, double m, double* wz,
                        double* ws) {
  weighted_sum_of(z, w, n, m, wz, ws);
}

PYLOSS_MULTIVERSION float block_max(const float* z, int64_t n) {
  return max_of(z, n);
}
double block_max(const double* z, int64_t n) {
  return max_of(z, n);
}

PYLOSS_MULTIVERSION int64_t block_count_above(const float* z, int64_t n, float zy) {
  return count_above_of(z, n, zy);
}
int64_t block_count_above(const double* z, int64_t n, double zy) {
  return count_above_of(z, n, zy);
}

PYLOSS_MULTIVERSION void block_gradient(const float* z, int64_t n, const GradientTerms& g,
                                        const float* w, float* out) {
  gradient_of(z, n, g, w, out);
}
void block_gradient(const double* z, int64_t n, const GradientTerms& g, const double* w,
                    double* out) {
  gradient_of(z, n, g, w, out);
}

PYLOSS_MULTIVERSION void block_chain(const float* z, int64_t n, const RowTransform<float>& f,
                                     float* out) {
  chain_of(z, n, f, out);
}
void block_chain(const double* z, int64_t n, const RowTransform<double>& f, double* out) {
  chain_of(z, n, f, out);
}

PYLOSS_MULTIVERSION void block_slope(const float* z, int64_t n, const RowTransform<float>& f,
                                     float* out) {
  slope_of(z, n, f, out);
}
void block_slope(const double* z, int64_t n, const RowTransform<double>& f, double* out) {
  slope_of(z, n, f, out);
}

PYLOSS_MULTIVERSION void block_multiply(const float* v, int64_t n, float* out) {
  multiply_of(v, n, out);
}
void block_multiply(const double* v, int64_t n, double* out) {
  multiply_of(v, n, out);
}

PYLOSS_MULTIVERSION void block_soft_sums(const float* z, const float* r, int64_t n,
                                         const SoftTerms& s, float* mass, float* loss) {
  soft_sums_of(z, r, n, s, mass, loss);
}
void block_soft_sums(const double* z, const double* r, int64_t n, const SoftTerms& s, double* mass,
                     double* loss) {
  soft_sums_of(z, r, n, s, mass, loss);
}

PYLOSS_MULTIVERSION void block_soft_gradient(const float* z, const float* r, int64_t n,
                                             const SoftTerms& s, double scale, float* out) {
  soft_gradient_of(z, r, n, s, scale, out);
}
void block_soft_gradient(const double* z, const double* r, int64_t n, const SoftTerms& s,
                         double scale, double* out) {
  soft_gradient_of(z, r, n, s, scale, out);
}

PYLOSS_MULTIVERSION void block_affine(const float* in, int64_t n, float scale, float shift,
                                      const float* w, float* out) {
  affine_of(in, n, scale, shift, w, out);
}
void block_affine(const double* in, int64_t n, double scale, double shift, const double* w,
                  double* out) {
  affine_of(in, n, scale, shift, w, out);
}

void scale_row(const float* e, int64_t n, float scale, Entry entry, DType t, void* dst,
               bool stream) {
  const BlockMath& math = block_math();
  if (t == DType::kBF16) {
    math.scale_bf16(e, n, scale, entry, static_cast<BF16*>(dst), stream);
  } else {
    math.scale_f32(e, n, scale, entry, static_cast<float*>(dst), stream);
  }
}
void exp_row(const void* x, int64_t n, float m, float scale, Entry entry, DType t, void* dst,
             bool stream) {
  const BlockMath& math = block_math();
  if (t == DType::kBF16) {
    math.exp_bf16(static_cast<const BF16*>(x), n, m, scale, entry, static_cast<BF16*>(dst), stream);
  } else {
    math.exp_f32(static_cast<const float*>(x), n, m, scale, entry, static_cast<float*>(dst),
                 stream);
  }
}

void store_block(const float* v, int64_t n, DType t, void* dst, bool stream) {
  alignas(64) uint16_t half[kBlock];
  assert(n <= kBlock);
  const void* src = v;
  if (t == DType::kBF16) {
    to_bf16(v, n, reinterpret_cast<BF16*>(half));
    src = half;
  } else if (t == DType::kF16) {
    to_f16(v, n, reinterpret_cast<F16*>(half));
    src = half;
  }
  const int64_t bytes = n * dtype_size(t);
  if (stream) {
    stream_copy(dst, src, bytes);
  } else {
    memcpy(dst, src, bytes);
  }
}
void store_block(const double* v, int64_t n, DType, void* dst, bool) {
  memcpy(dst, v, n * sizeof(double));
}

}  // namespace pyloss
