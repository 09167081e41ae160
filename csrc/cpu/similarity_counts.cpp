// Tiles of products of the rows with themselves, of which near pairs are counted: cpu/gemm.h.
//
// Decomposition: a task is a block of kRows rows against all columns from its first one on, so that
// each pair is multiplied once, but for the blocks on the diagonal. Each slot counts into a table
// of its own; integers add up to the same whatever the order. Memory traffic: the rows packed once
// (n d), read once for each block of rows. Of a tile in the cache every entry is compared with one
// number; only what is near, a tenth or so, is looked at.
#include "cpu/similarity_counts.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/compiler.h"
#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/tasks.h"

namespace pyloss::cpu {
namespace {

// A tile of both fits half of the second-level cache; kRows is a multiple of the heights of a
// register tile, kWidth of the width of a panel.
constexpr int64_t kRows = 84, kWidth = 512;
constexpr int64_t kBuckets = 1024;  // of the table that finds a step

int64_t tasks_of(int64_t n) {
  return gemm::blocks_of(n, kRows);
}

template <class R>
struct Slot {
  R *left, *tile;
  uint8_t* near;
  uint16_t* found;
  int32_t* steps;
  int64_t* counts;

  Slot(const CountsProblem& p, Arena& arena)
      : left(arena.take<R>(gemm::left_size<R>(kRows, p.d))),
        tile(arena.take<R>(kRows * gemm::tile_stride<R>(kWidth))),
        near(arena.take<uint8_t>(kWidth + 8)),
        found(arena.take<uint16_t>(kWidth + 8)),
        steps(arena.take<int32_t>(kWidth)),
        counts(arena.take<int64_t>(2 * (p.classes + 1) * p.steps)) {}
};

template <class R>
struct Layout {
  R *right, *edges;
  int32_t* buckets;
  int64_t* offsets;  // of the counts of each row's class
  char* slots;
  int64_t slot_bytes;

  Layout(const CountsProblem& p, int threads, Arena& arena)
      : right(arena.take<R>(gemm::right_size<R>(p.d, p.n))),
        edges(arena.take<R>(p.steps + 1)),
        buckets(arena.take<int32_t>(kBuckets)),
        offsets(arena.take<int64_t>(p.n)) {
    Arena one(nullptr);
    Slot<R>(p, one);
    slot_bytes = one.used();
    slots = arena.take<char>(slot_bytes * slots_for(tasks_of(p.n), threads));
  }
  Slot<R> slot(const CountsProblem& p, int64_t i) const {
    Arena arena(slots + i * slot_bytes);
    return Slot<R>(p, arena);
  }
};

// A table says where to begin to look for the first edge that is no less than a value.
template <class R>
struct Steps {
  const R* edges;  // and behind them infinity
  const int32_t* buckets;
  R first, per;
  bool single;  // of the edges, one at most can follow the one that the table says

