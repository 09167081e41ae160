// What happens to a tile of logits while it is in the cache, for one instruction set
// (per_instruction_set.h).
//
// Rows are looped over four at a time, so that a column's sum is loaded and stored once for four of
// its elements. Tiles are padded to whole vectors with -inf, whose exp is 0.
#include "cpu/gemm_tile.h"
// After its vector types.
#include "cpu/exp_vector.h"

template <class R>
PYLOSS_INLINE typename Vec<R>::V larger(typename Vec<R>::V a, typename Vec<R>::V b) {
  return b > a ? b : a;
}
template <class R>
PYLOSS_INLINE R lane_max(typename Vec<R>::V v) {
  R m = v[0];
  for (int i = 1; i < Vec<R>::kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <class R>
void pad(const Tile<R>& t) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  const int64_t width = (t.columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = t.columns; c < width; ++c) t.data[r * t.stride + c] = -infinity_<R>();
  }
}

// fn(the number of rows, four or one, as a constant; the first of them) for all rows.
template <class Fn>
PYLOSS_INLINE void by_four(int64_t rows, Fn fn) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) fn(std::integral_constant<int, 4>{}, r);
  for (; r < rows; ++r) fn(std::integral_constant<int, 1>{}, r);
}

template <class R>
void maxima(const Tile<R>& t, R* rows, R* columns) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  const V none = V{} - infinity_<R>();
  for (int64_t c = 0; c < t.columns; c += kLanes) store(columns + c, none);
  by_four(t.rows, [&](auto count, int64_t r) {
    constexpr int kRows = decltype(count)::value;
    V most[kRows];
    for (int k = 0; k < kRows; ++k) most[k] = none;
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      V column = load(columns + c);
      for (int k = 0; k < kRows; ++k) {
        const V z = load(t.data + (r + k) * t.stride + c);
        most[k] = larger<R>(most[k], z);
        column = larger<R>(column, z);
      }
      store(columns + c, column);
    }
    for (int k = 0; k < kRows; ++k) rows[r + k] = lane_max<R>(most[k]);
  });
}

// Sums of exp(z - shift); without kShifts of exp z, which then is formed once for both sides.
template <class R, bool kShifts, bool kColumns, bool kMean>
void sum_exp_of(const Tile<R>& t, const Sums<R>& s) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  constexpr bool kColumnMean = kColumns && kMean;
  if (kColumns) {
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      store(s.columns + c, V{});
      if (kColumnMean) store(s.column_weighted + c, V{});
    }
  }
  by_four(t.rows, [&](auto count, int64_t r) {
    constexpr int kRows = decltype(count)::value;
    V sum[kRows], weighted[kRows];
    for (int k = 0; k < kRows; ++k) sum[k] = weighted[k] = V{};
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      V column{}, column_weighted{}, shift{};
      if (kColumns) column = load(s.columns + c);
      if (kColumnMean) column_weighted = load(s.column_weighted + c);
      if (kShifts && kColumns) shift = load(s.column_shifts + c);
      for (int k = 0; k < kRows; ++k) {
        const V z = load(t.data + (r + k) * t.stride + c);
        const V weight = z > V{} - infinity_<R>() ? z : V{};
        const V e = exp_of(kShifts ? z - s.row_shifts[r + k] : z);
        sum[k] += e;
        if (kMean) weighted[k] += e * weight;
        if (kColumns) {
          const V f = kShifts ? exp_of(z - shift) : e;
          column += f;
          if (kMean) column_weighted += f * weight;
        }
      }
      if (kColumns) store(s.columns + c, column);
      if (kColumnMean) store(s.column_weighted + c, column_weighted);
    }
    for (int k = 0; k < kRows; ++k) {
      s.rows[r + k] = lane_sum<R>(sum[k]);
      if (kMean) s.weighted[r + k] = lane_sum<R>(weighted[k]);
    }
  });
}
template <class R>
void sum_exp(const Tile<R>& t, const Sums<R>& s) {
  const int which = (s.row_shifts ? 4 : 0) + (s.columns ? 2 : 0) + (s.weighted ? 1 : 0);
  constexpr void (*kTable[])(const Tile<R>&, const Sums<R>&) = {
      sum_exp_of<R, false, false, false>, sum_exp_of<R, false, false, true>,
      sum_exp_of<R, false, true, false>,  sum_exp_of<R, false, true, true>,
      sum_exp_of<R, true, false, false>,  sum_exp_of<R, true, false, true>,
      sum_exp_of<R, true, true, false>,   sum_exp_of<R, true, true, true>};
  kTable[which](t, s);
}

