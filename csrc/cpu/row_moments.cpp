// Moments of rows on the CPU: formulas in common/row_moments.h.
//
// Decomposition: rows whose classes are contiguous are cut into blocks of kBlock columns. A block
// is read twice, the second time from the first-level cache: its mean, then the squares around it.
// What the first sum has lost by rounding the second pass sees as a mean of the differences, and
// puts back. Blocks merge in index order, in double. Other rows go in tiles of kLanes positions,
// one SIMD lane each, and kTileClasses classes. Ranges of rows go to threads, and a row is summed
// the same way in any of them: threads cannot change a bit.
//
// Memory traffic per score of b bytes: forward reads b, backward reads b and writes b.
#include "cpu/row_moments.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/compiler.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"
#include "cpu/row_lines.h"

namespace pyloss::cpu {
namespace {

using namespace row_moments;

constexpr int64_t kTileClasses = 32;

// ---- Inner loops -------------------------------------------------------------------------------

// Of n <= kBlock numbers; what comes next in memory is fetched meanwhile.
template <class T, class R>
PYLOSS_INLINE Part<double> block_of(const T* x, int64_t n, R) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  R tail[kLanes] = {}, sum[kLanes] = {}, first[kLanes] = {}, second[kLanes] = {};
  for (int64_t l = 0; l < rest; ++l) tail[l] = R(to_float(x[whole + l]));
  for (int64_t i = 0; i < whole; i += kLanes) {
    prefetch(x + i + kBlock, kLanes * int64_t(sizeof(T)));
    for (int64_t l = 0; l < kLanes; ++l) sum[l] += R(to_float(x[i + l]));
  }
  for (int64_t l = 0; l < kLanes; ++l) sum[l] += tail[l];
  const R mean = sum_lanes(sum) / R(n);
  for (int64_t l = rest; l < kLanes; ++l) tail[l] = mean;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R d = R(to_float(x[i + l])) - mean;
      first[l] += d;
      second[l] += d * d;
    }
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    const R d = tail[l] - mean;
    first[l] += d;
    second[l] += d * d;
  }
  const double lost = double(sum_lanes(first)) / double(n);
  return {double(n), double(mean) + lost, double(sum_lanes(second)) - double(n) * lost * lost};
}

template <class T, class R>
PYLOSS_INLINE void affine_of(const T* x, int64_t n, const Coeffs<R>& c, R* out) {
  const R mean = c.mean, slope = c.slope, shift = c.shift;
  for (int64_t i = 0; i < n; ++i) out[i] = slope * (R(to_float(x[i])) - mean) + shift;
}

#define PYLOSS_MOMENT_LOOPS(T, R, VERSIONS)                                          \
  VERSIONS Part<double> block_moments(const T* x, int64_t n) {                       \
    return block_of(x, n, R(0));                                                     \
  }                                                                                  \
  VERSIONS void block_affine_of(const T* x, int64_t n, const Coeffs<R>& c, R* out) { \
    affine_of(x, n, c, out);                                                         \
  }
PYLOSS_MOMENT_LOOPS(float, float, PYLOSS_MULTIVERSION)
PYLOSS_MOMENT_LOOPS(BF16, float, PYLOSS_MULTIVERSION)
PYLOSS_MOMENT_LOOPS(F16, float, PYLOSS_MULTIVERSION)
PYLOSS_MOMENT_LOOPS(double, double, )
#undef PYLOSS_MOMENT_LOOPS

// One class of a tile, n rounded up to whole lanes.
template <class R>
struct Lines {
  R sum[kLanes], mean[kLanes], first[kLanes], second[kLanes];
};

// Blocks of `count` classes by kLanes positions: mean, and both sums around it.
template <class R>
PYLOSS_INLINE void lines_of(const R* z, int64_t count, Lines<R>* s) {
  for (int64_t l = 0; l < kLanes; ++l) s->sum[l] = s->first[l] = s->second[l] = 0;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t l = 0; l < kLanes; ++l) s->sum[l] += z[c * kLanes + l];
  }
  for (int64_t l = 0; l < kLanes; ++l) s->mean[l] = s->sum[l] / R(count);
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R d = z[c * kLanes + l] - s->mean[l];
      s->first[l] += d;
      s->second[l] += d * d;
    }
  }
}
PYLOSS_MULTIVERSION void line_moments(const float* z, int64_t count, Lines<float>* s) {
  lines_of(z, count, s);
}
void line_moments(const double* z, int64_t count, Lines<double>* s) {
  lines_of(z, count, s);
}