  Steps(const CountsProblem& p, R* to, int32_t* table) : edges(to), buckets(table), per(0) {
    const R* const given = static_cast<const R*>(p.edges);
    std::copy_n(given, p.steps, to);
    to[p.steps] = std::numeric_limits<R>::infinity();
    first = given[0];
    const R range = given[p.steps - 1] - first;
    if (range > 0 && std::isfinite(range)) per = (kBuckets - 4) / range;
    int32_t k = 0;
    for (int64_t b = 0; b < kBuckets; ++b) {
      // What falls into bucket b is above the lower edge of the one before it, however it is
      // rounded, and below that of b + 2.
      while (b > 0 && per > 0 && k < p.steps && edges[k] < first + (b - 1) / per) ++k;
      table[b] = k;
    }
    single = per > 0;
    for (int64_t b = 0; b + 3 < kBuckets; ++b) single &= table[b + 3] - table[b] <= 1;
  }
};

// Which of eight bits are set, from the lowest on; what follows them is of no account.
struct Positions {
  uint8_t of[256][8];
};
constexpr Positions positions() {
  Positions p{};
  for (int bits = 0; bits < 256; ++bits) {
    int n = 0;
    for (int b = 0; b < 8; ++b) {
      if (bits >> b & 1) p.of[bits][n++] = uint8_t(b);
    }
  }
  return p;
}
constexpr Positions kPositions = positions();

// find: which columns are near, v <= the last edge, where limit is half_i - that; gives their
// number. Eight are written at a time, of which the count keeps those that are. look_up: their
// steps, if the table leaves one comparison. No branches: a tenth is near, and nobody could
// foretell which.
#define PYLOSS_NEAR(R)                                                                           \
  PYLOSS_MULTIVERSION int64_t find(const R* s, const R* half, R limit, int64_t n, uint8_t* near, \
                                   uint16_t* found) {                                            \
    for (int64_t c = 0; c < n; ++c) near[c] = s[c] - half[c] >= limit;                           \
    for (int64_t c = n; c < n + 8; ++c) near[c] = 0;                                             \
    int64_t count = 0;                                                                           \
    for (int64_t c = 0; c < n; c += 8) {                                                         \
      uint64_t word = 0;                                                                         \
      for (int b = 0; b < 8; ++b) word |= uint64_t(near[c + b]) << (8 * b);                      \
      const int bits = int(word * 0x0102040810204080u >> 56);                                    \
      for (int b = 0; b < 8; ++b) found[count + b] = uint16_t(c + kPositions.of[bits][b]);       \
      count += bit_count(word);                                                                  \
    }                                                                                            \
    return count;                                                                                \
  }                                                                                              \
  PYLOSS_MULTIVERSION void look_up(const R* __restrict s, const R* __restrict half, R own,       \
                                   const uint16_t* __restrict found, int64_t n,                  \
                                   const R* __restrict edges, const int32_t* __restrict table,   \
                                   R first, R per, int32_t* __restrict steps) {                  \
    for (int64_t k = 0; k < n; ++k) {                                                            \
      const R v = own - (s[found[k]] - half[found[k]]);                                          \
      R at = (v - first) * per;                                                                  \
      at = at > R(0) ? at : R(0);                                                                \
      at = at < R(kBuckets - 1) ? at : R(kBuckets - 1);                                          \
      const int32_t step = table[int32_t(at)];                                                   \
      steps[k] = step + (edges[step] < v);                                                       \
    }                                                                                            \
  }
PYLOSS_NEAR(float)
PYLOSS_NEAR(double)
#undef PYLOSS_NEAR

// The same for any edges.
template <class R>
void search(const R* s, const R* half, R own, const uint16_t* found, int64_t n, const Steps<R>& t,
            int32_t* steps) {
  look_up(s, half, own, found, n, t.edges, t.buckets, t.first, t.per, steps);
  for (int64_t k = 0; k < n && !t.single; ++k) {
    const R v = own - (s[found[k]] - half[found[k]]);
    while (t.edges[steps[k]] < v) ++steps[k];
  }
}

template <class R>
void count(const CountsProblem& p, int64_t* counts, void* scratch, int threads) {
  const R* x = static_cast<const R*>(p.x);
  const R* half = static_cast<const R*>(p.half);
  const int64_t size = 2 * (p.classes + 1) * p.steps, tasks = tasks_of(p.n);
  Arena arena(scratch);
  const Layout<R> layout(p, threads, arena);
  const auto rows = gemm::row_major(x, p.n, p.d, p.d);
  const gemm::Right<R> right = gemm::pack_right(rows.transposed(), layout.right);
  const Steps<R> steps(p, layout.edges, layout.buckets);
  const R last = steps.edges[p.steps - 1];
  for (int64_t i = 0; i < p.n; ++i) layout.offsets[i] = p.labels[i] * p.steps;
  const int64_t slots = slots_for(tasks, threads), panel = gemm::panel_columns<R>();
  for (int64_t i = 0; i < slots; ++i) std::fill_n(layout.slot(p, i).counts, size, 0);

  run_tasks(tasks, slots, [&](int64_t at, int64_t task) {
    const Slot<R> slot = layout.slot(p, at);
    int64_t* const across = slot.counts + (p.classes + 1) * p.steps;
    const int64_t first = task * kRows, n = std::min(kRows, p.n - first);
    const int64_t start = first / panel * panel;
    const gemm::Left<R> left = gemm::pack_left(rows.block(first, 0, n, p.d), slot.left);
    gemm::stream(left, first, right.some_columns(start, p.n - start), kWidth, slot.tile,
                 [&](const gemm::Tile<R>& t) {
                   for (int64_t r = 0; r < t.rows; ++r) {
                     const int64_t i = t.row + r, column = start + t.column;
                     const int64_t skip = std::max<int64_t>(0, i + 1 - column);
                     if (skip >= t.columns) continue;
                     const int64_t own = layout.offsets[i], alone = p.classes * p.steps;
                     const R* const s = t.data + r * t.stride + skip;
                     const R* const others = half + column + skip;
                     const int64_t* const offsets = layout.offsets + column + skip;
                     const int64_t near =
                         find(s, others, half[i] - last, t.columns - skip, slot.near, slot.found);
                     search(s, others, half[i], slot.found, near, steps, slot.steps);
                     for (int64_t k = 0; k < near; ++k) {
                       const int64_t other = offsets[slot.found[k]], step = slot.steps[k];
                       if (step == p.steps) continue;
                       if (other == own && own < alone) {
                         ++slot.counts[own + step];
                       } else {
                         ++across[own + step];
                         ++across[other + step];
                       }
                     }
                   }
                 });
  });
  std::fill_n(counts, size, 0);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t* const mine = layout.slot(p, i).counts;
    for (int64_t k = 0; k < size; ++k) counts[k] += mine[k];
  }
}

template <class R>
int64_t scratch_of(const CountsProblem& p, int threads) {
  Arena arena(nullptr);
  Layout<R>(p, threads, arena);
  return arena.used();
}

}  // namespace

int64_t similarity_counts_scratch(const CountsProblem& p, int threads) {
  return p.dtype == DType::kF64 ? scratch_of<double>(p, threads) : scratch_of<float>(p, threads);
}

void similarity_counts(const CountsProblem& p, int64_t* counts, void* scratch, int threads) {
  if (p.dtype == DType::kF64) {
    count<double>(p, counts, scratch, threads);
  } else {
    count<float>(p, counts, scratch, threads);
  }
}

}  // namespace pyloss::cpu
