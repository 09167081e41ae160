// The monomials of near-linear tensor attention, and how a call is cut into tasks and buffers.
// Nothing here looks at the number of threads, so that results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/tensor_attention_lowrank.h"
#include "cpu/tensor_attention_plan.h"  // Arena, padded

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

}  // namespace pyloss::cpu
