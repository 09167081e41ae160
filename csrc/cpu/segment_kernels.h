// Folds and maps of segments, for one instruction set: per_instruction_set.h, cpu/segment.cpp.
#include "cpu/gemm_tile.h"
//
#include "cpu/exp_vector.h"

template <class R>
using V = typename Vec<R>::V;

template <class R>
PYLOSS_INLINE V<R> all_lanes(R x) {
  return V<R>{} + x;
}

// exp for every x: that of exp_vector.h is for x <= 88.
PYLOSS_INLINE V<float> exp_any(V<float> x) {
  return x > all_lanes(exp_poly::kMax) ? all_lanes(infinity_<float>()) : exp_of(x);
}
PYLOSS_INLINE V<double> exp_any(V<double> x) {
  return exp_of(x);
}

// As load_part of gemm_tile.h, for lanes that are many or none. Rare, and long: not inlined, or
// they are half of this file's code.
template <class R>
PYLOSS_NOINLINE V<R> load_some(const R* p, int64_t n) {
  V<R> v{};
  for (int64_t i = 0; i < n && i < Vec<R>::kLanes; ++i) v[i] = p[i];
  return v;
}
template <class R>
PYLOSS_NOINLINE void store_some(R* p, int64_t n, V<R> v) {
  for (int64_t i = 0; i < n && i < Vec<R>::kLanes; ++i) p[i] = v[i];
}

template <int kStep, class A, int... kIndex>
PYLOSS_INLINE A swapped(A v, std::integer_sequence<int, kIndex...>) {
#if PYLOSS_HAS_SHUFFLE_BY_NUMBERS
  return PYLOSS_SHUFFLE_BY_NUMBERS(v, v, (kIndex ^ kStep)...);
#else
  typedef std::conditional_t<sizeof(v[0]) == 8, int64_t, int32_t> Int;
  typedef Int Mask PYLOSS_VECTOR(sizeof(A));
  return PYLOSS_SHUFFLE(v, Mask{(kIndex ^ kStep)...});
#endif
}

// join of common/segment.h: vectors do not leave the instruction set.
template <Pass P, class R>
PYLOSS_INLINE Sums<V<R>> joined(const Sums<V<R>>& s, const Sums<V<R>>& t) {
  if constexpr (P == Pass::kProd) return {s.a * t.a, s.b};
  if constexpr (P == Pass::kFactors) return {s.a * t.a, s.b + t.b};
  if constexpr (P == Pass::kMin) return {(t.a < s.a) | (t.a != t.a) ? t.a : s.a, s.b};
  if constexpr (P == Pass::kMax) return {(t.a > s.a) | (t.a != t.a) ? t.a : s.a, s.b};
  return {s.a + t.a, s.b + t.b};
}

// Every lane gets the join of all.
template <Pass P, class R, int kStep = Vec<R>::kLanes / 2>
PYLOSS_INLINE Sums<V<R>> join_lanes(Sums<V<R>> s) {
  if constexpr (kStep > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, Vec<R>::kLanes>{};
    constexpr bool both = P == Pass::kFactors || P == Pass::kSquares;
    s = joined<P, R>(s, {swapped<kStep>(s.a, lanes), both ? swapped<kStep>(s.b, lanes) : s.b});
    return join_lanes<P, R, kStep / 2>(s);
  } else {
    return s;
  }
}

// Lanes of v where kStep is not in their number, of w where it is; and the lanes that join_lanes
// would join to them.
template <int kStep, bool kPartner, class A, int... kIndex>
PYLOSS_INLINE A halves(A v, A w, std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = sizeof...(kIndex), kOther = kPartner ? kStep : 0;
#if PYLOSS_HAS_SHUFFLE_BY_NUMBERS
  return PYLOSS_SHUFFLE_BY_NUMBERS(v, w,
                                   ((kIndex ^ kOther) + ((kIndex & kStep) != 0 ? kLanes : 0))...);
#else
  typedef std::conditional_t<sizeof(v[0]) == 8, int64_t, int32_t> Int;
  typedef Int Mask PYLOSS_VECTOR(sizeof(A));
  return PYLOSS_SHUFFLE(v, w, Mask{((kIndex ^ kOther) + ((kIndex & kStep) ? kLanes : 0))...});
#endif
}

