// Vector types and the register tile of every matrix product, for one instruction set.
//
// No include guard: per_instruction_set.h.

template <class R>
struct Vec;
template <>
struct Vec<float> {
  typedef float V PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef uint32_t I PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef float Loose PYLOSS_LOOSE_VECTOR(PYLOSS_VECTOR_BYTES, 4);
  static constexpr int kLanes = PYLOSS_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef double V PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef uint64_t I PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef double Loose PYLOSS_LOOSE_VECTOR(PYLOSS_VECTOR_BYTES, 8);
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
  PYLOSS_UNROLL(16)
  for (int r = 0; r < kRows; ++r) PYLOSS_UNROLL(2)
  for (int v = 0; v < kVectors; ++v) acc[r][v] = V{};
  PYLOSS_UNROLL(1)
  for (int64_t l = 0; l < k; ++l) {
    V row[kVectors];
    PYLOSS_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + l * ldb + v * kLanes);
    PYLOSS_UNROLL(16)
    for (int r = 0; r < kRows; ++r) {
      const R x = kTransposed ? a[l * lda + r] : a[r * lda + l];
      PYLOSS_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) acc[r][v] += x * row[v];
    }
  }
  PYLOSS_UNROLL(2)
  for (int v = 0; v < kVectors; ++v) {
    R* at = c + v * kLanes;
    V total{}, factor{};
    if (kEnd == End::kWeigh) total = load(at);
    if (kEnd == End::kSpread) {
      total = load(extra.own + v * kLanes);
      factor = load(extra.factor + v * kLanes);
    }
    PYLOSS_UNROLL(16)
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
using RunTile = void (*)(const R*, int64_t, const R*, int64_t, R*, int64_t, int64_t,
                         const Extra<R>&);

template <class R, bool kTransposed, End kEnd, int... kIndex>
constexpr RunTile<R> tile_of(int rows, int vectors, std::integer_sequence<int, kIndex...>) {
  constexpr RunTile<R> table[] = {tile<R, kIndex / 2 + 1, kIndex % 2 + 1, kTransposed, kEnd>...};
  return table[2 * (rows - 1) + vectors - 1];
}
