// The look for large numbers in a tile, for one instruction set: included by similarity_topk.cpp
// once for each, inside a namespace and a `#pragma GCC target` region, with PYLOSS_VECTOR_BYTES
// set (0: plain C++).

template <class R>
struct Lanes;
#if PYLOSS_VECTOR_BYTES == 64
template <>
struct Lanes<float> {
  using V = __m512;
  static constexpr int kCount = 16;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V fill(float x) { return _mm512_set1_ps(x); }
  static uint32_t above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
};
template <>
struct Lanes<double> {
  using V = __m512d;
  static constexpr int kCount = 8;
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static V fill(double x) { return _mm512_set1_pd(x); }
  static uint32_t above(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
};
#elif PYLOSS_VECTOR_BYTES == 32
template <>
struct Lanes<float> {
  using V = __m256;
  static constexpr int kCount = 8;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V fill(float x) { return _mm256_set1_ps(x); }
  static uint32_t above(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
};
template <>
struct Lanes<double> {
  using V = __m256d;
  static constexpr int kCount = 4;
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static V fill(double x) { return _mm256_set1_pd(x); }
  static uint32_t above(V a, V b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)); }
};
#else
template <class R>
struct Lanes {
  using V = R;
  static constexpr int kCount = 1;
  static V load(const R* p) { return *p; }
  static V fill(R x) { return x; }
  static uint32_t above(V a, V b) { return !(a <= b); }
};
#endif

// Whatever is not below the bound of its list goes there: into those of the rows of the tile, and,
// of a tile that serves both, into those of its columns. The column numbers of a row, and the row
// numbers of a column, come in ascending order.
template <class R, bool kBoth>
void scan(const gemm::Tile<R>& t, const Lists<R>& to) {
  using L = Lanes<R>;
  const R* const of_columns = to.bounds + t.column;
  const int64_t whole = t.columns / L::kCount * L::kCount;
  for (int64_t r = 0; r < t.rows; ++r) {
    const R* const x = t.data + r * t.stride;
    const int64_t row = t.row + r;
    typename L::V bound = L::fill(to.bounds[row]);
    for (int64_t c = 0; c < whole; c += L::kCount) {
      const typename L::V v = L::load(x + c);
      uint32_t rows = L::above(v, bound);
      uint32_t columns = kBoth ? L::above(v, L::load(of_columns + c)) : 0;
      if (!(rows | columns)) continue;
      if (rows) {
        for (; rows; rows &= rows - 1) {
          const int64_t at = c + __builtin_ctz(rows);
          to.insert(row, x[at], t.column + at);
        }
        bound = L::fill(to.bounds[row]);
      }
      for (; columns; columns &= columns - 1) {
        const int64_t at = c + __builtin_ctz(columns);
        to.insert(t.column + at, x[at], row);
      }
    }
    for (int64_t c = whole; c < t.columns; ++c) {
      to.insert(row, x[c], t.column + c);
      if (kBoth) to.insert(t.column + c, x[c], row);
    }
  }
}

template <class R>
void scan_tile(const gemm::Tile<R>& t, const Lists<R>& to, bool both) {
  both ? scan<R, true>(t, to) : scan<R, false>(t, to);
}