// The vectors s[0], s[1], ... of as many segments as there are lanes, each joined as join_lanes
// does, to the same bits: lane l is of s[l]. A third of the work of one at a time.
template <Pass P, class R, int kStep = Vec<R>::kLanes / 2>
PYLOSS_INLINE Sums<V<R>> join_each(Sums<V<R>>* s) {
  if constexpr (kStep > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, Vec<R>::kLanes>{};
    constexpr bool both = P == Pass::kFactors || P == Pass::kSquares;
    PYLOSS_UNROLL(16)
    for (int i = 0; i < kStep; ++i) {
      const Sums<V<R>>&v = s[i], &w = s[i + kStep];
      const V<R> b0 = both ? halves<kStep, false>(v.b, w.b, lanes) : v.b;
      const V<R> b1 = both ? halves<kStep, true>(v.b, w.b, lanes) : v.b;
      s[i] = joined<P, R>({halves<kStep, false>(v.a, w.a, lanes), b0},
                          {halves<kStep, true>(v.a, w.a, lanes), b1});
    }
    return join_each<P, R, kStep / 2>(s);
  } else {
    return s[0];
  }
}

template <class R>
PYLOSS_INLINE V<R> finite_or_zero(V<R> m) {
  const V<R> most = all_lanes(infinity_<R>());
  return (m == most) | (m == -most) ? V<R>{} : m;
}

template <Pass P, class R>
PYLOSS_INLINE Sums<V<R>> nothing_yet() {
  const Sums<R> s = nothing<P, R>();
  return {all_lanes(s.a), all_lanes(s.b)};
}

template <Pass P, class R>
PYLOSS_INLINE void add(Sums<V<R>>& s, V<R> x, V<R> y, V<R> m) {
  const V<R> zero{}, one = all_lanes(R(1));
  if constexpr (P == Pass::kSum) s.a += x;
  if constexpr (P == Pass::kProd) s.a *= x;
  if constexpr (P == Pass::kMin) s.a = (x < s.a) | (x != x) ? x : s.a;
  if constexpr (P == Pass::kMax) s.a = (x > s.a) | (x != x) ? x : s.a;
  if constexpr (P == Pass::kExp) s.a += exp_any(x - m);
  if constexpr (P == Pass::kTies) s.a += x == m ? one : zero;
  if constexpr (P == Pass::kInner) s.a += x * y;
  if constexpr (P == Pass::kSquares) {
    const V<R> d = x - m;
    s.a += d;
    s.b += d * d;
  }
  if constexpr (P == Pass::kFactors) {
    s.a *= x == zero ? one : x;
    s.b += x == zero ? one : zero;
  }
}

// ---- Values side by side -----------------------------------------------------------------------

// n values of one column, in lanes that are still to be joined. Loads may reach up to `end`, behind
// which nothing is mapped for sure.
template <Pass P, class R>
PYLOSS_INLINE Sums<V<R>> line_lanes(const R* x, const R* y, int64_t n, const R* end, const R* y_end,
                                    R at) {
  constexpr int kLanes = Vec<R>::kLanes;
  const V<R> m = all_lanes(at), rest = all_lanes(neutral<P>(at));
  const auto part = [&](Sums<V<R>>& s, int64_t i) PYLOSS_ALWAYS_INLINE {
    const int64_t left = n > i ? n - i : 0;
    const auto there = first_lanes<R>(left);
    const bool safe = x + i + kLanes <= end;
    V<R> v = safe ? load(x + i) : load_some(x + i, left), other = m;
    if constexpr (P == Pass::kInner) {
      const bool other_safe = y + i + kLanes <= y_end;
      other = other_safe ? load(y + i) : load_some(y + i, left);
      other = there ? other : V<R>{};
    }
    add<P, R>(s, there ? v : rest, other, m);
  };
  Sums<V<R>> s0 = nothing_yet<P, R>(), s1 = s0;
  if (n <= 2 * kLanes) {  // most segments, without a branch on their length
    part(s0, 0);
    part(s1, kLanes);
  } else {
    const auto whole = [&](Sums<V<R>>& s, int64_t i) PYLOSS_ALWAYS_INLINE {
      V<R> other = m;
      if constexpr (P == Pass::kInner) other = load(y + i);
      add<P, R>(s, load(x + i), other, m);
    };
    Sums<V<R>> s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      whole(s0, i);
      whole(s1, i + kLanes);
      whole(s2, i + 2 * kLanes);
      whole(s3, i + 3 * kLanes);
    }
    if (i < n) part(s0, i);
    if (i + kLanes < n) part(s1, i + kLanes);
    if (i + 2 * kLanes < n) part(s2, i + 2 * kLanes);
    if (i + 3 * kLanes < n) part(s3, i + 3 * kLanes);
    s0 = joined<P, R>(s0, s2);
    s1 = joined<P, R>(s1, s3);
  }
  return joined<P, R>(s0, s1);
}
template <Pass P, class R>
PYLOSS_INLINE Sums<R> line(const R* x, const R* y, int64_t n, const R* end, const R* y_end, R at) {
  const auto all = join_lanes<P, R>(line_lanes<P, R>(x, y, n, end, y_end, at));
  return {all.a[0], all.b[0]};
}

