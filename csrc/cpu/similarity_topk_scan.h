// The look for large numbers in a tile, for one instruction set (per_instruction_set.h); the base
// one in plain C++.

// above(a, b): not a <= b, a bit a lane. larger(a, b): b where one is NaN. append(to, first,
// lanes): the numbers first + lane of the lanes that are set; what is behind them in `to` is
// overwritten.
template <class R>
struct Lanes;
#if PYLOSS_VECTOR_BYTES == 64
template <>
struct Lanes<float> {
  using V = __m512;
  static constexpr int kCount = 16;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V fill(float x) { return _mm512_set1_ps(x); }
  static V larger(V a, V b) { return _mm512_max_ps(a, b); }
  static V smaller(V a, V b) { return _mm512_min_ps(a, b); }
  static uint32_t above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static uint32_t is_number(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
  using I = __m512i;
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  // Those of `moved` from the lane before, the first from `carry`; `place` is x.
  static V shifted(V v, float carry, uint32_t moved, float x, uint32_t place) {
    const I before = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
    const V next = _mm512_mask_mov_ps(_mm512_permutexvar_ps(before, v), 1, fill(carry));
    return _mm512_mask_mov_ps(_mm512_mask_mov_ps(v, moved, next), place, fill(x));
  }
  static I shifted(I v, int32_t carry, uint32_t moved, int32_t x, uint32_t place) {
    const I before = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14);
    const I next =
        _mm512_mask_mov_epi32(_mm512_permutexvar_epi32(before, v), 1, _mm512_set1_epi32(carry));
    return _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(v, moved, next), place,
                                 _mm512_set1_epi32(x));
  }
  static int64_t append(int32_t* to, int32_t first, uint32_t lanes) {
    const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(
        to, _mm512_maskz_compress_epi32(lanes, _mm512_add_epi32(at, _mm512_set1_epi32(first))));
    return bit_count(lanes);
  }
};
template <>
struct Lanes<double> {
  using V = __m512d;
  static constexpr int kCount = 8;
  static V load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, V v) { _mm512_storeu_pd(p, v); }
  static V fill(double x) { return _mm512_set1_pd(x); }
  static V larger(V a, V b) { return _mm512_max_pd(a, b); }
  static V smaller(V a, V b) { return _mm512_min_pd(a, b); }
  static uint32_t above(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
  static uint32_t is_number(V a) { return _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q); }
  using I = __m256i;
  static I load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V shifted(V v, double carry, uint32_t moved, double x, uint32_t place) {
    const __m512i before = _mm512_setr_epi64(0, 0, 1, 2, 3, 4, 5, 6);
    const V next = _mm512_mask_mov_pd(_mm512_permutexvar_pd(before, v), 1, fill(carry));
    return _mm512_mask_mov_pd(_mm512_mask_mov_pd(v, moved, next), place, fill(x));
  }
  static I shifted(I v, int32_t carry, uint32_t moved, int32_t x, uint32_t place) {
    const I before = _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6);
    const I next =
        _mm256_mask_mov_epi32(_mm256_permutexvar_epi32(before, v), 1, _mm256_set1_epi32(carry));
    return _mm256_mask_mov_epi32(_mm256_mask_mov_epi32(v, moved, next), place,
                                 _mm256_set1_epi32(x));
  }
  static int64_t append(int32_t* to, int32_t first, uint32_t lanes) {
    const __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to),
        _mm256_maskz_compress_epi32(lanes, _mm256_add_epi32(at, _mm256_set1_epi32(first))));
    return bit_count(lanes);
  }
};
#elif PYLOSS_VECTOR_BYTES == 32
template <>
struct Lanes<float> {
  using V = __m256;
  static constexpr int kCount = 8;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V fill(float x) { return _mm256_set1_ps(x); }
  static V larger(V a, V b) { return _mm256_max_ps(a, b); }
  static V smaller(V a, V b) { return _mm256_min_ps(a, b); }
  static uint32_t above(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
};
template <>
struct Lanes<double> {
  using V = __m256d;
  static constexpr int kCount = 4;
  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static V fill(double x) { return _mm256_set1_pd(x); }
  static V larger(V a, V b) { return _mm256_max_pd(a, b); }
  static V smaller(V a, V b) { return _mm256_min_pd(a, b); }
  static uint32_t above(V a, V b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)); }
};
#else
template <class R>
struct Lanes {
  using V = R;
  static constexpr int kCount = 1;
  static V load(const R* p) { return *p; }
  static void store(R* p, V v) { *p = v; }
  static V fill(R x) { return x; }
  static V larger(V a, V b) { return a > b ? a : b; }
  static V smaller(V a, V b) { return a < b ? a : b; }
  static uint32_t above(V a, V b) { return !(a <= b); }
};
#endif

