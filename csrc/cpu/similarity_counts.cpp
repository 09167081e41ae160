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

#include "common/multiversion.h"
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
  return (n + kRows - 1) / kRows;
}

template <class R>
struct Slot {
  R *left, *tile;
  uint8_t* near;
  int64_t* counts;

  Slot(const CountsProblem& p, Arena& arena)
      : left(arena.take<R>(gemm::left_size<R>(kRows, p.d))),
        tile(arena.take<R>(kRows * gemm::tile_stride<R>(kWidth))),
        near(arena.take<uint8_t>(kWidth)),
        counts(arena.take<int64_t>(2 * (p.classes + 1) * p.steps)) {}
};

template <class R>
struct Layout {
  R* right;
  int32_t* buckets;
  char* slots;
  int64_t slot_bytes;

  Layout(const CountsProblem& p, int threads, Arena& arena)
      : right(arena.take<R>(gemm::right_size<R>(p.d, p.n))),
        buckets(arena.take<int32_t>(kBuckets)) {
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

// near[c]: whether v <= the last edge, where limit is half_i - that.
#define PYLOSS_NEAR(R)                                                                          \
  PYLOSS_MULTIVERSION void mark(const R* s, const R* half, R limit, int64_t n, uint8_t* near) { \
    for (int64_t c = 0; c < n; ++c) near[c] = s[c] - half[c] >= limit;                          \
  }
PYLOSS_NEAR(float)
PYLOSS_NEAR(double)
#undef PYLOSS_NEAR

// fn(c) for each marked column.
template <class Fn>
void for_marked(const uint8_t* near, int64_t n, Fn&& fn) {
  int64_t c = 0;
  for (; c + 8 <= n; c += 8) {
    uint64_t word = 0;
    for (int b = 0; b < 8; ++b) word |= uint64_t(near[c + b]) << (8 * b);
    for (; word; word &= word - 1) fn(c + __builtin_ctzll(word) / 8);
  }
  for (; c < n; ++c) {
    if (near[c]) fn(c);
  }
}

// The first step whose edge is no less than a value: a table says where to begin.
template <class R>
class Steps {
 public:
  Steps(const R* edges, int64_t n, int32_t* buckets) : edges_(edges), n_(n), buckets_(buckets) {
    const R range = edges[n - 1] - edges[0];
    per_ = range > 0 && std::isfinite(range) ? (kBuckets - 2) / range : R(0);
    int32_t k = 0;
    for (int64_t b = 0; b < kBuckets; ++b) {
      // What falls into bucket b is above the lower edge of the one before it, however it is
      // rounded.
      const R low = per_ > 0 ? edges[0] + (b - 1) / per_ : edges[0];
      while (b > 0 && k < n - 1 && edges[k] < low) ++k;
      buckets[b] = k;
    }
  }
  // n where v is beyond the last edge.
  int64_t of(R v) const {
    const R at = (v - edges_[0]) * per_;
    int64_t k = at > 0 ? buckets_[std::min(int64_t(at), kBuckets - 1)] : 0;
    while (k < n_ && edges_[k] < v) ++k;
    return k;
  }

 private:
  const R* edges_;
  int64_t n_;
  int32_t* buckets_;
  R per_;
};

template <class R>
void count(const CountsProblem& p, int64_t* counts, void* scratch, int threads) {
  const R* x = static_cast<const R*>(p.x);
  const R* half = static_cast<const R*>(p.half);
  const int64_t size = 2 * (p.classes + 1) * p.steps, tasks = tasks_of(p.n);
  Arena arena(scratch);
  const Layout<R> layout(p, threads, arena);
  const auto rows = gemm::row_major(x, p.n, p.d, p.d);
  const gemm::Right<R> right = gemm::pack_right(rows.transposed(), layout.right);
  const Steps<R> steps(static_cast<const R*>(p.edges), p.steps, layout.buckets);
  const R last = static_cast<const R*>(p.edges)[p.steps - 1];
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
                     const int64_t skip = std::max<int64_t>(0, i + 1 - column), label = p.labels[i];
                     if (skip >= t.columns) continue;
                     const R* const s = t.data + r * t.stride + skip;
                     const R* const others = half + column + skip;
                     const int64_t* const labels = p.labels + column + skip;
                     mark(s, others, half[i] - last, t.columns - skip, slot.near);
                     for_marked(slot.near, t.columns - skip, [&](int64_t c) {
                       const int64_t step = steps.of(half[i] - (s[c] - others[c]));
                       if (step == p.steps) return;
                       if (labels[c] == label && label < p.classes) {
                         ++slot.counts[label * p.steps + step];
                       } else {
                         ++across[label * p.steps + step];
                         ++across[labels[c] * p.steps + step];
                       }
                     });
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
