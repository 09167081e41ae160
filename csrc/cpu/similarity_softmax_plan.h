// How the work of similarity_softmax is cut, and what lies in its scratch memory. Sizes of the
// problem only: no bit of a result depends on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/similarity_softmax.h"
#include "cpu/similarity_softmax_math.h"
#include "cpu/similarity_softmax_rounds.h"

namespace pyloss::cpu {

// Rows that are converted and packed at a time; columns of a tile, at most; rows of a block. All
// are multiples of the width of a panel, which is 32 or less.
inline constexpr int64_t kPanelMultiple = 32, kPackRows = 128, kWidth = 128;
inline constexpr int64_t kBlock = 256, kSmallBlock = 64;

using gemm::blocks_of;

struct Range {
  int64_t first, n;
};

struct SimilarityPlan {
  int64_t n, m, row_block, key_block, width;  // width: columns of a tile
  Rounds rounds;

  explicit SimilarityPlan(const SimilarityProblem& p)
      : n(p.n),
        m(p.m),
        row_block(block_of(p.n)),
        key_block(block_of(p.m)),
        width(std::min(kWidth, blocks_of(p.m, kPanelMultiple) * kPanelMultiple)),
        rounds{blocks_of(p.n, row_block), blocks_of(p.m, key_block), p.itself} {}

  Range rows(int64_t i) const { return {i * row_block, std::min(row_block, n - i * row_block)}; }
  Range keys(int64_t j) const { return {j * key_block, std::min(key_block, m - j * key_block)}; }

 private:
  // Four blocks or more, so that threads have something to do, but no tiny ones.
  static int64_t block_of(int64_t size) {
    const int64_t quarter = blocks_of(blocks_of(size, 4), kSmallBlock) * kSmallBlock;
    return std::min(kBlock, std::max(kSmallBlock, quarter));
  }
};

// A pair that is looked at alone, at its place in the tile.
template <class R>
struct Special {
  int64_t row, column;
  R z;
};

template <class R>
struct SimilaritySlot {        // of one thread
  R *tile, *rows;              // rows: some of the queries or keys
  R *scores, *keys, *queries;  // blocks, packed; the last two of a backward
  // Sums and shifts; of pair sums those of negatives, and of positives in the place of shifts.
  R *row_sums, *column_sums, *row_shifts, *column_shifts, *weighted, *column_weighted;
  int64_t *row_counts, *column_counts, *row_counts2, *column_counts2;
  Special<R>* specials;

  SimilaritySlot(const SimilarityProblem& p, const SimilarityPlan& plan, bool backward,
                 Arena& arena) {
    const int64_t rows_of_tile = std::min(p.n, plan.row_block);
    const int64_t columns = plan.width;
    tile = arena.take<R>(rows_of_tile * gemm::tile_stride<R>(columns));
    const int64_t keys_of_pair = std::min(p.m, plan.key_block);
    const int64_t most = std::min(std::max(kBlock, kPackRows), std::max(p.n, p.m));
    rows = arena.take<R>(most * p.d);
    scores = arena.take<R>(gemm::right_size<R>(p.d, keys_of_pair));
    keys = backward ? arena.take<R>(gemm::right_size<R>(keys_of_pair, p.d)) : nullptr;
    queries = backward ? arena.take<R>(gemm::right_size<R>(rows_of_tile, p.d)) : nullptr;
    row_sums = arena.take<R>(rows_of_tile);
    row_shifts = arena.take<R>(rows_of_tile);
    weighted = arena.take<R>(rows_of_tile);
    column_sums = arena.take<R>(columns);
    column_shifts = arena.take<R>(columns);
    column_weighted = arena.take<R>(columns);
    row_counts = arena.take<int64_t>(rows_of_tile);
    column_counts = arena.take<int64_t>(columns);
    row_counts2 = arena.take<int64_t>(rows_of_tile);
    column_counts2 = arena.take<int64_t>(columns);
    specials = arena.take<Special<R>>(2 * (rows_of_tile + columns));
  }
};

template <class R>
struct SimilaritySlots {
  const SimilarityProblem& p;
  const SimilarityPlan& plan;
  bool backward;
  char* base;
  int64_t bytes, count;