#if PYLOSS_VECTOR_BYTES != 64
template <class R>
int64_t append(int32_t* to, int32_t first, uint32_t lanes) {
  int64_t n = 0;
  for (; lanes; lanes &= lanes - 1) to[n++] = first + lowest_bit(lanes);
  return n;
}
#else
template <class R>
int64_t append(int32_t* to, int32_t first, uint32_t lanes) {
  return Lanes<R>::append(to, first, lanes);
}
#endif

// Where x is not below bound(place), in whole vectors; the number of such places. On AVX-512
// without a branch, of which each number that passes would cost several that are foretold wrongly.
template <class R, class Bound>
int64_t find(const R* x, int64_t whole, Bound bound, int32_t* places) {
  using L = Lanes<R>;
  int64_t n = 0;
  for (int64_t c = 0; c < whole; c += L::kCount) {
    n += append<R>(places + n, static_cast<int32_t>(c), L::above(L::load(x + c), bound(c)));
  }
  return n;
}

// Into a list, behind what is not smaller. On AVX-512 without a branch that depends on the place:
// what is below it moves up by one, all at once, by loads and stores of whole vectors, which the
// next insertion into the list need not wait for.
template <class R>
void insert(const Lists<R>& to, int64_t row, R value, int32_t index) {
#if PYLOSS_VECTOR_BYTES == 64
  using L = Lanes<R>;
  R* const x = to.values + row * to.stride;
  int32_t* const at = to.indices + row * to.stride;
  const typename L::V v = L::fill(value);
  const uint32_t number = value == value ? 0u : ~0u;
  for (int64_t c = to.stride - L::kCount; c >= 0; c -= L::kCount) {
    const typename L::V old = L::load(x + c);
    const uint32_t behind = L::is_number(old) & (number | L::above(v, old));
    const bool more = c > 0;  // of the list, in front of these
    const R carry = more ? x[c - 1] : value;
    const uint32_t moved = behind & (behind << 1 | (more && above(value, carry)));
    const uint32_t place = behind & ~moved;
    L::store(x + c, L::shifted(old, carry, moved, value, place));
    L::store(at + c, L::shifted(L::load(at + c), more ? at[c - 1] : 0, moved, index, place));
  }
  to.raise(row);
#else
  to.insert(row, value, index);
#endif
}

// A first bound from a first tile: its columns (or rows) in 16 groups, of whose largest numbers the
// k-th is not above the k-th of all. It spares most insertions into a list that is being filled.
constexpr int kGroups = 16;

// Sorts each lane, largest first: odd-even merge sort.
template <class L>
PYLOSS_INLINE void sort_lanes(typename L::V (&x)[kGroups]) {
  PYLOSS_UNROLL(16)
  for (int p = 1; p < kGroups; p *= 2) {
    PYLOSS_UNROLL(16)
    for (int q = p; q >= 1; q /= 2) {
      PYLOSS_UNROLL(16)
      for (int j = q % p; j + q < kGroups; j += 2 * q) {
        PYLOSS_UNROLL(16)
        for (int i = 0; i < q; ++i) {
          if (i + j + q >= kGroups || (i + j) / (2 * p) != (i + j + q) / (2 * p)) continue;
          const typename L::V a = x[i + j], b = x[i + j + q];
          x[i + j] = L::larger(a, b);
          x[i + j + q] = L::smaller(a, b);
        }
      }
    }
  }
}