// out = slope (z - mean) + shift, each of a lane.
template <class R>
struct LaneCoeffs {
  R mean[kLanes], slope[kLanes], shift[kLanes];
};
template <class R>
PYLOSS_INLINE void line_affine_of(const R* z, const LaneCoeffs<R>& c, R* out) {
  for (int64_t l = 0; l < kLanes; ++l) out[l] = c.slope[l] * (z[l] - c.mean[l]) + c.shift[l];
}
PYLOSS_MULTIVERSION void line_gradient(const float* z, const LaneCoeffs<float>& c, float* out) {
  line_affine_of(z, c, out);
}
void line_gradient(const double* z, const LaneCoeffs<double>& c, double* out) {
  line_affine_of(z, c, out);
}

// ---- Rows --------------------------------------------------------------------------------------

template <class T>
void check_labels(const Problem& p) {
  for (int64_t row = 0; row < p.rows(); ++row) {
    const int64_t y = static_cast<const T*>(p.target)[row];
    if (!in_range(y, p.classes) && y != p.ignore_index) {
      throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds.");
    }
  }
}

void check_labels(const Problem& p) {
  switch (p.target_dtype) {
    case DType::kI64:
      return check_labels<int64_t>(p);
    case DType::kI32:
      return check_labels<int32_t>(p);
    default:
      return check_labels<uint8_t>(p);
  }
}

// The label, -1 for an ignored row.
int64_t label(const Problem& p, int64_t row) {
  const int64_t y = load_index(p.target, p.target_dtype, row);
  return y == p.ignore_index ? -1 : y;
}

bool contiguous(const Problem& p, const Strides& s) {
  return p.classes == 1 || s.cls == 1;
}

template <class T, class R>
void forward_rows(const Problem& p, void* moments, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = label(p, row);
    if (y < 0) {
      store<R>(moments, p.rows(), row, 0, 0, 0);
      continue;
    }
    const T* x = static_cast<const T*>(p.x) + offset_of(p.x_strides, p.inner, row);
    Part<double> all{};
    for (int64_t at = 0; at < p.classes; at += kBlock) {
      all = merge(all, block_moments(x + at, std::min(kBlock, p.classes - at)));
    }
    store<R>(moments, p.rows(), row, double(to_float(x[y])), all.mean, all.m2 / double(p.classes));
  }
}

template <class T, class R>
void backward_rows(const Problem& p, const Backward& b, bool stream, int64_t begin, int64_t end) {
  alignas(64) R v[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + offset_of(p.x_strides, p.inner, row);
    T* out = static_cast<T*>(b.out) + offset_of(b.out_strides, p.inner, row);
    const int64_t y = label(p, row);
    if (y < 0) {
      std::fill(out, out + p.classes, T{});
      continue;
    }
    const auto c = coeffs<R>(p, b, row);
    for (int64_t at = 0; at < p.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p.classes - at);
      prefetch(x + at + n, std::min(kBlock, p.classes - at - n) * int64_t(sizeof(T)));
      block_affine_of(x + at, n, c, v);
      if (y >= at && y < at + n) v[y - at] += c.target;
      store_block(v, n, p.dtype, out + at, stream);
    }
  }
  if (stream) stream_fence();
}

// ---- Tiles of positions ------------------------------------------------------------------------

// Tiles: kLanes positions of one outer index.
int64_t tiles_of(const Problem& p) {
  return (p.inner + kLanes - 1) / kLanes;
}

template <class T, class R>
void load_line(const T* x, DType t, int64_t step, int64_t n, R* z) {
  if (step == 1) {
    load_values(x, t, n, z);
  } else {
    line_gather(x, t, step, n, z);
  }
}