// exp of x = z - lse, a part of 1: at most that, where a z that was rounded in the other order
// (z_ji for z_ij, of a tensor with itself) is above its lse.
template <class R>
PYLOSS_INLINE typename Vec<R>::V share_of(typename Vec<R>::V x) {
  return exp_of(x > typename Vec<R>::V{} ? typename Vec<R>::V{} : x);
}

// z becomes its gradient, without positives: exp(z - shift_r) f_r + exp(z - shift_c) f_c.
template <class R, bool kShifts, bool kColumns>
void softmax_gradient_of(const Tile<R>& t, const Terms<R>& rows, const Terms<R>& columns) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  by_four(t.rows, [&](auto count, int64_t r) {
    constexpr int kRows = decltype(count)::value;
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      V factor{}, shift{};
      if (kColumns) factor = load_part(columns.factor + c, t.columns - c);
      if (kShifts && kColumns) shift = load_part(columns.shift + c, t.columns - c);
      for (int k = 0; k < kRows; ++k) {
        R* const at = t.data + (r + k) * t.stride + c;
        const V z = load(at);
        V grad;
        if (kShifts) {
          grad = share_of<R>(z - rows.shift[r + k]) * rows.factor[r + k];
          if (kColumns) grad += share_of<R>(z - shift) * factor;
        } else {
          grad = exp_of(z) * (factor + rows.factor[r + k]);
        }
        store(at, grad);
      }
    }
  });
}
template <class R>
void softmax_gradient(const Tile<R>& t, const Terms<R>& rows, const Terms<R>& columns) {
  const int which = (rows.shift ? 2 : 0) + (columns.factor ? 1 : 0);
  constexpr void (*kTable[])(const Tile<R>&, const Terms<R>&, const Terms<R>&) = {
      softmax_gradient_of<R, false, false>, softmax_gradient_of<R, false, true>,
      softmax_gradient_of<R, true, false>, softmax_gradient_of<R, true, true>};
  kTable[which](t, rows, columns);
}

// ---- pairs of equal ids: row_ids and column_ids are those of the tile
// -------------------------------------------------------------------------------------------------

template <class R>
void hide_equal(const Tile<R>& t, const int64_t* row_ids, const int64_t* column_ids) {
  for (int64_t r = 0; r < t.rows; ++r) {
    R* const z = t.data + r * t.stride;
    const int64_t id = row_ids[r];
    for (int64_t c = 0; c < t.columns; ++c) z[c] = column_ids[c] == id ? -infinity_<R>() : z[c];
  }
}

// Sums of z, and numbers of pairs; the columns' may be null.
template <class R>
void sum_equal(const Tile<R>& t, const int64_t* row_ids, const int64_t* column_ids,
               const EqualSums<R>& s) {
  constexpr int kWays = 16;
  if (s.columns) {
    for (int64_t c = 0; c < t.columns; ++c) s.columns[c] = R(0);
    for (int64_t c = 0; c < t.columns; ++c) s.column_counts[c] = 0;
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const R* const z = t.data + r * t.stride;
    const int64_t id = row_ids[r];
    R sum[kWays] = {};
    int64_t many = 0;
    for (int64_t c0 = 0; c0 < t.columns; c0 += kWays) {
      const int64_t n = std::min<int64_t>(kWays, t.columns - c0);
      for (int64_t k = 0; k < n; ++k) {
        const bool equal = column_ids[c0 + k] == id;
        sum[k] += equal ? z[c0 + k] : R(0);
        many += equal;
      }
    }
    R total = 0;
    for (R x : sum) total += x;
    s.rows[r] = total;
    s.row_counts[r] = many;
    if (!s.columns || many == 0) continue;
    for (int64_t c = 0; c < t.columns; ++c) {
      const bool equal = column_ids[c] == id;
      s.columns[c] += equal ? z[c] : R(0);
      s.column_counts[c] += equal;
    }
  }
}

// Adds positive_r + positive_c to the gradient of pairs of equal ids; the columns' may be null.
template <class R>
void add_equal(const Tile<R>& t, const int64_t* row_ids, const int64_t* column_ids, const R* rows,
               const R* columns) {
  for (int64_t r = 0; r < t.rows; ++r) {
    R* const grad = t.data + r * t.stride;
    const int64_t id = row_ids[r];
    const R h = rows ? rows[r] : R(0);
    if (columns) {
      for (int64_t c = 0; c < t.columns; ++c) {
        grad[c] += column_ids[c] == id ? h + columns[c] : R(0);
      }
    } else {
      for (int64_t c = 0; c < t.columns; ++c) grad[c] += column_ids[c] == id ? h : R(0);
    }
  }
}

