// How far margins moved between two sets of logits, on the CPU. Formulas: common/margin_shift.h.
//
// Decomposition: where classes are neighbours, a range of rows per task and a block of columns at a
// time; else a tile of up to kTile neighbouring positions, one SIMD lane each, walks down the
// classes. Neither depends on the number of threads.
//
// Memory traffic per class, b bytes a logit: forward reads 2 b; backward reads 2 b and writes 2 b,
// or b where one gradient alone is wanted.
//
// Numerics: float (double for doubles), kLanes partial sums, folded into double after each block.
#include "cpu/margin_shift.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/multiversion.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"

namespace pyloss::cpu {
namespace {

using margin_shift::Backward;
using margin_shift::Problem;

template <class T>
using RealOf = decltype(to_float(T{}));

// ---- Rows whose classes are neighbours ---------------------------------------------------------

template <class R>
PYLOSS_INLINE double folded(const R* lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += double(lanes[l]);
  return sum;
}

// sum (ey - (a - x))^2 of n <= kBlock columns.
template <class T, class R>
PYLOSS_INLINE double squares_of(const T* x, const T* a, int64_t n, R ey) {
  R lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R d = ey - (to_float(a[i + l]) - to_float(x[i + l]));
      lanes[l] += d * d;
    }
  }
  for (int64_t l = 0; i + l < n; ++l) {
    const R d = ey - (to_float(a[i + l]) - to_float(x[i + l]));
    lanes[l] += d * d;
  }
  return folded(lanes);
}

// out = c ((a - x) - ey); returns the sum of the differences without c.
template <class T, class R>
PYLOSS_INLINE double slopes_of(const T* x, const T* a, int64_t n, R ey, R c, R* out) {
  R lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const R d = (to_float(a[i + l]) - to_float(x[i + l])) - ey;
      lanes[l] += d;
      out[i + l] = c * d;
    }
  }
  for (int64_t l = 0; i + l < n; ++l) {
    const R d = (to_float(a[i + l]) - to_float(x[i + l])) - ey;
    lanes[l] += d;
    out[i + l] = c * d;
  }
  return folded(lanes);
}

template <class R>
PYLOSS_INLINE void negated_of(R* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = -out[i];
}

// Clones are made of functions, not of templates.
#define PYLOSS_FOR(T, R)                                                                    \
  PYLOSS_MULTIVERSION double squares(const T* x, const T* a, int64_t n, R ey) {             \
    return squares_of(x, a, n, ey);                                                         \
  }                                                                                         \
  PYLOSS_MULTIVERSION double slopes(const T* x, const T* a, int64_t n, R ey, R c, R* out) { \
    return slopes_of(x, a, n, ey, c, out);                                                  \
  }
PYLOSS_FOR(float, float)
PYLOSS_FOR(BF16, float)
PYLOSS_FOR(F16, float)
PYLOSS_FOR(double, double)
#undef PYLOSS_FOR
PYLOSS_MULTIVERSION void negate(float* out, int64_t n) {
  negated_of(out, n);
}
PYLOSS_MULTIVERSION void negate(double* out, int64_t n) {
  negated_of(out, n);
}

// The address of a row's first class.
template <class T, class V>
T* row_of(V* base, const Problem& p, const Strides& s, int64_t row) {
  return reinterpret_cast<T*>(element(base, p.dtype, s, p.inner, row, 0));
}

template <class T>
RealOf<T> moved(const T* x, const T* a) {
  return to_float(*a) - to_float(*x);
}

template <class T>
void forward_row(const Problem& p, int64_t row, RealOf<T>* shift) {
  using R = RealOf<T>;
  const int64_t y = margin_shift::label_of(p, row);
  if (y < 0) {
    shift[row] = y == margin_shift::kIgnored ? R(0) : nan_<R>();
    return;
  }
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  const R ey = moved(x + y, a + y);
  double sum = 0;
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    sum += squares(x + c, a + c, std::min(kBlock, p.classes - c), ey);
  }
  shift[row] = margin_shift::result_of(p, R(sum));
}

template <class T>
void fill_row(T* out, int64_t step, int64_t n, RealOf<T> value) {
  for (int64_t c = 0; out && c < n; ++c) out[c * step] = FromFloat<T>::of(value);
}

template <class T>
void backward_row(const Problem& p, const Backward& b, int64_t row, bool stream, RealOf<T>* block) {
  using R = RealOf<T>;
  T* dx = b.dx ? row_of<T>(b.dx, p, b.dx_strides, row) : nullptr;
  T* da = b.dadv ? row_of<T>(b.dadv, p, b.dadv_strides, row) : nullptr;
  const int64_t y = margin_shift::label_of(p, row);
  if (y < 0) {
    const R value = y == margin_shift::kIgnored ? R(0) : nan_<R>();
    fill_row(dx, 1, p.classes, value);
    fill_row(da, 1, p.classes, value);
    return;
  }
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  const R ey = moved(x + y, a + y);
  const R c = margin_shift::factor_of(p, static_cast<const R*>(b.g)[row],
                                      static_cast<const R*>(b.shift)[row]);
  double sum = 0;
  for (int64_t begin = 0; begin < p.classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, p.classes - begin);
    sum += slopes(x + begin, a + begin, n, ey, c, block);
    if (da) store_block(block, n, p.dtype, da + begin, stream);
    if (dx) {
      negate(block, n);
      store_block(block, n, p.dtype, dx + begin, stream);
    }
  }
  if (stream) stream_fence();  // the label's entry is written twice
  const R label = -c * R(sum);
  if (da) da[y] = FromFloat<T>::of(label);
  if (dx) dx[y] = FromFloat<T>::of(-label);
}

