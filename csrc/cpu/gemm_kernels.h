// Packing, and products of packed operands, for one instruction set: per_instruction_set.h.
#include "cpu/gemm_tile.h"

template <class R>
constexpr int64_t kPanel = 2 * Vec<R>::kLanes;

// x becomes its transpose: x[i][j] was x[j][i]. Each step deals the rows of both halves out like
// cards.
template <class R>
PYLOSS_INLINE void transpose(typename Vec<R>::V (&x)[Vec<R>::kLanes]) {
  constexpr int kLanes = Vec<R>::kLanes, kHalf = kLanes / 2;
#if !PYLOSS_HAS_SHUFFLE
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const R y = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = y;
    }
  }
  (void)kHalf;
#else
  typename Vec<R>::I low, high;
  for (int i = 0; i < kHalf; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = kLanes + i;
    high[2 * i] = kHalf + i;
    high[2 * i + 1] = kLanes + kHalf + i;
  }
  PYLOSS_UNROLL(4)
  for (int step = 1; step < kLanes; step *= 2) {
    typename Vec<R>::V y[kLanes];
    PYLOSS_UNROLL(16)
    for (int i = 0; i < kHalf; ++i) {
      y[2 * i] = PYLOSS_SHUFFLE(x[i], x[i + kHalf], low);
      y[2 * i + 1] = PYLOSS_SHUFFLE(x[i], x[i + kHalf], high);
    }
    PYLOSS_UNROLL(16)
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
#endif
}

// to[j][i] = from[i][j] for n rows i, n <= kLanes, of which whole vectors are written: rows of `to`
// are written in order, so that what goes past one is mended by the next.
template <class R>
void pack_transposed(const R* from, int64_t from_stride, int64_t n, int64_t length, R* to,
                     int64_t to_stride) {
  constexpr int kLanes = Vec<R>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) {
    typename Vec<R>::V x[kLanes];
    if (n == kLanes) {
      PYLOSS_UNROLL(16)
      for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * from_stride + j);
    } else {
      PYLOSS_UNROLL(16)
      for (int i = 0; i < kLanes; ++i) {
        x[i] = i < n ? load(from + i * from_stride + j) : typename Vec<R>::V{};
      }
    }
    transpose<R>(x);
    PYLOSS_UNROLL(16)
    for (int i = 0; i < kLanes; ++i) store(to + (j + i) * to_stride, x[i]);
  }
  for (; j < length; ++j) {
    R* at = to + j * to_stride;
    for (int64_t i = 0; i < n; ++i) at[i] = from[i * from_stride + j];
    for (int64_t i = n; i < kLanes; ++i) at[i] = R(0);
  }
}

// The same from rows that lie as they shall: to[j][i] = from[j][i], n columns. The rows are often
// far apart, where no prefetcher follows: what the next strips read is asked for.
template <class R>
void pack_copied(const R* from, int64_t from_stride, int64_t n, int64_t length, R* to,
                 int64_t to_stride) {
  constexpr int64_t kAhead = 64;
  for (int64_t j = 0; j < length; ++j) {
    PYLOSS_PREFETCH(from + j * from_stride + kAhead);
    store(to + j * to_stride, load_part(from + j * from_stride, n));
  }
}

template <class R>
void pack_strip(const MatrixView<R>& x, int64_t first, int64_t n, R* to, int64_t to_stride) {
  // x is (length x n): what ends up in one vector of each row of the panel.
  const R* from = x.at(0, first);
  if (x.row_stride == 1) {
    pack_transposed(from, x.column_stride, n, x.rows, to, to_stride);
  } else if (x.column_stride == 1) {
    pack_copied(from, x.row_stride, n, x.rows, to, to_stride);
  } else {
    for (int64_t j = 0; j < x.rows; ++j) {
      for (int64_t i = 0; i < n; ++i) to[j * to_stride + i] = *x.at(j, first + i);
      for (int64_t i = n; i < Vec<R>::kLanes; ++i) to[j * to_stride + i] = R(0);
    }
  }
}

template <class R>
void pack_left_panels(const MatrixView<R>& a, R* to) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  const MatrixView<R> x = a.transposed();
  const int64_t tiles = blocks_of(a.rows, PYLOSS_TILE_ROWS);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r0 = a.rows * t / tiles, height = a.rows * (t + 1) / tiles - r0;
    R* panel = to + r0 * a.columns;
    // The last strip first: it writes past its rows, over what the first one writes then.
    for (int64_t r = (height - 1) / kLanes * kLanes; r >= 0; r -= kLanes) {
      pack_strip(x, r0 + r, std::min(height - r, kLanes), panel + r, height);
    }
  }
}

