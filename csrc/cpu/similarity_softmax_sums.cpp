// Sums over pairs that are no softmax: the sigmoid loss, and pairs beyond margins. Decomposition,
// traffic and memory are those of similarity_softmax.cpp; sums over tiles are double.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/similarity_softmax.h"
#include "cpu/similarity_softmax_host.h"
#include "cpu/similarity_softmax_plan.h"

namespace pyloss::cpu {
namespace {

using similarity_tiles::Ids;

// Which of the sums a positive belongs to.
int side_of(PairSum kind, bool positive) {
  return kind == PairSum::kMargins && positive ? 1 : 0;
}

// What an own key, or a target, is replaced by in a tile: it then belongs to no sum.
template <class R>
void hide(const Tile<R>& t, const Kinds& kinds, PairSum kind, const Special<R>* specials,
          int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const Special<R>& s = specials[k];
    const bool positive = kind == PairSum::kMargins && has_equal_positives(kinds) &&
                          kinds.equal(t.row + s.row, t.column + s.column);
    t.data[s.row * t.stride + s.column] = positive ? infinity_<R>() : -infinity_<R>();
  }
}

template <class R>
struct Term {
  bool counts;   // whether the pair belongs to a sum
  int side;      // which one
  double value;  // what it adds
  R slope;       // d value / d z
};
// Of the pair (i, j) alone.
template <class R>
Term<R> term_of(const PairSumOptions& o, const Kinds& kinds, int64_t i, int64_t j, R z) {
  if (!kinds.counted(i, j)) return {};
  const bool positive = kinds.positive(i, j);
  const int side = side_of(o.kind, positive);
  if (o.kind == PairSum::kSigmoid) {
    const double y = positive ? 1 : -1, u = -y * (z + o.bias), e = exp_(-std::fabs(u));
    const double value = (u < 0 ? 0.0 : u) + log1p_(e);
    return {true, side, value, R(-y * (u > 0 ? 1.0 : e) / (1.0 + e))};
  }
  if (positive ? z > R(o.below) : z < R(o.above)) return {};
  return {true, side, double(positive ? R(o.below) - z : z - R(o.above)), R(positive ? -1 : 1)};
}

template <class R>
struct OnTile {
  const SimilarityProblem& p;
  const PairSumOptions& o;
  const TileMath<R>& math = tile_math<R>();

  Ids ids(const Tile<R>& t, bool wanted) const {
    if (!wanted) return {nullptr, nullptr};
    return {p.kinds.query_ids + t.row, p.kinds.key_ids + t.column};
  }
  // Special pairs noted and hidden, dropped ones hidden; of the sigmoid z made -y (z + bias).
  int64_t prepare(const Tile<R>& t, const SimilaritySlot<R>& b) const {
    const int64_t count = find_specials(p.kinds, p.itself, t, b.specials);
    if (o.kind == PairSum::kSigmoid) {
      math.to_signed(t, R(o.bias), ids(t, has_equal_positives(p.kinds)));
    }
    math.pad(t);
    if (hides_equal(p.kinds))
      math.hide_equal(t, p.kinds.query_ids + t.row, p.kinds.key_ids + t.column);
    hide(t, p.kinds, o.kind, b.specials, count);
    return count;
  }
};

template <class R>
struct Summing : OnTile<R> {
  const PairSumBuffers<R>& to;

  void add(int64_t first, int64_t n, int side, const R* sums, const int64_t* counts) const {
    for (int64_t k = 0; k < n; ++k) to.sums[side][first + k] += sums[k];
    if (!counts) return;
    for (int64_t k = 0; k < n; ++k) to.counts[side][first + k] += counts[k];
  }
  void add(int64_t i, int64_t j, R z) const {
    const Term<R> term = term_of(this->o, this->p.kinds, i, j, z);
    if (!term.counts) return;
    to.sums[term.side][i] += term.value;
    to.counts[term.side][i] += 1;
  }
  void operator()(const Tile<R>& t, const SimilaritySlot<R>& b, bool both) const {
    const int64_t count = this->prepare(t, b);
    if (this->o.kind == PairSum::kSigmoid) {
      this->math.sum_softplus(t, b.row_sums, both ? b.column_sums : nullptr);
      add(t.row, t.rows, 0, b.row_sums, nullptr);
      if (both) add(t.column, t.columns, 0, b.column_sums, nullptr);
    } else {
      R *const none = nullptr, *const columns = both ? b.column_sums : none;
      this->math.sum_margins(t, R(this->o.above), R(this->o.below),
                             this->ids(t, has_equal_positives(this->p.kinds)),
                             {{b.row_sums, b.row_shifts},
                              {columns, both ? b.column_shifts : none},
                              {b.row_counts, b.row_counts2},
                              {b.column_counts, b.column_counts2}});
      add(t.row, t.rows, 0, b.row_sums, b.row_counts);
      add(t.row, t.rows, 1, b.row_shifts, b.row_counts2);
      if (both) {
        add(t.column, t.columns, 0, b.column_sums, b.column_counts);
        add(t.column, t.columns, 1, b.column_shifts, b.column_counts2);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      const Special<R>& s = b.specials[k];
      add(t.row + s.row, t.column + s.column, s.z);
      if (both) add(t.column + s.column, t.row + s.row, s.z);
    }
  }
};

template <class R>
struct Differentiating : OnTile<R> {
  const R* g[2];  // cotangents, or null

