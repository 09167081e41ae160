// Lion-K on the CPU: formulas in common/lion_k.h.
//
// Decomposition: the elements of all tensors, one after the other, are cut into ranges of equal
// length, so that one large tensor is shared by the threads and a thousand small ones are one
// range. No element depends on another: the bits are the same for every number of threads. Memory:
// x and m are read and written, g is read, once each: 20 bytes per float; no scratch but what fits
// in the first-level cache. What is not of the accumulator's type goes through a block there,
// converted on the way in and out. Numerics: float, double where the parameters are double.
#include "cpu/lion_k.h"

#include <algorithm>
#include <type_traits>

#include "common/compiler.h"
#include "cpu/parallel.h"

namespace pyloss::cpu {
namespace {

using lion_k::Factors;
using lion_k::Kappa;
using lion_k::Rounding;

constexpr int64_t kBlock = 1024;        // elements; four arrays of floats are 16 KiB
constexpr int64_t kRange = 32 * 1024;   // elements that a thread claims at a time
constexpr int64_t kSerial = 64 * 1024;  // below, a second thread would wake up too late

// ---- Loops, compiled for each instruction set --------------------------------------------------

template <Kappa kKappa, class R>
PYLOSS_INLINE void update_loop(const Factors<R>& given_factors, const R* g, const R* given,
                               R* __restrict x, R* __restrict m, int64_t n) {
  const Factors<R> f = given_factors;
  for (int64_t i = 0; i < n; ++i) {
    lion_k::update<kKappa>(f, g[i], kKappa == Kappa::kGiven ? given[i] : R(0), x + i, m + i);
  }
}

template <class R>
PYLOSS_INLINE void update_any(Kappa kappa, const Factors<R>& f, const R* g, const R* given, R* x,
                              R* m, int64_t n) {
  switch (kappa) {
    case Kappa::kL1:
      return update_loop<Kappa::kL1>(f, g, given, x, m, n);
    case Kappa::kSoft:
      return update_loop<Kappa::kSoft>(f, g, given, x, m, n);
    case Kappa::kHuber:
      return update_loop<Kappa::kHuber>(f, g, given, x, m, n);
    case Kappa::kSmooth:
      return update_loop<Kappa::kSmooth>(f, g, given, x, m, n);
    default:
      return update_loop<Kappa::kGiven>(f, g, given, x, m, n);
  }
}

PYLOSS_MULTIVERSION void update_block(Kappa kappa, const Factors<float>& f, const float* g,
                                      const float* given, float* x, float* m, int64_t n) {
  update_any(kappa, f, g, given, x, m, n);
}
PYLOSS_MULTIVERSION void update_block(Kappa kappa, const Factors<double>& f, const double* g,
                                      const double* given, double* x, double* m, int64_t n) {
  update_any(kappa, f, g, given, x, m, n);
}

template <class T, class R>
PYLOSS_INLINE void load_loop(const T* from, R* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = R(to_float(from[i]));
}
template <class T, class R>
PYLOSS_INLINE void store_loop(const R* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = FromFloat<T>::of(from[i]);
}

#define PYLOSS_LION_K_CONVERT(T, R)                                 \
  PYLOSS_MULTIVERSION void load(const T* from, R* to, int64_t n) {  \
    load_loop(from, to, n);                                         \
  }                                                                 \
  PYLOSS_MULTIVERSION void store(const R* from, T* to, int64_t n) { \
    store_loop(from, to, n);                                        \
  }
PYLOSS_LION_K_CONVERT(BF16, float)
PYLOSS_LION_K_CONVERT(F16, float)
PYLOSS_LION_K_CONVERT(float, float)
PYLOSS_LION_K_CONVERT(double, float)
PYLOSS_LION_K_CONVERT(BF16, double)
PYLOSS_LION_K_CONVERT(F16, double)
PYLOSS_LION_K_CONVERT(float, double)
PYLOSS_LION_K_CONVERT(double, double)
#undef PYLOSS_LION_K_CONVERT

template <class T>
PYLOSS_INLINE void stochastic_loop(const float* from, T* to, int64_t n, uint32_t key,
                                   uint32_t first) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = lion_k::round_stochastic(T{}, from[i], lion_k::random_bits(key, first + uint32_t(i)));
  }
}
PYLOSS_MULTIVERSION void store_stochastic(const float* from, BF16* to, int64_t n, uint32_t key,
                                          uint32_t first) {
  stochastic_loop(from, to, n, key, first);
}
PYLOSS_MULTIVERSION void store_stochastic(const float* from, F16* to, int64_t n, uint32_t key,
                                          uint32_t first) {
  stochastic_loop(from, to, n, key, first);
}