  SimilaritySlots(const SimilarityProblem& p, const SimilarityPlan& plan, bool backward,
                  int threads, Arena& arena)
      : p(p), plan(plan), backward(backward) {
    Arena one(nullptr);
    SimilaritySlot<R>(p, plan, backward, one);
    bytes = one.used();
    // Below this many multiplications the work is done sooner than a second thread has woken up.
    const bool small = double(p.n) * double(p.d) * double(p.m) < double(1 << 20);
    count = small ? 1 : std::min<int64_t>(threads, std::max(plan.rounds.rows, plan.rounds.columns));
    base = arena.take<char>(count * bytes);
  }
  SimilaritySlot<R> at(int64_t slot) const {
    Arena one(base + slot * bytes);
    return SimilaritySlot<R>(p, plan, backward, one);
  }
};

// Sums over all tiles so far.
template <class R>
struct Side {
  R* most = nullptr;  // the largest z, which is taken off in the sums
  double *sum = nullptr, *positive = nullptr, *weighted = nullptr;
  int64_t *left_out = nullptr, *positives = nullptr;

  Side() = default;
  Side(int64_t n, bool mean, Arena& arena) {
    most = arena.take<R>(n);
    sum = arena.take<double>(n);
    positive = arena.take<double>(n);
    if (mean) weighted = arena.take<double>(n);
    left_out = arena.take<int64_t>(n);
    positives = arena.take<int64_t>(n);
  }
  void clear(int64_t n) const {
    if (!most) return;
    std::fill(most, most + n, -infinity_<R>());
    for (double* x : {sum, positive, weighted}) {
      if (x) std::fill(x, x + n, 0.0);
    }
    for (int64_t* x : {left_out, positives}) std::fill(x, x + n, int64_t(0));
  }
  // Takes z into account among the largest; returns what is to be taken off from now on.
  R raise(int64_t at, R z) const {
    const R old = most[at];
    if (z > old) {
      const double factor = exp_(double(old) - double(z));
      sum[at] *= factor;
      if (weighted) weighted[at] *= factor;
      most[at] = z;
      return z;
    }
    return old == -infinity_<R>() ? R(0) : old;
  }
};

template <class R>
struct ForwardBuffers {
  SimilaritySlots<R> slots;
  double* squares;
  Side<R> rows, columns;

  ForwardBuffers(const SimilarityProblem& p, const SimilarityPlan& plan, bool of_columns, bool mean,
                 int threads, Arena& arena)
      : slots(p, plan, false, threads, arena) {
    squares = arena.take<double>(blocks_of(std::max(p.n, p.m), kPackRows));
    rows = Side<R>(p.n, mean, arena);
    if (of_columns) columns = Side<R>(p.m, false, arena);
  }
  void clear(const SimilarityProblem& p) const {
    rows.clear(p.n);
    columns.clear(p.m);
  }
};

// Of sums that are no softmax: one, or two of the negatives and positives.
template <class R>
struct PairSumBuffers {
  SimilaritySlots<R> slots;
  double* sums[2];
  int64_t* counts[2];

  PairSumBuffers(const SimilarityProblem& p, const SimilarityPlan& plan, int threads, Arena& arena)
      : slots(p, plan, false, threads, arena) {
    for (double*& x : sums) x = arena.take<double>(p.n);
    for (int64_t*& x : counts) x = arena.take<int64_t>(p.n);
  }
  void clear(int64_t n) const {
    for (double* x : sums) std::fill(x, x + n, 0.0);
    for (int64_t* x : counts) std::fill(x, x + n, int64_t(0));
  }
};

template <class R>
struct TermBuffers {
  R *factor, *shift;
  TermBuffers(int64_t n, Arena& arena) : factor(arena.take<R>(n)), shift(arena.take<R>(n)) {}
};

template <class R>
struct BackwardBuffers {
  SimilaritySlots<R> slots;
  TermBuffers<R> row_terms, column_terms;
  R *dq = nullptr, *dk = nullptr;  // where the user's cannot be added up in
  double *squares, *dots, *gradient_sums = nullptr;

  BackwardBuffers(const SimilarityProblem& p, const SimilarityPlan& plan, const SimilarityWants& w,
                  int threads, Arena& arena)
      : slots(p, plan, true, threads, arena), row_terms(p.n, arena), column_terms(p.m, arena) {
    const bool half = dtype_size(p.dtype) != int64_t(sizeof(R)), of_queries = w.dq || w.dscale;
    if (of_queries && (half || !w.dq)) dq = arena.take<R>(p.n * p.d);
    if (w.dk && half) dk = arena.take<R>(p.m * p.d);
    squares = arena.take<double>(blocks_of(std::max(p.n, p.m), kPackRows));
    dots = arena.take<double>(p.n);
    if (w.dbias) gradient_sums = arena.take<double>(p.n);
  }
};

}  // namespace pyloss::cpu