// ---- Classes that lie apart --------------------------------------------------------------------

constexpr int64_t kTile = 256;
constexpr int64_t kFold = 64;

template <class R>
struct Tile {
  alignas(64) R ey[kTile], c[kTile], part[kTile];
  alignas(64) double total[kTile];
  int64_t y[kTile];

  void fold(int64_t n) {
    for (int64_t l = 0; l < n; ++l) {
      total[l] += double(part[l]);
      part[l] = 0;
    }
  }
};

// One class of n positions that lie `step` elements apart; a step of 1 is a loop of its own.
template <class T, class R>
PYLOSS_INLINE void square_line_of(const T* x, int64_t x_step, const T* a, int64_t a_step, int64_t n,
                                  const R* ey, R* part) {
  for (int64_t l = 0; l < n; ++l) {
    const R d = ey[l] - (to_float(a[l * a_step]) - to_float(x[l * x_step]));
    part[l] += d * d;
  }
}
template <class T, class R>
PYLOSS_INLINE void slope_line_of(const T* x, int64_t x_step, const T* a, int64_t a_step, int64_t n,
                                 const R* ey, const R* c, R* part, R* out) {
  for (int64_t l = 0; l < n; ++l) {
    const R d = (to_float(a[l * a_step]) - to_float(x[l * x_step])) - ey[l];
    part[l] += d;
    out[l] = c[l] * d;
  }
}
#define PYLOSS_FOR(T, R)                                                                       \
  PYLOSS_MULTIVERSION void square_line(const T* x, int64_t x_step, const T* a, int64_t a_step, \
                                       int64_t n, const R* ey, R* part) {                      \
    if (x_step == 1 && a_step == 1) return square_line_of(x, 1, a, 1, n, ey, part);            \
    square_line_of(x, x_step, a, a_step, n, ey, part);                                         \
  }                                                                                            \
  PYLOSS_MULTIVERSION void slope_line(const T* x, int64_t x_step, const T* a, int64_t a_step,  \
                                      int64_t n, const R* ey, const R* c, R* part, R* out) {   \
    if (x_step == 1 && a_step == 1) return slope_line_of(x, 1, a, 1, n, ey, c, part, out);     \
    slope_line_of(x, x_step, a, a_step, n, ey, c, part, out);                                  \
  }
PYLOSS_FOR(float, float)
PYLOSS_FOR(BF16, float)
PYLOSS_FOR(F16, float)
PYLOSS_FOR(double, double)
#undef PYLOSS_FOR

// Labels and e_y of n positions from `row` on, all of one outer index.
template <class T>
void begin_tile(const Problem& p, int64_t row, int64_t n, const T* x, const T* a,
                Tile<RealOf<T>>* t) {
  for (int64_t l = 0; l < n; ++l) {
    const int64_t y = t->y[l] = margin_shift::label_of(p, row + l), at = std::max<int64_t>(y, 0);
    t->ey[l] = moved(x + at * p.x_strides.cls + l * p.x_strides.inner,
                     a + at * p.adv_strides.cls + l * p.adv_strides.inner);
    t->part[l] = 0;
    t->total[l] = 0;
  }
}

template <class T>
void forward_tile(const Problem& p, int64_t row, int64_t n, Tile<RealOf<T>>* t, RealOf<T>* shift) {
  using R = RealOf<T>;
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  begin_tile(p, row, n, x, a, t);
  for (int64_t c = 0; c < p.classes; ++c) {
    square_line(x + c * p.x_strides.cls, p.x_strides.inner, a + c * p.adv_strides.cls,
                p.adv_strides.inner, n, t->ey, t->part);
    if (c % kFold == kFold - 1) t->fold(n);
  }
  t->fold(n);
  for (int64_t l = 0; l < n; ++l) {
    const R found = margin_shift::result_of(p, R(t->total[l]));
    shift[row + l] = t->y[l] >= 0 ? found : t->y[l] == margin_shift::kIgnored ? R(0) : nan_<R>();
  }
}

template <class T>
void put_line(T* out, int64_t step, int64_t n, const RealOf<T>* value, RealOf<T> sign) {
  for (int64_t l = 0; l < n; ++l) out[l * step] = FromFloat<T>::of(sign * value[l]);
}