// ---- sums that are no softmax
// -------------------------------------------------------------------------------------------------

template <class R>
void to_signed(const Tile<R>& t, R bias, Ids ids) {
  for (int64_t r = 0; r < t.rows; ++r) {
    R* const z = t.data + r * t.stride;
    for (int64_t c = 0; c < t.columns; ++c) z[c] += bias;
    if (!ids.rows) continue;
    const int64_t id = ids.rows[r];
    for (int64_t c = 0; c < t.columns; ++c) z[c] = ids.columns[c] == id ? -z[c] : z[c];
  }
}

// e = exp(-|u|), of which softplus and sigmoid are made without overflow.
template <class R>
PYLOSS_INLINE typename Vec<R>::V exp_below(typename Vec<R>::V u) {
  return exp_of(u > typename Vec<R>::V{} ? -u : u);
}
// log(1 + e), 0 <= e <= 1, to the last digits of e however small: 2 artanh(e / (2 + e)).
PYLOSS_INLINE Vec<float>::V log1p_of(Vec<float>::V e) {
  const Vec<float>::V s = e / (2.0f + e), q = s * s;
  const Vec<float>::V tail =
      1 / 3.0f + q * (1 / 5.0f + q * (1 / 7.0f + q * (1 / 9.0f + q * (1 / 11.0f + q / 13.0f))));
  return 2.0f * (s + s * q * tail);
}
PYLOSS_INLINE Vec<double>::V log1p_of(Vec<double>::V e) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) e[i] = ::log1p(e[i]);
  return e;
}

// Of u, padded with -inf; columns may be null.
template <class R>
void sum_softplus(const Tile<R>& t, R* rows, R* columns) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  for (int64_t c = 0; columns && c < t.columns; c += kLanes) store(columns + c, V{});
  for (int64_t r = 0; r < t.rows; ++r) {
    V sum{};
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      const V u = load(t.data + r * t.stride + c);
      const V y = (u > V{} ? u : V{}) + log1p_of(exp_below<R>(u));
      sum += y;
      if (columns) store(columns + c, load(columns + c) + y);
    }
    rows[r] = lane_sum<R>(sum);
  }
}

// u becomes -y sigmoid(u) (g_r + g_c); g of the columns may be null.
template <class R>
void sigmoid_gradient(const Tile<R>& t, Ids ids, const R* rows, const R* columns) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    R* const at = t.data + r * t.stride;
    for (int64_t c = 0; c < t.columns; c += kLanes) {
      const V u = load(at + c), e = exp_below<R>(u), one = V{} + R(1);
      V g = V{} + rows[r];
      if (columns) g += load_part(columns + c, t.columns - c);
      store(at + c, (u > V{} ? one : e) / (one + e) * g);
    }
    if (!ids.rows) continue;
    const int64_t id = ids.rows[r];
    for (int64_t c = 0; c < t.columns; ++c) at[c] = ids.columns[c] == id ? -at[c] : at[c];
  }
}

// Without branches, so that the compiler vectorises it: what a pair brings to the one and the other
// sum, 0 where it does not belong there. Not "z >= above": what is no number belongs to the sum.
template <class R, bool kIds, bool kColumns>
void sum_margins_of(const Tile<R>& t, R above, R below, Ids ids, const PairSums<R>& s) {
  constexpr int kWays = 16;
  for (int64_t r = 0; r < t.rows; ++r) {
    const R* const z = t.data + r * t.stride;
    const int64_t id = kIds ? ids.rows[r] : 0;
    R sums[2][kWays] = {};
    R counts[2][kWays] = {};
    for (int64_t c0 = 0; c0 < t.columns; c0 += kWays) {
      const int64_t n = std::min<int64_t>(kWays, t.columns - c0);
      for (int64_t k = 0; k < n; ++k) {
        const R x = z[c0 + k];
        const bool positive = kIds && ids.columns[c0 + k] == id;
        const bool high = !positive && !(x < above), low = positive && !(x > below);
        const R y0 = high ? x - above : R(0), y1 = low ? below - x : R(0);
        sums[0][k] += y0;
        counts[0][k] += high ? R(1) : R(0);
        if (kIds) {
          sums[1][k] += y1;
          counts[1][k] += low ? R(1) : R(0);
        }
        if (kColumns) {
          s.columns[0][c0 + k] += y0;
          s.column_counts[0][c0 + k] += high;
          if (kIds) {
            s.columns[1][c0 + k] += y1;
            s.column_counts[1][c0 + k] += low;
          }
        }
      }
    }
    for (int side = 0; side < 2; ++side) {
      R sum = 0, count = 0;
      for (int k = 0; k < kWays; ++k) sum += sums[side][k], count += counts[side][k];
      s.rows[side][r] = sum;
      s.row_counts[side][r] = int64_t(count);
    }
  }
}
template <class R>
void sum_margins(const Tile<R>& t, R above, R below, Ids ids, const PairSums<R>& s) {
  for (int side = 0; s.columns[0] && side < 2; ++side) {
    std::fill(s.columns[side], s.columns[side] + t.columns, R(0));
    std::fill(s.column_counts[side], s.column_counts[side] + t.columns, int64_t(0));
  }
  const auto run =
      ids.rows ? (s.columns[0] ? sum_margins_of<R, true, true> : sum_margins_of<R, true, false>)
               : (s.columns[0] ? sum_margins_of<R, false, true> : sum_margins_of<R, false, false>);
  run(t, above, below, ids, s);
}

