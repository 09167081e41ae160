// Softmax statistics over all pairs of queries and keys on the CPU.
//
// Decomposition: blocks of kBlock queries and keys; a task is a pair of blocks, whose logits come
// as tiles of a product (gemm.h), and both of its blocks get their statistics, or their gradients,
// from the tile while it is in the cache. Pairs of blocks are run in rounds in which no block
// occurs twice (similarity_softmax_rounds.h): no atomics, no partial gradients, and a block adds up
// its terms in one order whatever the number of threads. Of a tensor with itself each pair of
// blocks is multiplied once, for both triangles. Memory traffic: a pair reads its two blocks, and
// for the gradient adds to theirs; the logits never leave the cache. Memory: O(n + m), and for each
// thread four blocks of features and a tile. Numerics: where the norms say that no |z| can exceed
// exp_limit, exp z is summed as it is, once for row and column; else with the largest z so far
// taken off, once for each. Sums of tiles are of R, sums over tiles double.
#include "cpu/similarity_softmax.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/math.h"
#include "cpu/similarity_softmax_host.h"
#include "cpu/similarity_softmax_plan.h"
#include "cpu/tasks.h"

namespace pyloss::cpu {
namespace {

using similarity_tiles::Terms;

// exp of it, and the sum of 2^31 such, are normal numbers.
template <class R>
double exp_limit() {
  return std::is_same_v<R, double> ? 600.0 : 60.0;
}

// The largest norm of a row; blocks of rows in parallel, `squares` has room for one of each.
template <class R>
double largest_norm(const Source<R>& x, const SimilaritySlots<R>& slots, double* squares) {
  const int64_t blocks = blocks_of(x.rows, kPackRows);
  run_tasks(blocks, slots_for(blocks, slots.count), [&](int64_t slot, int64_t block) {
    const int64_t first = block * kPackRows, n = std::min(kPackRows, x.rows - first);
    const R* rows = x.get(first, n, slots.at(slot).rows);
    double most = 0;  // what is no number shows in every exp, with or without shifts
    for (int64_t r = 0; r < n; ++r) {
      most = std::max(most, double(tile_math<R>().dot(rows + r * x.d, rows + r * x.d, x.d)));
    }
    squares[block] = most;
  });
  return blocks == 0 ? 0 : std::sqrt(*std::max_element(squares, squares + blocks));
}

template <class R>
bool bounded(const SimilarityProblem& p, const Operands<R>& o, const SimilaritySlots<R>& slots,
             double* squares) {
  if (p.unit_rows) return std::fabs(double(o.scale)) <= exp_limit<R>();
  const double of_left = largest_norm(o.left, slots, squares);
  const double of_keys = p.itself ? of_left : largest_norm(o.keys, slots, squares);
  return of_left * of_keys * std::fabs(double(o.scale)) <= exp_limit<R>();
}

// ---- statistics
// -------------------------------------------------------------------------------------------------

// What comes to a row's, or column's, statistics from one tile.
template <class R>
void add_maxima(const Side<R>& s, int64_t first, int64_t n, const R* maxima, R* shifts) {
  for (int64_t k = 0; k < n; ++k) {
    const int64_t at = first + k;
    shifts[k] = s.raise(at, maxima[k]);
  }
}
template <class R>
void add_sums(const Side<R>& s, int64_t first, int64_t n, const R* sums, const R* weighted) {
  for (int64_t k = 0; k < n; ++k) s.sum[first + k] += sums[k];
  if (!s.weighted) return;
  for (int64_t k = 0; k < n; ++k) s.weighted[first + k] += weighted[k];
}
template <class R>
void add_equal(const Side<R>& s, const Kinds& kinds, int64_t first, int64_t n, const R* sums,
               const int64_t* counts) {
  for (int64_t k = 0; k < n; ++k) {
    if (has_equal_positives(kinds)) {
      s.positive[first + k] += sums[k];
      s.positives[first + k] += counts[k];
    }
    if (hides_equal(kinds)) s.left_out[first + k] += counts[k];
  }
}
// The pair (i, j) of a query and a key, for the row or column `at`.
template <class R>
void add_special(const Side<R>& s, const Kinds& kinds, int64_t i, int64_t j, int64_t at, R z,
                 bool shifts) {
  if (kinds.equal(i, j)) {  // was counted with the others
    if (has_equal_positives(kinds)) s.positives[at] -= 1;
    if (hides_equal(kinds)) s.left_out[at] -= 1;
  }
  if (kinds.positive(i, j)) {
    s.positive[at] += z;
    s.positives[at] += 1;
  }
  if (!kinds.counted(i, j)) {
    s.left_out[at] += 1;
    return;
  }
  const double e = exp_(shifts ? double(z) - s.raise(at, z) : double(z));
  s.sum[at] += e;
  if (s.weighted) s.weighted[at] += e > 0 ? e * z : 0.0;
}

template <class R>
struct Forward {
  const SimilarityProblem& p;
  const TileMath<R>& math;
  Side<R> rows, columns;
  bool shifts;