// ---- Columns side by side ----------------------------------------------------------------------

// n rows of `lanes` columns, of which the first `safe` rows may be loaded in whole vectors.
template <Pass P, class R>
PYLOSS_INLINE Sums<V<R>> columns(const R* x, int64_t x_stride, const R* y, int64_t y_stride,
                                 int64_t n, int64_t lanes, int64_t safe, V<R> m) {
  const auto row = [&](Sums<V<R>>& s, int64_t i) PYLOSS_ALWAYS_INLINE {
    const bool whole = i < safe;
    V<R> other = m;
    if constexpr (P == Pass::kInner) {
      other = whole ? load(y + i * y_stride) : load_some(y + i * y_stride, lanes);
    }
    add<P, R>(s, whole ? load(x + i * x_stride) : load_some(x + i * x_stride, lanes), other, m);
  };
  Sums<V<R>> s0 = nothing_yet<P, R>(), s1 = s0, s2 = s0, s3 = s0;
  const int64_t fours = std::min(safe, n) & ~int64_t(3);
  int64_t i = 0;
  for (; i < fours; i += 4) {
    row(s0, i);
    row(s1, i + 1);
    row(s2, i + 2);
    row(s3, i + 3);
  }
  for (; i < n; i += 4) {
    row(s0, i);
    if (i + 1 < n) row(s1, i + 1);
    if (i + 2 < n) row(s2, i + 2);
    if (i + 3 < n) row(s3, i + 3);
  }
  return joined<P, R>(joined<P, R>(s0, s2), joined<P, R>(s1, s3));
}

// Of n rows from `begin`, how many a vector at column c of each may be loaded from.
template <class R>
PYLOSS_INLINE int64_t safe_rows(const Problem& p, int64_t stride, int64_t begin, int64_t n,
                                int64_t c) {
  const int64_t end = (p.rows - 1) * stride + p.width - Vec<R>::kLanes - c;  // last such place
  if (end < begin * stride) return 0;
  return stride == 0 ? n : std::min(n, end / stride - begin + 1);
}

