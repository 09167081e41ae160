// The monomials of near-linear tensor attention, and how a call is cut into tasks and buffers.
// Nothing here looks at the number of threads, so that results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/tensor_attention_lowrank.h"
#include "cpu/tensor_attention_plan.h"  // padded

namespace pyloss::cpu {

inline constexpr int64_t kTokens = 64;     // rows of a block; monomials are stored monomial by row
inline constexpr int64_t kMonomials = 84;  // of a tile: 14 x 6, full tiles of a product
inline constexpr int64_t kFold = 128;      // blocks that are added up before they join the total

inline int64_t blocks_of(int64_t rows) {
  return (rows + kTokens - 1) / kTokens;
}

// Ordered by degree. Monomial a is parent[a] times variable var[a], whose index is at least that
// of the parent's last variable; the children of a parent follow each other, up to variable d - 1.
struct Monomials {
  int64_t d, count;
  int64_t low;                 // those below the highest degree, or all up to degree 1
  std::vector<int64_t> start;  // of a degree; one past the end
  std::vector<int32_t> parent, var;
  std::vector<double> weight;  // coefficient of the degree times degree! / prod(exponents!)

  Monomials(int64_t d, const std::vector<double>& coefficients) : d(d) {
    const int64_t degree = int64_t(coefficients.size()) - 1;
    std::vector<int32_t> repeats{0};  // of the last variable
    parent = var = {0};
    weight = {1.0};
    start = {0, 1};
    for (int64_t t = 1; t <= degree; ++t) {
      for (int64_t p = start[t - 1]; p < start[t]; ++p) {
        for (int64_t v = t == 1 ? 0 : var[p]; v < d; ++v) {
          const int32_t times = t > 1 && v == var[p] ? repeats[p] + 1 : 1;
          parent.push_back(int32_t(p));
          var.push_back(int32_t(v));
          repeats.push_back(times);
          weight.push_back(weight[p] * double(t) / double(times));
        }
      }
      start.push_back(int64_t(parent.size()));
    }
    for (int64_t t = 0; t <= degree; ++t) {
      for (int64_t a = start[t]; a < start[t + 1]; ++a) weight[a] *= coefficients[t];
    }
    count = start[degree + 1];
    low = degree >= 2 ? start[degree] : count;
  }
  // Rows of the buffer for the monomials of low degree, which holds every variable.
  int64_t low_rows() const { return std::max(low, d + 1); }
  // Siblings from a on, at most up to end.
  int64_t run(int64_t a, int64_t end) const { return std::min<int64_t>(end - a, d - var[a]); }
};

// ---- sums over rows: U(x)^T [v | weight]
// -------------------------------------------------------------

// `sources` independent sums over `blocks` blocks each. A task is a range of monomials and a chunk
// of the blocks; a source's chunks are added up afterwards, in their order.
struct SumPlan {
  int64_t count, dv, dvp, ranges, chunks;
  SumPlan(const Monomials& mono, int64_t dv, int64_t sources, int64_t blocks)
      : count(mono.count), dv(dv) {
    dvp = padded(dv);
    // A range of sums stays in the second-level cache.
    const int64_t most = std::max<int64_t>(kMonomials, 98304 / (dvp + kLanePad));
    ranges = (count + most - 1) / most;
    // Enough tasks for many threads, not more partial sums than that takes.
    const int64_t wanted = (16 + sources * ranges - 1) / std::max<int64_t>(1, sources * ranges);
    chunks = std::max<int64_t>(1, std::min(wanted, blocks / 8));
  }
  int64_t begin(int64_t range) const { return count * range / ranges; }
  int64_t widest() const { return (count + ranges - 1) / ranges; }
  // A source's sums of one chunk: count rows of dvp, then count rows of kLanePad, whose sum
  // belongs to the weights.
  int64_t partial() const { return count * (dvp + kLanePad); }
};

template <class R>
struct SumBuffers {
  R *low, *tile, *v, *weight, *sums, *weights;
  SumBuffers(const Monomials& mono, const SumPlan& plan, Arena& arena) {
    low = arena.take<R>(mono.low_rows() * kTokens);
    tile = arena.take<R>(kMonomials * kTokens);
    v = arena.take<R>(kTokens * plan.dvp);
    weight = arena.take<R>(kTokens);
    sums = arena.take<R>(plan.widest() * plan.dvp);
    weights = arena.take<R>(plan.widest() * kLanePad);
  }
};

// ---- passes over rows, block by block
// --------------------------------------------------------------

inline constexpr int64_t kTaskBlocks = 4;

template <class R>
struct RowBuffers {
  R *low, *tile, *gradient, *low_gradient, *side, *result;
  RowBuffers(const Monomials& mono, int64_t dv, bool backward, Arena& arena) {
    low = arena.take<R>(mono.low_rows() * kTokens);
    tile = arena.take<R>(kMonomials * kTokens);
    gradient = arena.take<R>(backward ? kMonomials * kTokens : 0);
    low_gradient = arena.take<R>(backward ? mono.low_rows() * kTokens : 0);
    side = arena.take<R>(backward ? (dv + 1) * kTokens : 0);
    result = arena.take<R>((dv + 1) * kTokens);
  }
};

// ---- running sums: queries that see different keys
// -------------------------------------------------

inline constexpr int64_t kScanTile = 128;  // monomials that go through all queries together
inline constexpr int64_t kColumns = 5;     // columns of [v | 1] in registers, at most

// Query i sees the keys [i + shift - window, i + shift) of an axis, as far as they exist; all keys
// before i + shift where the window is 0.
//
// A chunk of kTokens queries begins where `entered` keys are in sight: its `entering` keys
// [entered, entered + kTokens) come into sight one by one, its `leaving` keys [entered - window,
// entered - window + kTokens) go out of sight. What all its queries see is the base of the chunk:
// for a window of at least kTokens - 1 the entering keys of the `whole` chunks before it, and the
// last `rest` entering keys of the chunk before those.
struct ScanAxis {
  int64_t n, shift, window, whole, rest;