  R special(int64_t i, int64_t j, R z) const {
    const Term<R> term = term_of(this->o, this->p.kinds, i, j, z);
    return term.counts && g[term.side] ? term.slope * g[term.side][i] : R(0);
  }
  void operator()(const Tile<R>& t, const SimilaritySlot<R>& b) const {
    const int64_t count = this->prepare(t, b);
    const Ids ids = this->ids(t, has_equal_positives(this->p.kinds));
    const auto at = [&](const R* x, int64_t first) { return x ? x + first : nullptr; };
    const bool itself = this->p.itself;
    if (this->o.kind == PairSum::kSigmoid) {
      this->math.sigmoid_gradient(t, ids, g[0] + t.row, itself ? g[0] + t.column : nullptr);
    } else {
      const R* const rows[] = {at(g[0], t.row), at(g[1], t.row)};
      const R* const columns[] = {itself ? at(g[0], t.column) : nullptr,
                                  itself ? at(g[1], t.column) : nullptr};
      this->math.margin_gradient(t, R(this->o.above), R(this->o.below), ids, rows, columns);
    }
    for (int64_t k = 0; k < count; ++k) {
      const Special<R>& s = b.specials[k];
      const int64_t i = t.row + s.row, j = t.column + s.column;
      R grad = special(i, j, s.z);
      if (itself) grad += special(j, i, s.z);
      t.data[s.row * t.stride + s.column] = grad;
    }
  }
};

template <class R>
void forward_of(const SimilarityProblem& p, const PairSumOptions& s, const PairSumForward& f,
                void* scratch, int threads) {
  const SimilarityPlan plan(p);
  Arena arena(scratch);
  const PairSumBuffers<R> b(p, plan, threads, arena);
  b.clear(p.n);
  const Operands<R> o(p);
  for_all_tiles(p, plan, o, b.slots, false, Summing<R>{{p, s}, b});
  for (int side = 0; side < (s.kind == PairSum::kSigmoid ? 1 : 2); ++side) {
    for (int64_t i = 0; i < p.n; ++i) {
      static_cast<R*>(f.sums[side])[i] = R(b.sums[side][i]);
      if (f.counts[side]) static_cast<R*>(f.counts[side])[i] = R(b.counts[side][i]);
    }
  }
}

template <class R>
void backward_of(const SimilarityProblem& p, const PairSumOptions& s, const PairSumBackward& g,
                 void* scratch, int threads) {
  const SimilarityPlan plan(p);
  Arena arena(scratch);
  const BackwardBuffers<R> b(p, plan, wants_of(g.to), threads, arena);
  const Operands<R> o(p);
  const Differentiating<R> on_tile{
      {p, s}, {static_cast<const R*>(g.cotangents[0]), static_cast<const R*>(g.cotangents[1])}};
  accumulate(p, plan, o, b, g.to, on_tile);
}

}  // namespace

int64_t pair_sums_forward_scratch(const SimilarityProblem& p, int threads) {
  const SimilarityPlan plan(p);
  Arena count(nullptr);
  if (p.dtype == DType::kF64) {
    PairSumBuffers<double>(p, plan, threads, count);
  } else {
    PairSumBuffers<float>(p, plan, threads, count);
  }
  return count.used();
}

void pair_sums_forward(const SimilarityProblem& p, const PairSumOptions& s, const PairSumForward& f,
                       void* scratch, int threads) {
  if (p.dtype == DType::kF64) {
    forward_of<double>(p, s, f, scratch, threads);
  } else {
    forward_of<float>(p, s, f, scratch, threads);
  }
}
void pair_sums_backward(const SimilarityProblem& p, const PairSumOptions& s,
                        const PairSumBackward& b, void* scratch, int threads) {
  if (p.dtype == DType::kF64) {
    backward_of<double>(p, s, b, scratch, threads);
  } else {
    backward_of<float>(p, s, b, scratch, threads);
  }
}

}  // namespace pyloss::cpu
