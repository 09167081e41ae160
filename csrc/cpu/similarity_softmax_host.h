// What the kernels over all pairs of rows share: operands, the loop over the tiles, and what
// becomes of the gradients of the logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "cpu/gemm.h"
#include "cpu/similarity_softmax_math.h"
#include "cpu/similarity_softmax_plan.h"
#include "cpu/similarity_softmax_rounds.h"
#include "cpu/tasks.h"

namespace pyloss::cpu {

using gemm::Form;
using gemm::Left;
using gemm::Right;
using gemm::Tile;
using similarity::Kinds;
using similarity_tiles::tile_math;
using similarity_tiles::TileMath;

// ---- operands
// -------------------------------------------------------------------------------------------------

// Rows of a user's tensor as R, times a factor or the factor of each.
template <class R>
struct Source {
  const void* data;
  DType dtype;
  int64_t rows, d;
  R factor;
  const R* factors;

  bool direct() const {
    return dtype == (std::is_same_v<R, double> ? DType::kF64 : DType::kF32) && factor == R(1) &&
           !factors;
  }
  // Some rows; in `buffer` where they are not there as they are needed.
  const R* get(int64_t first, int64_t n, R* buffer) const {
    if (direct()) return static_cast<const R*>(data) + first * d;
    const char* from = static_cast<const char*>(data) + first * d * dtype_size(dtype);
    const auto read = tile_math<R>().read_scaled;
    if (!factors) {
      read(from, dtype, n * d, factor, buffer);
      return buffer;
    }
    for (int64_t r = 0; r < n; ++r) {
      read(from + r * d * dtype_size(dtype), dtype, d, factors[first + r], buffer + r * d);
    }
    return buffer;
  }
};

// Some rows, transposed, as the right operand of logits.
template <class R>
Right<R> packed_transposed(const Source<R>& x, Range at, R* rows, R* to) {
  const R* from = x.get(at.first, at.n, rows);
  return gemm::pack_right(gemm::row_major(from, at.n, x.d, x.d).transposed(), to);
}
// Some rows as the right operand of gradients.
template <class R>
Right<R> packed_rows(const Source<R>& x, Range at, R* rows, R* to) {
  return gemm::pack_right(gemm::row_major(x.get(at.first, at.n, rows), at.n, x.d, x.d), to);
}

// The operands of a problem: z = left (right of scores).
template <class R>
struct Operands {
  Source<R> queries, keys;  // as they are
  Source<R> left;           // with the scales of each
  R scale;                  // of all
  const R* scales;          // of each, or null

  explicit Operands(const SimilarityProblem& p) {
    const R* given = static_cast<const R*>(p.scales);
    scales = p.scale_of_each ? given : nullptr;
    scale = p.scale_of_each ? R(1) : (given ? given[0] : R(p.scale));
    queries = {p.queries, p.dtype, p.n, p.d, R(1), nullptr};
    keys = {p.keys, p.dtype, p.m, p.d, R(1), nullptr};
    left = {p.queries, p.dtype, p.n, p.d, R(1), scales};
  }
  Source<R> scaled_keys() const {
    return {keys.data, keys.dtype, keys.rows, keys.d, scale, nullptr};
  }
};

// ---- pairs that are looked at one by one
// -------------------------------------------------------------------------------------------------

// Those of a tile, with their logits; of both directions where the keys are queries too.
template <class R>
int64_t find_specials(const Kinds& kinds, bool itself, const Tile<R>& t, Special<R>* to) {
  int64_t count = 0;
  const auto take = [&](int64_t r, int64_t c) { to[count++] = {r, c, t.data[r * t.stride + c]}; };
  const auto of_queries = [&](int64_t first, int64_t n, int64_t other, int64_t m, auto&& found) {
    for (int64_t k = 0; k < n; ++k) {
      const int64_t own = kinds.own(first + k), target = kinds.target_of(first + k);
      if (own >= other && own < other + m) found(k, own - other);
      if (target >= other && target < other + m && target != own) found(k, target - other);
    }
  };
  if (kinds.first < 0 && !kinds.target) return 0;
  of_queries(t.row, t.rows, t.column, t.columns, take);
  if (itself) {
    of_queries(t.column, t.columns, t.row, t.rows, [&](int64_t c, int64_t r) {
      if (!kinds.special(t.row + r, t.column + c)) take(r, c);
    });
  }
  return count;
}
template <class R>
void overwrite(const Tile<R>& t, const Special<R>* specials, int64_t count, R value) {
  for (int64_t k = 0; k < count; ++k)
    t.data[specials[k].row * t.stride + specials[k].column] = value;
}

inline bool hides_equal(const Kinds& k) {
  return k.query_ids && ((k.flags & similarity::kDrop) || (k.flags & similarity::kNegatives));
}
inline bool has_equal_positives(const Kinds& k) {
  return k.query_ids && (k.flags & similarity::kPositive);
}

// ---- loops over all tiles
// -------------------------------------------------------------------------------------------------

// on_tile(tile of logits, buffers of the thread, whether its columns get statistics too): those of
// the keys, or where these are the queries, their own.
template <class R, class OnTile>
void for_all_tiles(const SimilarityProblem& p, const SimilarityPlan& plan, const Operands<R>& o,
                   const SimilaritySlots<R>& slots, bool columns, const OnTile& on_tile) {
  const auto pair = [&](int64_t slot, int64_t i, int64_t j) {
    const SimilaritySlot<R> buffers = slots.at(slot);
    const Range rows = plan.rows(i), keys = plan.keys(j);
    const Right<R> right = packed_transposed(o.scaled_keys(), keys, buffers.rows, buffers.scores);
    const Left<R> left{o.left.get(rows.first, rows.n, buffers.rows), rows.n, p.d, p.d, Form::kRows};
    const bool both = p.itself ? i != j : columns;
    gemm::stream(left, rows.first, right, plan.width, buffers.tile, [&](Tile<R> t) {
      t.column += keys.first;
      on_tile(t, buffers, both);
    });
  };
  run_pairs(plan.rounds, slots.count, columns, pair);
}

// Sums of the gradients of the logits, for a bias. Of a tensor with itself a tile holds G and its
// transpose; the tiles on the diagonal then have every pair twice.
template <class R>
void add_gradient_sums(const Tile<R>& t, bool once, double* sums) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const R* grad = t.data + r * t.stride;
    double sum = 0;
    for (int64_t c = 0; c < t.columns; ++c) sum += grad[c];
    sums[t.row + r] += once ? sum : sum / 2;
  }
}