template <class R>
void pack_right_panels(const MatrixView<R>& b, R* to) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  for (int64_t n = 0; n < b.columns; n += kPanel<R>) {
    R* panel = to + n * b.rows;
    for (int64_t v = 0; v < kPanel<R>; v += kLanes) {
      const int64_t width = std::max<int64_t>(0, std::min(kLanes, b.columns - n - v));
      if (width == 0) {
        for (int64_t l = 0; l < b.rows; ++l) store(panel + l * kPanel<R> + v, typename Vec<R>::V{});
      } else {
        pack_strip(b, n + v, width, panel + v, kPanel<R>);
      }
    }
  }
}

template <class R, bool kTransposed>
RunTile<R> tile_of_size(int64_t rows, int vectors, bool add) {
  constexpr auto kAll = std::make_integer_sequence<int, 2 * PYLOSS_TILE_ROWS>{};
  return add ? tile_of<R, kTransposed, End::kAdd>(static_cast<int>(rows), vectors, kAll)
             : tile_of<R, kTransposed, End::kStore>(static_cast<int>(rows), vectors, kAll);
}

template <class R>
void product_of_panels(const Left<R>& a, const Right<R>& b, R* c, int64_t ldc, bool add) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  const int64_t tiles = blocks_of(a.rows, PYLOSS_TILE_ROWS);
  alignas(64) R edge[PYLOSS_TILE_ROWS * kPanel<R>];
  int64_t l = 0;
  do {
    const int64_t depth = std::min(kDepth, b.depth - l);
    for (int64_t n = 0; n < b.columns; n += kPanel<R>) {
      const int64_t width = std::min(kPanel<R>, b.columns - n);
      const int vectors = width > kLanes ? 2 : 1;
      const bool whole = width == vectors * kLanes;
      const R* panel = b.data + n * b.stride + l * kPanel<R>;
      for (int64_t t = 0; t < tiles; ++t) {  // equal heights: a short tile would wait for latencies
        const int64_t r0 = a.rows * t / tiles, height = a.rows * (t + 1) / tiles - r0;
        const R* left;
        int64_t stride = a.stride;
        if (a.form == Form::kPanels) {
          left = a.data + r0 * a.stride + l * height;
          stride = height;
        } else {
          left = a.form == Form::kRows ? a.data + r0 * stride + l : a.data + l * stride + r0;
        }
        R* to = c + r0 * ldc + n;
        const bool sum = add || l > 0;
        const auto run = a.form == Form::kRows
                             ? tile_of_size<R, false>(height, vectors, sum && whole)
                             : tile_of_size<R, true>(height, vectors, sum && whole);
        if (whole) {
          for (int64_t r = 0; r < height; ++r) {
            for (int v = 0; v < vectors; ++v) PYLOSS_PREFETCH_WRITE(to + r * ldc + v * kLanes);
          }
          run(left, stride, panel, kPanel<R>, to, ldc, depth, {});
          continue;
        }
        run(left, stride, panel, kPanel<R>, edge, kPanel<R>, depth, {});
        for (int64_t r = 0; r < height; ++r) {
          for (int64_t i = 0; i < width; ++i) {
            const R x = edge[r * kPanel<R> + i];
            to[r * ldc + i] = sum ? to[r * ldc + i] + x : x;
          }
        }
      }
    }
    l += kDepth;
  } while (l < b.depth);
}

// `steps` fused multiply-adds on each of so many vectors that none waits for its predecessor, from
// and to two vectors of numbers. Returns how many multiplications and additions that were.
template <class R>
int64_t multiply_adds(int64_t steps, R* numbers) {
  constexpr int kChains = PYLOSS_VECTOR_BYTES == 64 ? 24 : 12;
  constexpr int kLanes = Vec<R>::kLanes;
  const typename Vec<R>::V factor = load(numbers), term = load(numbers + kLanes);
  typename Vec<R>::V x[kChains];
  PYLOSS_UNROLL(24)
  for (int i = 0; i < kChains; ++i) x[i] = factor * R(i);  // equal ones would be computed once
  PYLOSS_UNROLL(1)
  for (int64_t step = 0; step < steps; ++step) {
    PYLOSS_UNROLL(24)
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + term;
  }
  typename Vec<R>::V sum{};
  PYLOSS_UNROLL(24)
  for (int i = 0; i < kChains; ++i) sum += x[i] * R(1.0 / (2 * kChains));
  store(numbers, sum);
  return 2 * steps * kChains * kLanes;
}

template <class R>
Kernels<R> kernels_of() {
  return {PYLOSS_TILE_ROWS,     kPanel<R>,       pack_left_panels<R>, pack_right_panels<R>,
          product_of_panels<R>, multiply_adds<R>};
}