// Rows [begin, begin + n) of segment s: as a part to `parts` [width][kPartNumbers], or, without
// those, the results of the whole segment to `out`.
template <Pass P, class R>
PYLOSS_NOINLINE void part_of(const Problem& p, Fold f, int64_t s, int64_t begin, int64_t n,
                             double* parts, R* out) {
  const auto put = [&](int64_t c, const Part<R>& part) {
    if (!parts) return finish(f, part, out + c, p.segments * p.width);
    double* at = parts + c * kPartNumbers;
    at[0] = double(part.m);
    at[1] = double(part.sums.a);
    at[2] = double(part.sums.b);
  };
  constexpr Pass kFirst = P == Pass::kExp ? Pass::kMax : Pass::kSum;
  constexpr bool kTwice = P == Pass::kExp || P == Pass::kSquares;
  const int64_t xs = p.x_stride, ys = p.other_stride;
  const R* x = static_cast<const R*>(p.x) + begin * xs;
  const R* y = static_cast<const R*>(p.other);
  if (P == Pass::kInner) y += begin * ys;
  const R* m = static_cast<const R*>(p.given[0]);
  if (p.width == 1 && xs == 1 && (P != Pass::kInner || ys == 1)) {
    const R *end = x + (p.rows - begin), *y_end = P == Pass::kInner ? y + (p.rows - begin) : y;
    R at = P == Pass::kTies ? m[s] : R(0), base = at;
    if constexpr (kTwice) {
      at = line<kFirst, R>(x, y, n, end, y_end, R(0)).a;
      if (P == Pass::kSquares) at /= R(n);
      base = P == Pass::kExp ? segment::finite_or_zero(at) : at;
    }
    put(0, settled(P, Part<R>{R(n), at, line<P, R>(x, y, n, end, y_end, base)}));
    return;
  }
  constexpr int64_t kLanes = Vec<R>::kLanes;
  const bool is_plain = !parts && sums_are_results(f);
  for (int64_t c = 0; c < p.width; c += kLanes) {
    const int64_t lanes = std::min(kLanes, p.width - c);
    int64_t safe = safe_rows<R>(p, xs, begin, n, c);
    if (P == Pass::kInner) safe = std::min(safe, safe_rows<R>(p, ys, begin, n, c));
    V<R> at{}, base{};
    if (P == Pass::kTies) at = base = load_some(m + s * p.width + c, lanes);
    if constexpr (kTwice) {
      at = columns<kFirst, R>(x + c, xs, y, ys, n, lanes, safe, at).a;
      if (P == Pass::kSquares) at /= all_lanes(R(n));
      base = P == Pass::kExp ? finite_or_zero<R>(at) : at;
    }
    const R* other = P == Pass::kInner ? y + c : y;
    const auto sums = columns<P, R>(x + c, xs, other, ys, n, lanes, safe, base);
    if (is_plain) {
      if (lanes == kLanes) {
        store(out + c, sums.a);
      } else {
        for (int64_t l = 0; l < lanes; ++l) out[c + l] = sums.a[l];
      }
      continue;
    }
    for (int64_t l = 0; l < lanes; ++l) {
      put(c + l, settled(P, Part<R>{R(n), at[l], {sums.a[l], sums.b[l]}}));
    }
  }
}

// A pass over as many segments as there are lanes, values adjacent: segment l has n[l] from
// x + from[l], around m[l].
template <Pass P, class R>
PYLOSS_INLINE Sums<V<R>> lines(const R* x, const int64_t* from, const int64_t* n, const R* end,
                               const R* m) {
  constexpr int kLanes = Vec<R>::kLanes;
  Sums<V<R>> s[kLanes];
  PYLOSS_UNROLL(1)
  for (int l = 0; l < kLanes; ++l) {
    s[l] = line_lanes<P, R>(x + from[l], x + from[l], n[l], end, end, m[l]);
  }
  return join_each<P, R>(s);
}

// The segments from s on, as many as there are lanes, if they begin before `last` and none is long.
// To the same bits as one at a time.
template <Pass P, class R>
PYLOSS_INLINE bool fold_together(const Problem& p, Fold f, int64_t s, int64_t last, R* out) {
  constexpr int kLanes = Vec<R>::kLanes;
  if (s + kLanes > p.segments || p.offset(s + kLanes - 1) >= last) return false;
  int64_t from[kLanes], n[kLanes], longest = 0;
  for (int l = 0; l < kLanes; ++l) from[l] = p.offset(s + l);
  for (int l = 0; l < kLanes; ++l) n[l] = p.offset(s + l + 1) - from[l];
  for (int l = 0; l < kLanes; ++l) longest = n[l] > longest ? n[l] : longest;
  if (longest > part_rows(1)) return false;
  const R *x = static_cast<const R*>(p.x), *end = x + p.rows;
  R m[kLanes] = {}, base[kLanes] = {};
  if constexpr (P == Pass::kTies) {
    for (int l = 0; l < kLanes; ++l) m[l] = base[l] = static_cast<const R*>(p.given[0])[s + l];
  }
  if constexpr (P == Pass::kExp) {
    const V<R> most = lines<Pass::kMax, R>(x, from, n, end, m).a;
    store(m, most);
    store(base, finite_or_zero<R>(most));
  }
  if constexpr (P == Pass::kSquares) {
    store(m, lines<Pass::kSum, R>(x, from, n, end, m).a);
    for (int l = 0; l < kLanes; ++l) base[l] = m[l] = m[l] / R(n[l]);
  }
  const Sums<V<R>> sums = lines<P, R>(x, from, n, end, base);
  if (sums_are_results(f)) {
    store(out + s, sums.a);
    return true;
  }
  R a[kLanes], b[kLanes];
  store(a, sums.a);
  store(b, sums.b);
  for (int l = 0; l < kLanes; ++l) {
    finish(f, settled(P, Part<R>{R(n[l]), m[l], {a[l], b[l]}}), out + s + l, p.segments);
  }
  return true;
}