template <class R>
void first_bound(const Lists<R>& to, int64_t row, R kth) {
  // Just below, for what equals it to pass.
  to.bounds[row] = std::nextafter(kth, -std::numeric_limits<R>::infinity());
}

template <class R>
void first_bounds_of_columns(const gemm::Tile<R>& t, int64_t column, const Lists<R>& to) {
  using L = Lanes<R>;
  constexpr R kLowest = -std::numeric_limits<R>::infinity();
  typename L::V most[kGroups];
  for (int g = 0; g < kGroups; ++g) most[g] = L::fill(kLowest);
  const R* x = t.data + column;
  int64_t r = 0;
  for (; r + kGroups <= t.rows; r += kGroups) {
    PYLOSS_UNROLL(16)
    for (int g = 0; g < kGroups; ++g) most[g] = L::larger(L::load(x + (r + g) * t.stride), most[g]);
  }
  for (; r < t.rows; ++r) most[0] = L::larger(L::load(x + r * t.stride), most[0]);
  sort_lanes<L>(most);
  R kth[L::kCount];
  L::store(kth, most[to.k - 1]);
  for (int i = 0; i < L::kCount; ++i) first_bound(to, t.column + column + i, kth[i]);
}

template <class R>
void first_bound_of_row(const gemm::Tile<R>& t, int64_t r, const Lists<R>& to) {
  using L = Lanes<R>;
  constexpr int kVectors = kGroups / L::kCount;
  typename L::V most[kVectors];
  for (auto& v : most) v = L::fill(-std::numeric_limits<R>::infinity());
  const R* x = t.data + r * t.stride;
  for (int64_t c = 0; c + kGroups <= t.columns; c += kGroups) {
    for (int v = 0; v < kVectors; ++v) {
      most[v] = L::larger(L::load(x + c + v * L::kCount), most[v]);
    }
  }
  R all[kGroups];
  for (int v = 0; v < kVectors; ++v) L::store(all + v * L::kCount, most[v]);
  std::nth_element(all, all + to.k - 1, all + kGroups, std::greater<R>());
  first_bound(to, t.row + r, all[to.k - 1]);
}

// Whatever is not below the bound of its list goes there: into those of the rows of the tile, and,
// of a tile that serves both, into those of its columns. The column numbers of a row, and the row
// numbers of a column, come in ascending order.
template <class R, bool kBoth>
void scan(const gemm::Tile<R>& t, const Lists<R>& to) {
  using L = Lanes<R>;
  constexpr R kLowest = -std::numeric_limits<R>::infinity();
  const R* const of_columns = to.bounds + t.column;
  const int64_t whole = t.columns / L::kCount * L::kCount;
  int32_t places[kTile + L::kCount];
  for (int64_t c = 0; kBoth && to.k <= kGroups && c < whole; c += L::kCount) {
    if (of_columns[c] == kLowest) first_bounds_of_columns(t, c, to);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const R* const x = t.data + r * t.stride;
    const int64_t row = t.row + r;
    if (to.k <= kGroups && to.bounds[row] == kLowest) first_bound_of_row(t, r, to);
    const typename L::V bound = L::fill(to.bounds[row]);
    int64_t n = find<R>(x, whole, [&](int64_t) { return bound; }, places);
    for (int64_t i = 0; i < n; ++i) {
      insert(to, row, x[places[i]], static_cast<int32_t>(t.column + places[i]));
    }
    if (kBoth) {
      n = find<R>(x, whole, [&](int64_t c) { return L::load(of_columns + c); }, places);
      for (int64_t i = 0; i < n; ++i) {
        insert(to, t.column + places[i], x[places[i]], static_cast<int32_t>(row));
      }
    }
    for (int64_t c = whole; c < t.columns; ++c) {
      insert(to, row, x[c], static_cast<int32_t>(t.column + c));
      if (kBoth) insert(to, t.column + c, x[c], static_cast<int32_t>(row));
    }
  }
}

template <class R>
void scan_tile(const gemm::Tile<R>& t, const Lists<R>& to, bool both) {
  both ? scan<R, true>(t, to) : scan<R, false>(t, to);
}