template <class T, class R>
void forward_tile(const Problem& p, void* moments, int64_t outer, int64_t begin) {
  alignas(64) R z[kTileClasses * kLanes];
  const int64_t n = std::min(kLanes, p.inner - begin), row = outer * p.inner + begin;
  const T* x = static_cast<const T*>(p.x) + outer * p.x_strides.outer + begin * p.x_strides.inner;
  std::fill(z, z + kTileClasses * kLanes, R(0));
  Part<double> all[kLanes] = {};
  Lines<R> s;
  for (int64_t at = 0; at < p.classes; at += kTileClasses) {
    const int64_t count = std::min(kTileClasses, p.classes - at);
    for (int64_t c = 0; c < count; ++c) {
      load_line(x + (at + c) * p.x_strides.cls, p.dtype, p.x_strides.inner, n, z + c * kLanes);
    }
    line_moments(z, count, &s);
    const double each = double(count);
    for (int64_t l = 0; l < n; ++l) {
      const double lost = double(s.first[l]) / each;
      all[l] = merge(all[l], Part<double>{each, double(s.mean[l]) + lost,
                                          double(s.second[l]) - each * lost * lost});
    }
  }
  for (int64_t l = 0; l < n; ++l) {
    const int64_t y = label(p, row + l);
    if (y < 0) {
      store<R>(moments, p.rows(), row + l, 0, 0, 0);
      continue;
    }
    const T x_t = x[y * p.x_strides.cls + l * p.x_strides.inner];
    store<R>(moments, p.rows(), row + l, double(to_float(x_t)), all[l].mean,
             all[l].m2 / double(p.classes));
  }
}

template <class T, class R>
void backward_tile(const Problem& p, const Backward& b, int64_t outer, int64_t begin) {
  const int64_t n = std::min(kLanes, p.inner - begin), row = outer * p.inner + begin;
  const Strides &s = p.x_strides, &o = b.out_strides;
  const T* x = static_cast<const T*>(p.x) + outer * s.outer + begin * s.inner;
  T* out = static_cast<T*>(b.out) + outer * o.outer + begin * o.inner;
  alignas(64) R z[kLanes] = {}, v[kLanes];
  LaneCoeffs<R> lanes = {};
  bool ignored = false;
  for (int64_t l = 0; l < n; ++l) {
    if (label(p, row + l) < 0) {
      ignored = true;
      continue;
    }
    const auto c = coeffs<R>(p, b, row + l);
    lanes.mean[l] = c.mean;
    lanes.slope[l] = c.slope;
    lanes.shift[l] = c.shift;
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    load_line(x + c * s.cls, p.dtype, s.inner, n, z);
    line_gradient(z, lanes, v);
    if (ignored) {  // where 0 times what is not finite must be 0
      for (int64_t l = 0; l < n; ++l) v[l] = label(p, row + l) < 0 ? R(0) : v[l];
    }
    T* to = out + c * o.cls;
    if (o.inner == 1) {
      store_block(v, n, p.dtype, to, false);
    } else {
      line_scatter(v, n, p.dtype, o.inner, to);
    }
  }
  for (int64_t l = 0; l < n; ++l) {
    const int64_t y = label(p, row + l);
    if (y < 0) continue;
    const auto c = coeffs<R>(p, b, row + l);
    const R x_t = R(to_float(x[y * s.cls + l * s.inner]));
    out[y * o.cls + l * o.inner] = FromFloat<T>::of(gradient(c, x_t) + c.target);
  }
}

// ---- A call ------------------------------------------------------------------------------------

// by_row(begin, end) or by_tile(outer, first position), over everything.
template <class ByRow, class ByTile>
void for_all(const Problem& p, bool rows, int threads, const ByRow& by_row, const ByTile& by_tile) {
  threads = useful_threads(p.rows() * p.classes, threads);
  if (rows) {
    parallel_for(p.rows(), rows_per_range(p.classes), threads, by_row);
    return;
  }
  const int64_t tiles = tiles_of(p);
  parallel_for(p.outer * tiles, rows_per_range(p.classes * kLanes), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) by_tile(i / tiles, i % tiles * kLanes);
               });
}

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace

void row_moments_forward(const Problem& p, void* moments, int threads) {
  check_labels(p);
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = RealOf<T>;
    for_all(
        p, contiguous(p, p.x_strides), threads,
        [&](int64_t begin, int64_t end) { forward_rows<T, R>(p, moments, begin, end); },
        [&](int64_t outer, int64_t begin) { forward_tile<T, R>(p, moments, outer, begin); });
  });
}

void row_moments_backward(const Problem& p, const Backward& b, int threads) {
  check_labels(p);
  const int64_t bytes = p.rows() * p.classes * dtype_size(p.dtype);
  advise_huge_pages(b.out, bytes);
  // Streaming pays when the output does not stay in the caches anyway.
  const bool stream = bytes > 4 * l2_cache_bytes();
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = RealOf<T>;
    for_all(
        p, contiguous(p, p.x_strides) && contiguous(p, b.out_strides), threads,
        [&](int64_t begin, int64_t end) { backward_rows<T, R>(p, b, stream, begin, end); },
        [&](int64_t outer, int64_t begin) { backward_tile<T, R>(p, b, outer, begin); });
  });
}

}  // namespace pyloss::cpu