  // `both`: the columns have statistics too; where the keys are the queries, as queries.
  void operator()(const Tile<R>& t, const SimilaritySlot<R>& b, bool both) const {
    const Kinds& kinds = p.kinds;
    const Side<R>& others = p.itself ? rows : columns;
    math.pad(t);
    const int64_t count = find_specials(kinds, p.itself, t, b.specials);
    if (kinds.query_ids) {
      const int64_t *row_ids = kinds.query_ids + t.row, *column_ids = kinds.key_ids + t.column;
      overwrite(t, b.specials, count, R(0));
      math.sum_equal(t, row_ids, column_ids,
                     {b.row_sums, both ? b.column_sums : nullptr, b.row_counts, b.column_counts});
      add_equal(rows, kinds, t.row, t.rows, b.row_sums, b.row_counts);
      if (both) add_equal(others, kinds, t.column, t.columns, b.column_sums, b.column_counts);
      if (hides_equal(kinds)) math.hide_equal(t, row_ids, column_ids);
    }
    overwrite(t, b.specials, count, -infinity_<R>());
    if (shifts) {
      math.maxima(t, b.row_sums, b.column_sums);
      add_maxima(rows, t.row, t.rows, b.row_sums, b.row_shifts);
      if (both) add_maxima(others, t.column, t.columns, b.column_sums, b.column_shifts);
    }
    const bool mean = rows.weighted != nullptr;
    math.sum_exp(t, {shifts ? b.row_shifts : nullptr, shifts ? b.column_shifts : nullptr,
                     b.row_sums, both ? b.column_sums : nullptr, mean ? b.weighted : nullptr,
                     mean ? b.column_weighted : nullptr});
    add_sums(rows, t.row, t.rows, b.row_sums, b.weighted);
    if (both) add_sums(others, t.column, t.columns, b.column_sums, b.column_weighted);
    for (int64_t k = 0; k < count; ++k) {
      const Special<R>& s = b.specials[k];
      const int64_t i = t.row + s.row, j = t.column + s.column;
      add_special(rows, kinds, i, j, i, s.z, shifts);
      if (!both) continue;
      if (p.itself) {
        add_special(rows, kinds, j, i, j, s.z, shifts);
      } else {
        add_special(columns, kinds, i, j, j, s.z, shifts);
      }
    }
  }
};

template <class R>
void write_stats(const Side<R>& s, const SimilarityStats& to, void* mean, int64_t n, int64_t others,
                 bool shifts) {
  for (int64_t i = 0; i < n; ++i) {
    const double shift = shifts && s.sum[i] != 0 ? double(s.most[i]) : 0.0;
    static_cast<R*>(to.lse)[i] = R(shift + log_(s.sum[i]));
    static_cast<R*>(to.positive)[i] = R(s.positive[i]);
    static_cast<R*>(to.count)[i] = R(others - s.left_out[i]);
    static_cast<R*>(to.positives)[i] = R(s.positives[i]);
    if (mean) static_cast<R*>(mean)[i] = s.sum[i] == 0 ? R(0) : R(s.weighted[i] / s.sum[i]);
  }
}

template <class R>
void forward_of(const SimilarityProblem& p, const SimilarityForward& f, void* scratch,
                int threads) {
  const SimilarityPlan plan(p);
  const bool columns = f.columns.lse != nullptr;
  Arena arena(scratch);
  const ForwardBuffers<R> b(p, plan, columns, f.mean != nullptr, threads, arena);
  b.clear(p);
  const Operands<R> o(p);
  const bool shifts = !bounded(p, o, b.slots, b.squares);
  const Forward<R> on_tile{p, tile_math<R>(), b.rows, b.columns, shifts};
  for_all_tiles(p, plan, o, b.slots, columns, on_tile);
  write_stats(b.rows, f.rows, f.mean, p.n, p.m, shifts);
  if (columns) write_stats(b.columns, f.columns, nullptr, p.m, p.n, shifts);
}

// ---- gradients
// -------------------------------------------------------------------------------------------------

// What a row, or column, brings to the gradient of its logits.
template <class R>
Terms<R> terms_of(const SimilarityCotangents& c, int64_t n, bool shifts, const TermBuffers<R>& to) {
  const R *lse = static_cast<const R*>(c.lse), *g = static_cast<const R*>(c.of_lse);
  for (int64_t i = 0; i < n; ++i) {
    const bool nothing = !g || lse[i] == -infinity_<R>();
    if (shifts) {
      to.shift[i] = nothing ? infinity_<R>() : lse[i];
      to.factor[i] = nothing ? R(0) : g[i];
    } else {
      to.factor[i] = nothing ? R(0) : g[i] * R(exp_(-lse[i]));
    }
  }
  return {to.factor, shifts ? to.shift : nullptr, static_cast<const R*>(c.of_positive)};
}
template <class R>
Terms<R> from(const Terms<R>& t, int64_t first) {
  const auto at = [&](const R* x) { return x ? x + first : nullptr; };
  return {at(t.factor), at(t.shift), at(t.positive)};
}
template <class R>
R special_gradient(const Terms<R>& t, const Kinds& kinds, int64_t i, int64_t j, int64_t at, R z) {
  R grad = 0;
  if (t.factor && kinds.counted(i, j)) {
    const R x = t.shift ? z - t.shift[at] : z;
    grad += R(exp_(t.shift && x > 0 ? R(0) : x)) * t.factor[at];
  }
  if (t.positive && kinds.positive(i, j)) grad += t.positive[at];
  return grad;
}

template <class R>
struct Backward {
  const SimilarityProblem& p;
  const TileMath<R>& math;
  Terms<R> rows, columns;