template <class T>
PYLOSS_INLINE void compensated_loop(const float* from, T* to, T* rest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T kept = FromFloat<T>::of(from[i]);
    const float lost = from[i] - to_float(kept);
    to[i] = kept;
    rest[i] = FromFloat<T>::of(lost - lost == 0 ? lost : 0.0f);  // of infinities and NaN: nothing
  }
}
PYLOSS_MULTIVERSION void store_compensated(const float* from, BF16* to, BF16* rest, int64_t n) {
  compensated_loop(from, to, rest, n);
}
PYLOSS_MULTIVERSION void store_compensated(const float* from, F16* to, F16* rest, int64_t n) {
  compensated_loop(from, to, rest, n);
}
PYLOSS_MULTIVERSION void add(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// ---- A part of one tensor ----------------------------------------------------------------------

// Elements of an array as R: those in memory, or a block of them that was converted.
template <class R>
const R* readable(const void* array, DType t, int64_t at, int64_t n, R* block) {
  const R* found = block;
  dispatch_float(t, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(array) + at;
    if constexpr (std::is_same_v<T, R>) {
      found = from;
    } else {
      load(from, block, n);
    }
  });
  return found;
}

template <class T, class R>
void store_parameter(const lion_k::Options& o, const lion_k::Tensor& t, const R* from, int64_t at,
                     int64_t n) {
  T* to = static_cast<T*>(t.x) + at;
  if constexpr (std::is_same_v<R, float> && sizeof(T) == 2) {
    if (o.rounding == Rounding::kStochastic) {
      const uint32_t high = uint32_t(uint64_t(at) >> 32);
      const uint32_t key = lion_k::tensor_key(o.seed, o.step, t.position);
      return store_stochastic(from, to, n, lion_k::block_key(key, high), uint32_t(uint64_t(at)));
    }
    if (o.rounding == Rounding::kCompensated) {
      return store_compensated(from, to, static_cast<T*>(t.compensation) + at, n);
    }
  }
  store(from, to, n);
}

// Elements [begin, end) of a tensor.
template <class R>
void update_part(const lion_k::Problem& p, const Factors<R>& f, const lion_k::Tensor& t,
                 int64_t begin, int64_t end) {
  constexpr DType kOwn = std::is_same_v<R, double> ? DType::kF64 : DType::kF32;
  const lion_k::Options& o = p.options;
  if (p.x_dtype == kOwn && p.g_dtype == kOwn && p.m_dtype == kOwn) {
    update_block(o.kappa, f, static_cast<const R*>(t.g) + begin,
                 t.given ? static_cast<const R*>(t.given) + begin : nullptr,
                 static_cast<R*>(t.x) + begin, static_cast<R*>(t.m) + begin, end - begin);
    return;
  }
  R x[kBlock], g[kBlock], m[kBlock];
  for (int64_t at = begin; at < end;) {
    // Blocks begin at multiples of their length, so that none crosses 2^32 elements.
    const int64_t n = std::min(end, (at / kBlock + 1) * kBlock) - at;
    const R* own_x = readable(t.x, p.x_dtype, at, n, x);
    if (own_x != x) std::copy(own_x, own_x + n, x);
    if constexpr (std::is_same_v<R, float>) {
      if (t.compensation) add(readable(t.compensation, p.x_dtype, at, n, g), x, n);
    }
    const R* own_m = readable(t.m, p.m_dtype, at, n, m);
    if (own_m != m) std::copy(own_m, own_m + n, m);
    const R* own_g = readable(t.g, p.g_dtype, at, n, g);
    update_block(o.kappa, f, own_g, t.given ? static_cast<const R*>(t.given) + at : nullptr, x, m,
                 n);
    dispatch_float(p.x_dtype, [&](auto zero) { store_parameter<decltype(zero)>(o, t, x, at, n); });
    dispatch_float(p.m_dtype,
                   [&](auto zero) { store(m, static_cast<decltype(zero)*>(t.m) + at, n); });
    at += n;
  }
}

template <class R>
void run(const lion_k::Problem& p, int threads) {
  const Factors<R> f = lion_k::factors<R>(p.options, p.options.lr);
  const int64_t total = p.first[p.count];
  const auto range = [&](int64_t begin, int64_t end) {
    const int64_t* next = std::upper_bound(p.first, p.first + p.count + 1, begin);
    for (int64_t i = next - p.first - 1; i < p.count && p.first[i] < end; ++i) {
      const lion_k::Tensor& t = p.tensors[i];
      const int64_t from = std::max<int64_t>(begin - p.first[i], 0);
      const int64_t to = std::min(end - p.first[i], t.n);
      if (from < to) update_part(p, f, t, from, to);
    }
  };
  parallel_for(total, kRange, total < kSerial ? 1 : threads, range);
}

}  // namespace

void lion_k_step(const lion_k::Problem& p, int threads) {
  p.x_dtype == DType::kF64 ? run<double>(p, threads) : run<float>(p, threads);
}

}  // namespace pyloss::cpu