// What the windows [begin, end) own: whole segments that begin there, and parts of long ones.
template <Pass P, class R>
void fold_windows(const Problem& p, Fold f, void* out, double* parts, int64_t begin, int64_t end) {
  const int64_t size = part_rows(p.width);
  const bool is_line = p.width == 1 && p.x_stride == 1;
  int64_t s = p.first_from(begin * size);
  for (int64_t w = begin; w < end; ++w) {
    const int64_t last = w + 1 == windows(p) ? p.rows + 1 : (w + 1) * size;
    const auto keep = [&](int64_t slot, int64_t segment, int64_t from, int64_t n) {
      part_of<P, R>(p, f, segment, from, n, parts + slot * p.width * kPartNumbers, nullptr);
    };
    if (s > 0) {  // a long segment from before
      const int64_t first = p.offset(s - 1), stop = p.offset(s);
      if (stop - first > size) {
        const int64_t from = first + (w * size - first + size - 1) / size * size;
        if (from > first && from < std::min(last, stop)) {
          keep(2 * w, s - 1, from, std::min(size, stop - from));
        }
      }
    }
    for (; s < p.segments; ++s) {
      if constexpr (P != Pass::kInner) {
        if (is_line && fold_together<P, R>(p, f, s, last, static_cast<R*>(out))) {
          s += Vec<R>::kLanes - 1;
          continue;
        }
      }
      const int64_t from = p.offset(s), n = p.offset(s + 1) - from;
      if (from >= last) break;
      if (n > size) {
        keep(2 * w + 1, s, from, size);
        continue;
      }
      part_of<P, R>(p, f, s, from, n, nullptr, static_cast<R*>(out) + s * p.width);
    }
  }
}

template <class R>
constexpr FoldWindows fold_of(Pass pass) {
  switch (pass) {
    case Pass::kProd:
      return fold_windows<Pass::kProd, R>;
    case Pass::kMin:
      return fold_windows<Pass::kMin, R>;
    case Pass::kMax:
      return fold_windows<Pass::kMax, R>;
    case Pass::kExp:
      return fold_windows<Pass::kExp, R>;
    case Pass::kSquares:
      return fold_windows<Pass::kSquares, R>;
    case Pass::kTies:
      return fold_windows<Pass::kTies, R>;
    case Pass::kFactors:
      return fold_windows<Pass::kFactors, R>;
    case Pass::kInner:
      return fold_windows<Pass::kInner, R>;
    default:
      return fold_windows<Pass::kSum, R>;
  }
}

// ---- Maps --------------------------------------------------------------------------------------

template <Form F, class R>
PYLOSS_INLINE V<R> mapped(V<R> x, V<R> y, const Coeffs<V<R>>& k) {
  switch (F) {
    case Form::kChosen:
      return x == k.b ? k.a : k.c;
    case Form::kQuotient:
      return x == V<R>{} ? k.b : k.a / x;
    case Form::kExp:
      return k.a * exp_any(x - k.b);
    case Form::kAffine:
      return k.a + k.b * (x - k.c);
    case Form::kSoftmax: {
      const V<R> e = k.a * exp_any(x - k.b);
      return x == k.c ? e + k.d : e;
    }
    case Form::kProduct:
      return y * (x - k.a);
    default:
      return k.a;
  }
}

// n values from x to out, with the coefficients of each.
template <Form F, class R>
PYLOSS_INLINE void map_line(const R* x, const R* y, const R* const* k, int64_t n, R* out) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = std::min(kLanes, n - i);
    const bool whole = lanes == kLanes;
    const auto real = [&](const R* from) {
      return whole ? load(from + i) : load_some(from + i, lanes);
    };
    V<R> v{}, other{};
    if (F != Form::kSpread) v = whole ? load(x + i) : load_some(x + i, lanes);
    if (F == Form::kProduct) other = whole ? load(y + i) : load_some(y + i, lanes);
    Coeffs<V<R>> c{real(k[0]), {}, {}, {}};
    if (coefficients(F) > 1) c.b = real(k[1]);
    if (coefficients(F) > 2) c.c = real(k[2]);
    if (coefficients(F) > 3) c.d = real(k[3]);
    const V<R> found = mapped<F, R>(v, other, c);
    if (whole) {
      store(out + i, found);
    } else {
      store_some(out + i, lanes, found);
    }
  }
}

