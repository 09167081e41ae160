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

#include "common/compiler.h"
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

// What a row is summed to: differences d_j = e_y - e_j, and their squares.
struct Sums {
  double squares = 0, total = 0;
};

template <class R>
PYLOSS_INLINE double folded(R* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return double(lanes[0]);
}

// Of n <= kBlock columns.
template <class T, class R>
PYLOSS_INLINE Sums sums_of(const T* x, const T* a, int64_t n, R ey) {
  Sums sums;
  int64_t i = 0;
  if (n >= kLanes) {
    R squares[kLanes] = {}, total[kLanes] = {};
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const R d = ey - (to_float(a[i + l]) - to_float(x[i + l]));
        squares[l] += d * d;
        total[l] += d;
      }
    }
    sums = {folded(squares), folded(total)};
  }
  R squares = 0, total = 0;
  for (; i < n; ++i) {
    const R d = ey - (to_float(a[i]) - to_float(x[i]));
    squares += d * d;
    total += d;
  }
  return {sums.squares + double(squares), sums.total + double(total)};
}

// c (e_j - e_y) and its negative; null where one is not wanted.
template <class T, class R>
PYLOSS_INLINE void slopes_of(const T* x, const T* a, int64_t n, R ey, R c, T* dx, T* da) {
  const auto slope = [&](int64_t i) { return c * ((to_float(a[i]) - to_float(x[i])) - ey); };
  if (dx && da) {
    for (int64_t i = 0; i < n; ++i) {
      const R v = slope(i);
      da[i] = FromFloat<T>::of(v);
      dx[i] = FromFloat<T>::of(-v);
    }
  } else if (da) {
    for (int64_t i = 0; i < n; ++i) da[i] = FromFloat<T>::of(slope(i));
  } else {
    for (int64_t i = 0; i < n; ++i) dx[i] = FromFloat<T>::of(-slope(i));
  }
}

// Clones are made of functions, not of templates. Outputs never overlap what is read.
#define PYLOSS_FOR(T, R)                                                                         \
  PYLOSS_MULTIVERSION Sums sums(const T* x, const T* a, int64_t n, R ey) {                       \
    return sums_of(x, a, n, ey);                                                                 \
  }                                                                                              \
  PYLOSS_MULTIVERSION void slopes(const T* __restrict x, const T* __restrict a, int64_t n, R ey, \
                                  R c, T* __restrict dx, T* __restrict da) {                     \
    slopes_of(x, a, n, ey, c, dx, da);                                                           \
  }
PYLOSS_FOR(float, float)
PYLOSS_FOR(BF16, float)
PYLOSS_FOR(F16, float)
PYLOSS_FOR(double, double)
#undef PYLOSS_FOR

// The address of a row's first class.
template <class T, class V>
T* row_of(V* base, const Problem& p, const Strides& s, int64_t row) {
  T* first = static_cast<T*>(base);
  if (p.outer == 1) return first + row * s.inner;  // a division costs as much as a short row
  if (p.inner == 1) return first + row * s.outer;
  return first + row / p.inner * s.outer + row % p.inner * s.inner;
}

template <class T>
RealOf<T> moved(const T* x, const T* a) {
  return to_float(*a) - to_float(*x);
}

template <class T>
void forward_row(const Problem& p, int64_t row, RealOf<T>* shift, RealOf<T>* total) {
  using R = RealOf<T>;
  const int64_t y = margin_shift::label_of(p, row);
  if (y < 0) {
    shift[row] = total[row] = margin_shift::unlabelled<R>(y);
    return;
  }
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  const R ey = moved(x + y, a + y);
  Sums found;
  for (int64_t c = 0; c < p.classes; c += kBlock) {
    const Sums part = sums(x + c, a + c, std::min(kBlock, p.classes - c), ey);
    found = {found.squares + part.squares, found.total + part.total};
  }
  shift[row] = margin_shift::result_of(p, R(found.squares));
  total[row] = R(found.total);
}

template <class T>
void fill_row(T* out, int64_t step, int64_t n, RealOf<T> value) {
  for (int64_t c = 0; out && c < n; ++c) out[c * step] = FromFloat<T>::of(value);
}