template <class T>
void backward_tile(const Problem& p, const Backward& b, int64_t row, int64_t n,
                   Tile<RealOf<T>>* t) {
  using R = RealOf<T>;
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  T* dx = b.dx ? row_of<T>(b.dx, p, b.dx_strides, row) : nullptr;
  T* da = b.dadv ? row_of<T>(b.dadv, p, b.dadv_strides, row) : nullptr;
  begin_tile(p, row, n, x, a, t);
  for (int64_t l = 0; l < n; ++l) {
    t->c[l] = margin_shift::factor_of(p, static_cast<const R*>(b.g)[row + l],
                                      static_cast<const R*>(b.shift)[row + l]);
  }
  alignas(64) R out[kTile];
  for (int64_t c = 0; c < p.classes; ++c) {
    slope_line(x + c * p.x_strides.cls, p.x_strides.inner, a + c * p.adv_strides.cls,
               p.adv_strides.inner, n, t->ey, t->c, t->part, out);
    if (da) put_line(da + c * b.dadv_strides.cls, b.dadv_strides.inner, n, out, R(1));
    if (dx) put_line(dx + c * b.dx_strides.cls, b.dx_strides.inner, n, out, R(-1));
    if (c % kFold == kFold - 1) t->fold(n);
  }
  t->fold(n);
  for (int64_t l = 0; l < n; ++l) {
    T* dx_row = dx ? dx + l * b.dx_strides.inner : nullptr;
    T* da_row = da ? da + l * b.dadv_strides.inner : nullptr;
    const int64_t y = t->y[l];
    if (y < 0) {
      const R value = y == margin_shift::kIgnored ? R(0) : nan_<R>();
      fill_row(dx_row, b.dx_strides.cls, p.classes, value);
      fill_row(da_row, b.dadv_strides.cls, p.classes, value);
      continue;
    }
    const R label = -t->c[l] * R(t->total[l]);
    if (da_row) da_row[y * b.dadv_strides.cls] = FromFloat<T>::of(label);
    if (dx_row) dx_row[y * b.dx_strides.cls] = FromFloat<T>::of(-label);
  }
}

// ---- Calls -------------------------------------------------------------------------------------

bool neighbours(const Problem& p, const Backward* b) {
  return p.x_strides.cls == 1 && p.adv_strides.cls == 1 &&
         (!b || ((!b->dx || b->dx_strides.cls == 1) && (!b->dadv || b->dadv_strides.cls == 1)));
}

// fn(row, n) on tiles of up to kTile positions of one outer index, with the thread's scratch.
template <class Fn>
void for_tiles(const Problem& p, int threads, const Fn& fn) {
  const int64_t per_outer = (p.inner + kTile - 1) / kTile;
  parallel_for(p.outer * per_outer, rows_per_range(p.classes * std::min(p.inner, kTile)),
               useful_threads(p.rows() * p.classes, threads), [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % per_outer * kTile;
                   fn(i / per_outer * p.inner + first, std::min(kTile, p.inner - first));
                 }
               });
}

template <class Fn>
void for_rows(const Problem& p, int threads, const Fn& fn) {
  parallel_for(p.rows(), rows_per_range(p.classes), useful_threads(p.rows() * p.classes, threads),
               fn);
}

void check_labels(const Problem& p) {
  for (int64_t row = 0; row < p.rows(); ++row) {
    if (margin_shift::label_of(p, row) == margin_shift::kOutOfRange) {
      const int64_t y = load_index(p.target, p.target_dtype, row);
      throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds.");
    }
  }
}

}  // namespace

void margin_shift_forward(const Problem& p, void* shift, int threads) {
  check_labels(p);
  if (p.rows() == 0 || p.classes == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = RealOf<T>;
    R* out = static_cast<R*>(shift);
    if (neighbours(p, nullptr)) {
      return for_rows(p, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) forward_row<T>(p, row, out);
      });
    }
    for_tiles(p, threads, [&](int64_t row, int64_t n) {
      Tile<R> tile;
      forward_tile<T>(p, row, n, &tile, out);
    });
  });
}

void margin_shift_backward(const Problem& p, const Backward& b, int threads) {
  if (p.rows() == 0 || p.classes == 0) return;
  const int64_t bytes = p.rows() * p.classes * dtype_size(p.dtype);
  // Dense in some order: what torch has just allocated.
  if (b.dx) advise_huge_pages(b.dx, bytes);
  if (b.dadv) advise_huge_pages(b.dadv, bytes);
  const bool stream = bytes > 4 * l2_cache_bytes();
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = RealOf<T>;
    if (neighbours(p, &b)) {
      return for_rows(p, threads, [&](int64_t begin, int64_t end) {
        alignas(64) R block[kBlock];
        for (int64_t row = begin; row < end; ++row) backward_row<T>(p, b, row, stream, block);
        if (stream) stream_fence();
      });
    }
    for_tiles(p, threads, [&](int64_t row, int64_t n) {
      Tile<R> tile;
      backward_tile<T>(p, b, row, n, &tile);
    });
  });
}

}  // namespace pyloss::cpu
