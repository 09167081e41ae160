// Small matrix products and exponentials on the compiler's vector types, for one instruction set.
//
// No include guard: tensor_attention.cpp includes this file once per instruction set, inside a
// namespace and a `#pragma GCC target` region, with PYLOSS_VECTOR_BYTES and PYLOSS_TILE_ROWS set.
// (target_clones would lower the vector types before the clones exist.)

template <class R>
struct Vec;
template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(PYLOSS_VECTOR_BYTES)));
  typedef uint32_t I __attribute__((vector_size(PYLOSS_VECTOR_BYTES)));
  typedef float Loose __attribute__((vector_size(PYLOSS_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int kLanes = PYLOSS_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(PYLOSS_VECTOR_BYTES)));
  typedef uint64_t I __attribute__((vector_size(PYLOSS_VECTOR_BYTES)));
  typedef double Loose __attribute__((vector_size(PYLOSS_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int kLanes = PYLOSS_VECTOR_BYTES / 8;
};

template <class R>
PYLOSS_INLINE typename Vec<R>::V load(const R* p) {
  return *reinterpret_cast<const typename Vec<R>::Loose*>(p);
}
template <class R>
PYLOSS_INLINE void store(R* p, typename Vec<R>::V v) {
  *reinterpret_cast<typename Vec<R>::Loose*>(p) = v;
}
// The first n lanes from memory, the others zero: nothing past the end of a user's row is read.
template <class R>
PYLOSS_INLINE typename Vec<R>::V load_part(const R* p, int64_t n) {
  if (n >= Vec<R>::kLanes) return load(p);
  typename Vec<R>::V v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
// True in the first n lanes.
template <class R>
PYLOSS_INLINE auto first_lanes(int64_t n) {
  typename Vec<R>::I lane;
  for (int i = 0; i < Vec<R>::kLanes; ++i) lane[i] = i;
  return lane < typename Vec<R>::I{} + static_cast<std::decay_t<decltype(lane[0])>>(n);
}
template <class R>
PYLOSS_INLINE R lane_sum(typename Vec<R>::V v) {
  R s = 0;
  for (int i = 0; i < Vec<R>::kLanes; ++i) s += v[i];
  return s;
}

// exp for x <= 88, as exp_lane of cpu/lanes.h.
PYLOSS_INLINE Vec<float>::V exp_of(Vec<float>::V x) {
  using namespace exp_poly;
  using V = Vec<float>::V;
  const float kRound = 12582912.0f + 127.0f;
  const V t = x * kLog2e + kRound;
  const V n = t - kRound;
  const V two_n = reinterpret_cast<V>(reinterpret_cast<Vec<float>::I>(t) << 23);
  const V r = (x - n * kLn2Hi) - n * kLn2Lo;
  const V tail = 1.0f + r * (kC2 + r * (kC3 + r * (kC4 + r * (kC5 + r * kC6))));
  const V y = (1.0f + r * tail) * two_n;
  return x < V{} + kMin ? V{} : y;
}
PYLOSS_INLINE Vec<double>::V exp_of(Vec<double>::V x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x[i] = ::exp(x[i]);
  return x;
}

// As tanh_lane of cpu/lanes.h.
PYLOSS_INLINE Vec<float>::V tanh_of(Vec<float>::V x) {
  using namespace tanh_ratio;
  using V = Vec<float>::V;
  const V most = V{} + kMax, one = V{} + 1.0f;
  V c = x > most ? most : x;
  c = c < -most ? -most : c;
  const V s = c * c;
  const V p = kP0 + s * (kP1 + s * (kP2 + s * (kP3 + s * kP4)));
  const V q = 1.0f + s * (kQ1 + s * (kQ2 + s * (kQ3 + s * kQ4)));
  const V y = c * p / q;
  return y > one ? one : (y < -one ? -one : y);
}
PYLOSS_INLINE Vec<double>::V tanh_of(Vec<double>::V x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// What happens to the finished tile: c = tile; c += tile; c[n] += sum_r tile[r][n] w[r][n]; or
// c += tile factor[n] and own[n] += sum_r tile[r][n] w[r][n].
enum class End { kStore, kAdd, kWeigh, kSpread };

template <class R>
struct Extra {
  const R *w = nullptr, *factor = nullptr;  // w has the row stride of c
  R* own = nullptr;
};

// A tile of kRows x (kVectors whole vectors) in registers over k steps. `a` is (rows x k) with row
// stride lda, or, transposed, (k x rows).
template <class R, int kRows, int kVectors, bool kTransposed, End kEnd>
void tile(const R* a, int64_t lda, const R* b, int64_t ldb, R* c, int64_t ldc, int64_t k,
          const Extra<R>& extra) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V{};
#pragma GCC unroll 1
  for (int64_t l = 0; l < k; ++l) {
    V row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + l * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const R x = kTransposed ? a[l * lda + r] : a[r * lda + l];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    R* at = c + v * kLanes;
    V total{}, factor{};
    if (kEnd == End::kWeigh) total = load(at);
    if (kEnd == End::kSpread) {
      total = load(extra.own + v * kLanes);
      factor = load(extra.factor + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = acc[r][v];
      if (kEnd == End::kStore) store(at + r * ldc, x);
      if (kEnd == End::kAdd) store(at + r * ldc, load(at + r * ldc) + x);
      if (kEnd == End::kSpread) store(at + r * ldc, load(at + r * ldc) + x * factor);
      if (kEnd == End::kWeigh || kEnd == End::kSpread) {
        total += x * load(extra.w + r * ldc + v * kLanes);
      }
    }
    if (kEnd == End::kWeigh) store(at, total);
    if (kEnd == End::kSpread) store(extra.own + v * kLanes, total);
  }
}

template <class R>
using Tile = void (*)(const R*, int64_t, const R*, int64_t, R*, int64_t, int64_t, const Extra<R>&);

template <class R, bool kTransposed, End kEnd, int... kIndex>
constexpr Tile<R> tile_of(int rows, int vectors, std::integer_sequence<int, kIndex...>) {
  constexpr Tile<R> table[] = {tile<R, kIndex / 2 + 1, kIndex % 2 + 1, kTransposed, kEnd>...};
  return table[2 * (rows - 1) + vectors - 1];
}

// (rows x k) times (k x columns), columns rounded up to whole vectors.
template <class R, bool kTransposed, End kEnd>
void product(int64_t rows, int64_t columns, int64_t k, const R* a, int64_t lda, const R* b,
             int64_t ldb, R* c, int64_t ldc, const Extra<R>& extra = {}) {
  constexpr int kLanes = Vec<R>::kLanes;
  const int64_t tiles = (rows + PYLOSS_TILE_ROWS - 1) / PYLOSS_TILE_ROWS;
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    const int vectors = columns - n > kLanes ? 2 : 1;
    for (int64_t t = 0; t < tiles; ++t) {  // equal heights: a short tile would wait for latencies
      const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      const Tile<R> run =
          tile_of<R, kTransposed, kEnd>(static_cast<int>(r1 - r0), vectors,
                                        std::make_integer_sequence<int, 2 * PYLOSS_TILE_ROWS>{});
      constexpr bool kHasW = kEnd == End::kWeigh || kEnd == End::kSpread;
      constexpr bool kHasOwn = kEnd == End::kSpread;
      run(kTransposed ? a + r0 : a + r0 * lda, lda, b + n, ldb,
          kEnd == End::kWeigh ? c + n : c + r0 * ldc + n, ldc, k,
          {kHasW ? extra.w + r0 * ldc + n : nullptr, kHasOwn ? extra.factor + n : nullptr,
           kHasOwn ? extra.own + n : nullptr});
    }
  }
}

// ---- copies into the working precision
// -----------------------------------------------------------

// to[r][l] = from[r][l] + bias, zero in the padding.
template <class R, class T>
void copy_rows(R* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
               int64_t features, double bias) {
  const R shift = R(bias);
  for (int64_t r = 0; r < rows; ++r) {
    R* x = to + r * to_stride;
    const T* y = from + r * from_stride;
    for (int64_t l = 0; l < features; ++l) x[l] = R(to_float(y[l])) + shift;
    for (int64_t l = features; l < to_stride; ++l) x[l] = R(0);
  }
}

// to[l][r] = from[r][l] + bias, zero in the padding.
template <class R, class T>
void copy_transposed(R* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
                     int64_t features, double bias) {
  const R shift = R(bias);
  constexpr int64_t kBlock = 16;  // rows whose lines stay in cache while they are read
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const int64_t r1 = std::min(rows, r0 + kBlock);
    for (int64_t l = 0; l < features; ++l) {
      for (int64_t r = r0; r < r1; ++r) {
        to[l * to_stride + r] = R(to_float(from[r * from_stride + l])) + shift;
      }
    }
  }
  for (int64_t l = 0; l < features; ++l) {
    for (int64_t r = rows; r < rows + kPanelPad; ++r) to[l * to_stride + r] = R(0);
  }
}