// `blocks`, 2 kBlock elements, where results go past the cache; else null.
template <class T>
void backward_row(const Problem& p, const Backward& b, int64_t row, T* blocks) {
  using R = RealOf<T>;
  T* dx = b.dx ? row_of<T>(b.dx, p, b.dx_strides, row) : nullptr;
  T* da = b.dadv ? row_of<T>(b.dadv, p, b.dadv_strides, row) : nullptr;
  const int64_t y = margin_shift::label_of(p, row);
  if (y < 0) {
    fill_row(dx, 1, p.classes, margin_shift::unlabelled<R>(y));
    fill_row(da, 1, p.classes, margin_shift::unlabelled<R>(y));
    return;
  }
  const T* x = row_of<const T>(p.x, p, p.x_strides, row);
  const T* a = row_of<const T>(p.adv, p, p.adv_strides, row);
  const R ey = moved(x + y, a + y);
  const R c = margin_shift::factor_of<R>(p, b, row);
  const R label = c * static_cast<const R*>(b.total)[row];
  for (int64_t begin = 0; begin < p.classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, p.classes - begin);
    T* dx_part = !dx ? nullptr : blocks ? blocks : dx + begin;
    T* da_part = !da ? nullptr : blocks ? blocks + kBlock : da + begin;
    slopes(x + begin, a + begin, n, ey, c, dx_part, da_part);
    if (y >= begin && y < begin + n) {
      if (da) da_part[y - begin] = FromFloat<T>::of(label);
      if (dx) dx_part[y - begin] = FromFloat<T>::of(-label);
    }
    if (!blocks) continue;
    if (da) stream_copy(da + begin, da_part, n * int64_t(sizeof(T)));
    if (dx) stream_copy(dx + begin, dx_part, n * int64_t(sizeof(T)));
  }
}

// ---- Classes that lie apart --------------------------------------------------------------------

constexpr int64_t kTile = 256;
constexpr int64_t kFold = 64;

template <class R>
struct Tile {
  alignas(64) R ey[kTile], c[kTile];
  alignas(64) R squares[kTile], total[kTile];  // of the last classes
  Sums sums[kTile];                            // of those before
  int64_t y[kTile];

  void fold(int64_t n) {
    for (int64_t l = 0; l < n; ++l) {
      sums[l].squares += double(squares[l]);
      sums[l].total += double(total[l]);
      squares[l] = total[l] = 0;
    }
  }
};

// One class of n positions.
template <class T, class R>
PYLOSS_INLINE void sum_line_of(const T* x, int64_t x_step, const T* a, int64_t a_step, int64_t n,
                               const R* ey, R* squares, R* total) {
  for (int64_t l = 0; l < n; ++l) {
    const R d = ey[l] - (to_float(a[l * a_step]) - to_float(x[l * x_step]));
    squares[l] += d * d;
    total[l] += d;
  }
}
template <class T, class R>
PYLOSS_INLINE void slope_line_of(const T* x, int64_t x_step, const T* a, int64_t a_step, int64_t n,
                                 const R* ey, const R* c, R* out) {
  for (int64_t l = 0; l < n; ++l) {
    out[l] = c[l] * ((to_float(a[l * a_step]) - to_float(x[l * x_step])) - ey[l]);
  }
}
template <class T, class R>
PYLOSS_INLINE void put_line_of(T* out, int64_t step, int64_t n, const R* value, R sign) {
  for (int64_t l = 0; l < n; ++l) out[l * step] = FromFloat<T>::of(sign * value[l]);
}
// Steps of 1 are a loop of their own, which vectorises.
#define PYLOSS_FOR(T, R)                                                                        \
  PYLOSS_MULTIVERSION void sum_line(const T* x, int64_t x_step, const T* a, int64_t a_step,     \
                                    int64_t n, const R* ey, R* squares, R* total) {             \
    if (x_step == 1 && a_step == 1) return sum_line_of(x, 1, a, 1, n, ey, squares, total);      \
    sum_line_of(x, x_step, a, a_step, n, ey, squares, total);                                   \
  }                                                                                             \
  PYLOSS_MULTIVERSION void slope_line(const T* x, int64_t x_step, const T* a, int64_t a_step,   \
                                      int64_t n, const R* ey, const R* c, R* __restrict out) {  \
    if (x_step == 1 && a_step == 1) return slope_line_of(x, 1, a, 1, n, ey, c, out);            \
    slope_line_of(x, x_step, a, a_step, n, ey, c, out);                                         \
  }                                                                                             \
  PYLOSS_MULTIVERSION void put_line(T* __restrict out, int64_t step, int64_t n, const R* value, \
                                    R sign) {                                                   \
    if (step == 1) return put_line_of(out, 1, n, value, sign);                                  \
    put_line_of(out, step, n, value, sign);                                                     \
  }
PYLOSS_FOR(float, float)
PYLOSS_FOR(BF16, float)
PYLOSS_FOR(F16, float)
PYLOSS_FOR(double, double)
#undef PYLOSS_FOR

// A tile of n positions from `row` on, all of one outer index.
template <class T>
class TileWalk {
 public:
  using R = RealOf<T>;

  TileWalk(const Problem& p, int64_t row, int64_t n, Tile<R>* t)
      : p_(p),
        t_(*t),
        row_(row),
        n_(n),
        x_(row_of<const T>(p.x, p, p.x_strides, row)),
        a_(row_of<const T>(p.adv, p, p.adv_strides, row)) {
    for (int64_t l = 0; l < n; ++l) {
      const int64_t y = t_.y[l] = margin_shift::label_of(p, row + l), at = std::max<int64_t>(y, 0);
      t_.ey[l] = moved(x_ + at * p.x_strides.cls + l * p.x_strides.inner,
                       a_ + at * p.adv_strides.cls + l * p.adv_strides.inner);
    }
  }