// Rows [begin, end) to out [rows][width]. The coefficients of as many values as kMapValues are laid
// out beside them; wide rows go one by one.
template <Form F, class R>
void map_rows(const Problem& p, Map f, void* result, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  alignas(64) R room[coefficients(F)][kMapValues + kLanes];
  const R* k[4] = {room[0], room[coefficients(F) > 1 ? 1 : 0], room[coefficients(F) > 2 ? 2 : 0],
                   room[coefficients(F) > 3 ? 3 : 0]};
  const int64_t width = p.width, xs = p.x_stride, ys = p.other_stride;
  const R *x = static_cast<const R*>(p.x), *y = static_cast<const R*>(p.other);
  R* out = static_cast<R*>(result);
  const int inputs = given(f);
  const auto fill = [&](int64_t s, int64_t c, R n, Coeffs<R>* found) {
    R g[kMostGiven];
    for (int i = 0; i < inputs; ++i) g[i] = static_cast<const R*>(p.given[i])[s * width + c];
    *found = coeffs(f, g, n);
  };
  const auto put = [&](int64_t at, const Coeffs<R>& c) {
    room[0][at] = c.a;
    if constexpr (coefficients(F) > 1) room[1][at] = c.b;
    if constexpr (coefficients(F) > 2) room[2][at] = c.c;
    if constexpr (coefficients(F) > 3) room[3][at] = c.d;
  };
  int64_t s = p.first_from(begin + 1) - 1;  // the last that begins at or before
  if (width == 1) {
    for (int64_t row = begin; row < end;) {
      const int64_t stop = std::min(end, row + kMapValues);
      for (int64_t at = row; at < stop; ++s) {
        const int64_t until = p.offset(s + 1), last = std::min(stop, until);
        if (last > at) {
          Coeffs<R> c;
          fill(s, 0, R(until - p.offset(s)), &c);
          // Whole vectors: what is too much is written over by the next segment.
          for (int64_t i = at - row; i < last - row; i += kLanes) {
            store(room[0] + i, all_lanes(c.a));
            if constexpr (coefficients(F) > 1) store(room[1] + i, all_lanes(c.b));
            if constexpr (coefficients(F) > 2) store(room[2] + i, all_lanes(c.c));
            if constexpr (coefficients(F) > 3) store(room[3] + i, all_lanes(c.d));
          }
          at = last;
        }
        if (until > stop) break;
      }
      if (xs == 1 && (F != Form::kProduct || ys == 1)) {
        map_line<F, R>(x + row, F == Form::kProduct ? y + row : x, k, stop - row, out + row);
      } else {
        for (int64_t i = row; i < stop; ++i) {
          const R* one[4] = {k[0] + i - row, k[1] + i - row, k[2] + i - row, k[3] + i - row};
          map_line<F, R>(x + i * xs, F == Form::kProduct ? y + i * ys : x, one, 1, out + i);
        }
      }
      row = stop;
    }
    return;
  }
  for (int64_t row = begin; row < end; ++s) {
    const int64_t until = std::min(end, p.offset(s + 1));
    if (until <= row) continue;
    const R n = R(p.offset(s + 1) - p.offset(s));
    for (int64_t c = 0; c < width; c += kMapValues) {
      const int64_t some = std::min<int64_t>(kMapValues, width - c);
      for (int64_t i = 0; i < some; ++i) {
        Coeffs<R> found;
        fill(s, c + i, n, &found);
        put(i, found);
      }
      for (int64_t r = row; r < until; ++r) {
        const R* other = F == Form::kProduct ? y + r * ys + c : x;
        map_line<F, R>(x + r * xs + c, other, k, some, out + r * width + c);
      }
    }
    row = until;
  }
}

template <class R>
constexpr MapRows map_of(Form form) {
  switch (form) {
    case Form::kChosen:
      return map_rows<Form::kChosen, R>;
    case Form::kQuotient:
      return map_rows<Form::kQuotient, R>;
    case Form::kExp:
      return map_rows<Form::kExp, R>;
    case Form::kAffine:
      return map_rows<Form::kAffine, R>;
    case Form::kSoftmax:
      return map_rows<Form::kSoftmax, R>;
    case Form::kProduct:
      return map_rows<Form::kProduct, R>;
    default:
      return map_rows<Form::kSpread, R>;
  }
}

constexpr Kernels kernels = {fold_of<float>, map_of<float>};