  // The tile of logits becomes that of their gradients.
  void operator()(const Tile<R>& t, const SimilaritySlot<R>& b) const {
    const Kinds& kinds = p.kinds;
    const Terms<R>& others = p.itself ? rows : columns;
    math.pad(t);
    const int64_t count = find_specials(kinds, p.itself, t, b.specials);
    const int64_t* row_ids = kinds.query_ids ? kinds.query_ids + t.row : nullptr;
    const int64_t* column_ids = kinds.query_ids ? kinds.key_ids + t.column : nullptr;
    if (hides_equal(kinds)) math.hide_equal(t, row_ids, column_ids);
    overwrite(t, b.specials, count, -infinity_<R>());
    const Terms<R> of_rows = from(rows, t.row), of_columns = from(others, t.column);
    math.softmax_gradient(t, of_rows, of_columns);
    if (has_equal_positives(kinds) && (of_rows.positive || of_columns.positive)) {
      math.add_equal(t, row_ids, column_ids, of_rows.positive, of_columns.positive);
    }
    for (int64_t k = 0; k < count; ++k) {
      const Special<R>& s = b.specials[k];
      const int64_t i = t.row + s.row, j = t.column + s.column;
      R grad = special_gradient(rows, kinds, i, j, i, s.z);
      grad += p.itself ? special_gradient(rows, kinds, j, i, j, s.z)
                       : special_gradient(columns, kinds, i, j, j, s.z);
      t.data[s.row * t.stride + s.column] = grad;
    }
  }
};

template <class R>
void backward_of(const SimilarityProblem& p, const SimilarityBackward& g, void* scratch,
                 int threads) {
  const SimilarityPlan plan(p);
  Arena arena(scratch);
  const BackwardBuffers<R> b(p, plan, wants_of(g.to), threads, arena);
  const Operands<R> o(p);
  const TileMath<R>& math = tile_math<R>();
  const bool shifts = !bounded(p, o, b.slots, b.squares);
  Backward<R> on_tile{p, math, terms_of<R>(g.rows, p.n, shifts, b.row_terms), {}};
  if (g.columns.of_lse || g.columns.of_positive) {
    on_tile.columns = terms_of<R>(g.columns, p.m, shifts, b.column_terms);
  }
  accumulate(p, plan, o, b, g.to, on_tile);
}

}  // namespace

int64_t similarity_softmax_forward_scratch(const SimilarityProblem& p, bool columns, int threads) {
  const SimilarityPlan plan(p);
  Arena count(nullptr);
  if (p.dtype == DType::kF64) {
    ForwardBuffers<double>(p, plan, columns, true, threads, count);
  } else {
    ForwardBuffers<float>(p, plan, columns, true, threads, count);
  }
  return count.used();
}
int64_t similarity_softmax_backward_scratch(const SimilarityProblem& p, const SimilarityWants& w,
                                            int threads) {
  const SimilarityPlan plan(p);
  Arena count(nullptr);
  if (p.dtype == DType::kF64) {
    BackwardBuffers<double>(p, plan, w, threads, count);
  } else {
    BackwardBuffers<float>(p, plan, w, threads, count);
  }
  return count.used();
}

void similarity_softmax_forward(const SimilarityProblem& p, const SimilarityForward& f,
                                void* scratch, int threads) {
  if (p.dtype == DType::kF64) {
    forward_of<double>(p, f, scratch, threads);
  } else {
    forward_of<float>(p, f, scratch, threads);
  }
}
void similarity_softmax_backward(const SimilarityProblem& p, const SimilarityBackward& b,
                                 void* scratch, int threads) {
  if (p.dtype == DType::kF64) {
    backward_of<double>(p, b, scratch, threads);
  } else {
    backward_of<float>(p, b, scratch, threads);
  }
}

}  // namespace pyloss::cpu