  void forward(R* shift, R* total) {
    for (int64_t l = 0; l < n_; ++l) {
      t_.squares[l] = t_.total[l] = 0;
      t_.sums[l] = {};
    }
    for (int64_t c = 0; c < p_.classes; ++c) {
      sum_line(x_ + c * p_.x_strides.cls, p_.x_strides.inner, a_ + c * p_.adv_strides.cls,
               p_.adv_strides.inner, n_, t_.ey, t_.squares, t_.total);
      if (c % kFold == kFold - 1) t_.fold(n_);
    }
    t_.fold(n_);
    for (int64_t l = 0; l < n_; ++l) {
      const bool labelled = t_.y[l] >= 0;
      const R other = margin_shift::unlabelled<R>(t_.y[l]);
      shift[row_ + l] = labelled ? margin_shift::result_of(p_, R(t_.sums[l].squares)) : other;
      total[row_ + l] = labelled ? R(t_.sums[l].total) : other;
    }
  }

  void backward(const Backward& b) {
    for (int64_t l = 0; l < n_; ++l) t_.c[l] = margin_shift::factor_of<R>(p_, b, row_ + l);
    T* dx = b.dx ? row_of<T>(b.dx, p_, b.dx_strides, row_) : nullptr;
    T* da = b.dadv ? row_of<T>(b.dadv, p_, b.dadv_strides, row_) : nullptr;
    R* out = t_.squares;
    for (int64_t c = 0; c < p_.classes; ++c) {
      slope_line(x_ + c * p_.x_strides.cls, p_.x_strides.inner, a_ + c * p_.adv_strides.cls,
                 p_.adv_strides.inner, n_, t_.ey, t_.c, out);
      if (da) put_line(da + c * b.dadv_strides.cls, b.dadv_strides.inner, n_, out, R(1));
      if (dx) put_line(dx + c * b.dx_strides.cls, b.dx_strides.inner, n_, out, R(-1));
    }
    const R* total = static_cast<const R*>(b.total);
    for (int64_t l = 0; l < n_; ++l) {
      finish(dx, b.dx_strides, l, -t_.c[l] * total[row_ + l]);
      finish(da, b.dadv_strides, l, t_.c[l] * total[row_ + l]);
    }
  }

 private:
  // The label's entry of position l, or all of a row that has no label.
  void finish(T* out, const Strides& s, int64_t l, R label) {
    if (!out) return;
    out += l * s.inner;
    const int64_t y = t_.y[l];
    if (y >= 0) {
      out[y * s.cls] = FromFloat<T>::of(label);
    } else {
      fill_row(out, s.cls, p_.classes, margin_shift::unlabelled<R>(y));
    }
  }

  const Problem& p_;
  Tile<R>& t_;
  int64_t row_, n_;
  const T *x_, *a_;
};

// Shorter rows leave too many broken lines at their ends.
constexpr int64_t kStreamedRowBytes = 2048;

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

void margin_shift_forward(const Problem& p, void* shift, void* total, int threads) {
  check_labels(p);
  if (p.rows() == 0 || p.classes == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = RealOf<T>;
    R* shifts = static_cast<R*>(shift);
    R* totals = static_cast<R*>(total);
    if (neighbours(p, nullptr)) {
      return for_rows(p, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) forward_row<T>(p, row, shifts, totals);
      });
    }
    for_tiles(p, threads, [&](int64_t row, int64_t n) {
      Tile<R> tile;
      TileWalk<T>(p, row, n, &tile).forward(shifts, totals);
    });
  });
}

void margin_shift_backward(const Problem& p, const Backward& b, int threads) {
  if (p.rows() == 0 || p.classes == 0) return;
  const int64_t row_bytes = p.classes * dtype_size(p.dtype), bytes = p.rows() * row_bytes;
  // Dense in some order: what torch has just allocated.
  if (b.dx) advise_huge_pages(b.dx, bytes);
  if (b.dadv) advise_huge_pages(b.dadv, bytes);
  const bool stream = row_bytes >= kStreamedRowBytes && bytes > 4 * l2_cache_bytes();
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    using R = RealOf<T>;
    if (neighbours(p, &b)) {
      return for_rows(p, threads, [&](int64_t begin, int64_t end) {
        alignas(64) T blocks[2 * kBlock];
        for (int64_t row = begin; row < end; ++row) {
          backward_row<T>(p, b, row, stream ? blocks : nullptr);
        }
        if (stream) stream_fence();
      });
    }
    for_tiles(p, threads, [&](int64_t row, int64_t n) {
      Tile<R> tile;
      TileWalk<T>(p, row, n, &tile).backward(b);
    });
  });
}

}  // namespace pyloss::cpu