  ScanAxis(const Band& band, int64_t n_q) : n(band.n), whole(0), rest(0) {
    const int64_t w = band.window;
    shift = band.causal ? band.offset + 1 : w ? band.offset + w : n;
    window = band.causal || !w ? w : 2 * w - 1;
    bool empty = shift <= -n_q;
    if (shift > n) {  // keys past the end are none: the same interval of keys
      if (window) {
        window -= shift - n;
        empty = empty || window <= 0;
      }
      shift = n;
    }
    if (empty) {
      shift = -n_q;
      window = 0;
    }
    if (n_q - 1 + shift - window <= 0) window = 0;  // nothing ever leaves
    if (window >= kTokens - 1) {
      whole = (window - kTokens + 1) / kTokens;
      rest = (window - kTokens + 1) % kTokens;
    }
  }
  int64_t entered(int64_t chunk) const { return chunk * kTokens + shift; }
  // Leaving keys that its queries add to what they all see.
  int64_t leaving() const { return std::min(window, kTokens - 1); }
};

// Siblings: monomials [at, at + n) of a tile or of the low degrees.
struct Run {
  int64_t parent, var, n, at;
};

inline std::vector<Run> runs_of(const Monomials& mono, int64_t begin, int64_t end, int64_t origin) {
  std::vector<Run> runs;
  for (int64_t a = begin; a < end;) {
    const int64_t n = mono.run(a, end);
    runs.push_back({mono.parent[a], mono.var[a], n, a - origin});
    a += n;
  }
  return runs;
}

// A task is a range of tiles for one query head; the ranges' results are added up in their order.
struct ScanPlan {
  int64_t width, columns, tiles, ranges, chunks, low_stride, row_stride, most_blocks;
  int64_t value_stride;  // of the gradients of v
  std::vector<ScanAxis> axes;
  std::vector<int64_t> key_partial;  // where an axis's gradients start in a task's
  int64_t gradients;                 // elements of a task's gradients

  ScanPlan(const LowrankProblem& p, const Monomials& mono) {
    width = p.dv + 1;
    tiles = (mono.count + kScanTile - 1) / kScanTile;
    columns = padded((mono.count + tiles - 1) / tiles);
    tiles = (mono.count + columns - 1) / columns;
    const int64_t heads = std::max<int64_t>(1, p.batch * p.heads);
    ranges = std::min(tiles, (16 + heads - 1) / heads);
    chunks = blocks_of(p.n_q);
    low_stride = padded(mono.low_rows()) + kLanePad;  // vectors run over the end
    row_stride = columns + kLanePad;
    value_stride = padded(width);
    most_blocks = chunks;
    gradients = p.n_q * p.d;
    for (const LowrankAxis& a : p.axes) {
      axes.emplace_back(a.band, p.n_q);
      most_blocks = std::max(most_blocks, chunks + axes.back().whole + 1);
      key_partial.push_back(gradients);
      gradients += a.band.n * (p.d + p.dv);
    }
  }
  int64_t record() const { return width * columns; }  // of sums: column by monomial
  int64_t first_tile(int64_t range) const { return tiles * range / ranges; }
};

// kTokens rows with their monomials of low degree, those of the tile, and [v | 1] or, for queries,
// [dN | dy]; then the gradients.
template <class R>
struct ScanRows {
  R *low, *u, *v, *du, *dv;
  ScanRows(const ScanPlan& plan, bool backward, Arena& arena) {
    low = arena.take<R>(kTokens * plan.low_stride);
    u = arena.take<R>(kTokens * plan.row_stride);
    v = arena.take<R>(kTokens * plan.width);
    du = arena.take<R>(backward ? kTokens * plan.row_stride : 0);
    dv = arena.take<R>(backward ? kTokens * plan.value_stride : 0);
  }
};

template <class R>
struct ScanBuffers {
  static constexpr int64_t kTile = kTokens * kColumns * kLanePad;  // rows x columns x lanes
  ScanRows<R> queries;
  std::vector<ScanRows<R>> entering, leaving;
  // Records per chunk; then rows x columns x lanes.
  std::vector<R*> base, base_gradient, sums, items, lanes, leaving_lanes;
  R *blocks, *running, *suffix, *low_gradient, *transposed;

  ScanBuffers(const ScanPlan& plan, bool backward, Arena& arena) : queries(plan, backward, arena) {
    const auto when = [&](int64_t count) { return backward ? count : 0; };
    for (size_t x = 0; x < plan.axes.size(); ++x) {
      entering.emplace_back(plan, backward, arena);
      leaving.emplace_back(plan, backward, arena);
      base.push_back(arena.take<R>(plan.chunks * plan.record()));
      base_gradient.push_back(arena.take<R>(when(plan.most_blocks * plan.record())));
      sums.push_back(arena.take<R>(kTile));
      items.push_back(arena.take<R>(when(kTile)));
      lanes.push_back(arena.take<R>(kTile));
      leaving_lanes.push_back(arena.take<R>(when(kTile)));
    }
    blocks = arena.take<R>(plan.most_blocks * plan.record());
    running = arena.take<R>(plan.record());
    suffix = arena.take<R>(kTile);
    low_gradient = arena.take<R>(when(kTokens * plan.low_stride));
    transposed = arena.take<R>(when(plan.columns * plan.value_stride));
  }
};

}  // namespace pyloss::cpu