// on_tile(tile of logits, buffers of the thread) makes of the tile that of their gradients, which
// is multiplied on.
template <class R, class OnTile>
void accumulate(const SimilarityProblem& p, const SimilarityPlan& plan, const Operands<R>& o,
                const BackwardBuffers<R>& b, const SimilarityGradients& g, const OnTile& on_tile) {
  const TileMath<R>& math = tile_math<R>();
  const bool of_queries = g.dq || g.dscale, of_keys = g.dk != nullptr;
  R* const dq = b.dq ? b.dq : static_cast<R*>(g.dq);
  R* const dk = p.itself ? dq : (b.dk ? b.dk : static_cast<R*>(g.dk));
  if (b.gradient_sums) std::fill(b.gradient_sums, b.gradient_sums + p.n, 0.0);
  if (of_queries) std::fill(dq, dq + p.n * p.d, R(0));
  if (of_keys) std::fill(dk, dk + p.m * p.d, R(0));
  const auto pair = [&](int64_t slot, int64_t i, int64_t j) {
    const SimilaritySlot<R> buffers = b.slots.at(slot);
    const Range rows = plan.rows(i), columns = plan.keys(j);
    const bool both = p.itself ? i != j && of_queries : of_keys;
    Right<R> keys{}, queries{};
    if (of_queries) keys = packed_rows(o.keys, columns, buffers.rows, buffers.keys);
    if (both) queries = packed_rows(o.left, rows, buffers.rows, buffers.queries);
    const Right<R> right =
        packed_transposed(o.scaled_keys(), columns, buffers.rows, buffers.scores);
    const Left<R> left{o.left.get(rows.first, rows.n, buffers.rows), rows.n, p.d, p.d, Form::kRows};
    gemm::stream(left, rows.first, right, plan.width, buffers.tile, [&](const Tile<R>& t) {
      Tile<R> whole = t;
      whole.column += columns.first;
      on_tile(whole, buffers);
      if (b.gradient_sums) add_gradient_sums(whole, !p.itself || i != j, b.gradient_sums);
      if (of_queries) gemm::add_product(t, keys, dq + rows.first * p.d, p.d);
      if (both) gemm::add_transposed_product(t, queries, dk + whole.column * p.d, p.d);
    });
  };
  run_pairs(plan.rounds, b.slots.count, of_keys, pair);
  // dq is G K so far.
  const int64_t blocks = of_queries ? blocks_of(p.n, kPackRows) : 0;
  run_tasks(blocks, slots_for(blocks, b.slots.count), [&](int64_t slot, int64_t block) {
    const int64_t first = block * kPackRows, n = std::min(kPackRows, p.n - first);
    const R* q = g.dscale ? o.queries.get(first, n, b.slots.at(slot).rows) : nullptr;
    for (int64_t r = 0; r < n; ++r) {
      const R* row = dq + (first + r) * p.d;
      if (q) b.dots[first + r] = math.dot(q + r * p.d, row, p.d);
      if (g.dq) {
        const R factor = o.scales ? o.scales[first + r] : o.scale;
        char* to = static_cast<char*>(g.dq) + (first + r) * p.d * dtype_size(p.dtype);
        math.write_scaled(row, p.d, factor, p.dtype, to);
      }
    }
  });
  if (of_keys) math.write_scaled(dk, p.m * p.d, o.scale, p.dtype, g.dk);
  if (g.dscale && o.scales) {
    for (int64_t i = 0; i < p.n; ++i) static_cast<R*>(g.dscale)[i] = R(b.dots[i]);
  } else if (g.dscale) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i) sum += b.dots[i];
    *static_cast<R*>(g.dscale) = R(p.itself ? sum / 2 : sum);  // G and its transpose
  }
  if (b.gradient_sums) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i) sum += b.gradient_sums[i];
    *static_cast<R*>(g.dbias) = R(sum);
  }
}

}  // namespace pyloss::cpu