// g: of the rows and of the columns, each of negatives and positives; any may be null.
template <class R>
void margin_gradient(const Tile<R>& t, R above, R below, Ids ids, const R* const* rows,
                     const R* const* columns) {
  const auto of = [](const R* g, int64_t at) { return g ? g[at] : R(0); };
  for (int64_t r = 0; r < t.rows; ++r) {
    R* const z = t.data + r * t.stride;
    const R high = of(rows[0], r), low = of(rows[1], r);
    const auto each = [&](auto high_of, auto low_of) {
      if (!ids.rows) {
        for (int64_t c = 0; c < t.columns; ++c) z[c] = z[c] < above ? R(0) : high_of(c);
        return;
      }
      const int64_t id = ids.rows[r];
      for (int64_t c = 0; c < t.columns; ++c) {
        const R x = z[c], g0 = high_of(c), g1 = -low_of(c);
        const R negative = x < above ? R(0) : g0, positive = x > below ? R(0) : g1;
        z[c] = ids.columns[c] == id ? positive : negative;
      }
    };
    if (columns[0] && columns[1]) {
      const R *g0 = columns[0], *g1 = columns[1];
      each([=](int64_t c) { return high + g0[c]; }, [=](int64_t c) { return low + g1[c]; });
    } else {
      each([&](int64_t c) { return high + of(columns[0], c); },
           [&](int64_t c) { return low + of(columns[1], c); });
    }
  }
}

// ---- rows of the user's tensors
// -------------------------------------------------------------------------------------------------

// to = factor from
template <class R>
void read_scaled(const void* from, DType dtype, int64_t n, R factor, R* to) {
  dispatch_float(dtype, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(from);
    for (int64_t l = 0; l < n; ++l) to[l] = factor * R(to_float(x[l]));
  });
}
template <class R>
void write_scaled(const R* from, int64_t n, R factor, DType dtype, void* to) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<R, double> == std::is_same_v<T, double>) {
      T* x = static_cast<T*>(to);
      for (int64_t l = 0; l < n; ++l) x[l] = FromFloat<T>::of(factor * from[l]);
    }
  });
}
template <class R>
R dot(const R* x, const R* y, int64_t n) {
  using V = typename Vec<R>::V;
  constexpr int64_t kLanes = Vec<R>::kLanes;
  V sum{};
  for (int64_t l = 0; l < n; l += kLanes) sum += load_part(x + l, n - l) * load_part(y + l, n - l);
  return lane_sum<R>(sum);
}
// to = from / by
template <class R>
void divide(const R* from, int64_t n, R by, R* to) {
  for (int64_t l = 0; l < n; ++l) to[l] = from[l] / by;
}
// x = (x - along y) / by
template <class R>
void take_away(const R* y, int64_t n, R along, R by, R* x) {
  for (int64_t l = 0; l < n; ++l) x[l] = (x[l] - along * y[l]) / by;
}

template <class R>
TileMath<R> math_of() {
  return {pad<R>,          maxima<R>,           sum_exp<R>,     softmax_gradient<R>,
          hide_equal<R>,   sum_equal<R>,        add_equal<R>,   to_signed<R>,
          sum_softplus<R>, sigmoid_gradient<R>, sum_margins<R>, margin_gradient<R>,
          read_scaled<R>,  write_scaled<R>,     dot<R>,         divide<R>,
          take_away<R>};
}
