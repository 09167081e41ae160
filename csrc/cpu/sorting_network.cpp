// Differentiable sorting networks on the CPU: choice of the instruction set, threads.
//
// Formulas (common/sorting_network.h): y = P^T x, P = M_1 ... M_L, one symmetric 2 x 2 mix per
// comparator, with weights alpha(x_hi - x_lo). Gradients by one sweep back through the layers:
//     dP_c = sum over rows of P of (G_lo - G_hi)(X_lo - X_hi)         the gradient of alpha_c
//     e_c  = (dP_c - (g_lo - g_hi) d_c) alpha'_c
//     g_lo' = alpha g_lo + beta g_hi - e,  g_hi' = beta g_lo + alpha g_hi + e,   G likewise without
//     e
//
// Decomposition: threads take rows of the batch. Values: kLanes rows of the batch are the lanes,
// or, where they are few or long, the comparators of one row. P and the fused loss: for n < 16
// lanes are rows of the batch again; otherwise a tile is 1, 2 or 4 vectors of rows of P as lanes,
// wires the outer index, and goes through all layers in the cache; the loss leaves its gradient in
// the tile, which goes back at once. Rows of P are sums of one non-negative form, so that small
// entries are accurate. Parts of a tile that are known to be zero are left out
// (sorting_network_plan.h).
//
// Memory: P is never formed for the loss. Per thread O(n L) for the trace, and at most one and
// a half second-level caches for the differences X_lo - X_hi; beyond it they are computed twice.
// Rows so long that four layers of a tile do not fit: about sqrt(2 L) tiles of n vectors.
// Nothing depends on the number of threads.
#include "cpu/sorting_network.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/compiler.h"
#include "common/math.h"
#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/sorting_network_plan.h"
#include "cpu/sorting_network_ranks.h"

namespace pyloss::cpu {
namespace {

struct RankTargets {
  const int32_t *first, *count;  // [items][n]; count: null for one rank each
  sorting::Loss kind;
  int32_t width(int64_t at) const { return count ? count[at] : 1; }
};

struct SortingOps {
  void (*sort)(const sorting::Problem&, const Net&, void*, int);
  void (*sort_backward)(const sorting::Problem&, const Net&, const void*, void*, int);
  void (*apply)(const sorting::Problem&, const Net&, const sorting::Features&, void*, int);
  void (*apply_backward)(const sorting::Problem&, const Net&, const sorting::Features&, const void*,
                         void*, void*, int);
  void (*permutation)(const sorting::Problem&, const Net&, void*, void*, int);
  void (*permutation_backward)(const sorting::Problem&, const Net&, const void*, const void*, void*,
                               int);
  void (*loss)(const sorting::Problem&, const Net&, const RankTargets&, void*, void*, int);
};

// fn(next) once per thread; next() gives the number of a task that is still to be done, or -1.
template <class Fn>
void run_slots(int64_t tasks, int threads, Fn&& fn) {
  std::atomic<int64_t> done{0};
  const int64_t slots = std::max<int64_t>(1, std::min<int64_t>(tasks, threads));
  const auto next = [&]() -> int64_t {
    const int64_t task = done.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  parallel_for(slots, 1, static_cast<int>(slots), [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) fn(next);
  });
}

#define PYLOSS_KERNELS "cpu/sorting_network_tasks.h"
#include "cpu/per_instruction_set.h"

SortingOps ops_for(DType t) {
#if PYLOSS_HAS_TARGET_PRAGMA
  if (instruction_set() == InstructionSet::kV4) return v4::ops_of(t);
  if (instruction_set() == InstructionSet::kV3) return v3::ops_of(t);
#endif
  return base::ops_of(t);
}

void fill_nan(DType t, void* to, int64_t begin, int64_t count) {
  if (t == DType::kF64) {
    std::fill_n(static_cast<double*>(to) + begin, count, std::nan(""));
  } else {
    std::fill_n(static_cast<float*>(to) + begin, count, std::nanf(""));
  }
}

void loss_of_items(const sorting::Problem& p, const SortingTargets& targets, void* loss, void* gx,
                   int threads) {
  const auto run = ops_for(p.dtype).loss;
  if (targets.order == TargetOrder::kRanks) {
    run(p, Net(p), {static_cast<const int32_t*>(targets.target), targets.count, targets.kind}, loss,
        gx, threads);
    return;
  }
  const SortingRanks ranks =
      target_ranks(targets.target, targets.dtype, p.items, p.n, targets.order, threads);
  const int32_t* count = ranks.count.empty() ? nullptr : ranks.count.data();
  run(p, Net(p), {ranks.first.data(), count, targets.kind}, loss, gx, threads);
  for (int64_t item : ranks.nan_rows) {
    fill_nan(p.dtype, loss, item, 1);
    if (gx) fill_nan(p.dtype, gx, item * p.n, p.n);
  }
}

template <class R>
void reduced_loss(const sorting::Problem& p, const SortingTargets& targets, bool mean, R* loss,
                  R* gx, int threads) {
  const Array<R> each(p.items);
  loss_of_items(p, targets, each.get(), gx, threads);
  double sum = 0;
  for (int64_t b = 0; b < p.items; ++b) sum += each[b];
  *loss = R(mean ? sum / double(p.items) : sum);
  if (!gx || !mean) return;
  const R scale = R(1) / R(p.items);
  for (int64_t i = 0; i < p.items * p.n; ++i) gx[i] *= scale;
}

}  // namespace

void sorting_sort(const sorting::Problem& p, void* y, int threads) {
  ops_for(p.dtype).sort(p, Net(p), y, threads);
}
void sorting_sort_backward(const sorting::Problem& p, const void* gy, void* gx, int threads) {
  ops_for(p.dtype).sort_backward(p, Net(p), gy, gx, threads);
}
void sorting_apply(const sorting::Problem& p, const sorting::Features& f, void* out, int threads) {
  ops_for(p.dtype).apply(p, Net(p), f, out, threads);
}
void sorting_apply_backward(const sorting::Problem& p, const sorting::Features& f, const void* g,
                            void* gx, void* gf, int threads) {
  ops_for(p.dtype).apply_backward(p, Net(p), f, g, gx, gf, threads);
}
void sorting_permutation(const sorting::Problem& p, void* y, void* permutation, int threads) {
  ops_for(p.dtype).permutation(p, Net(p), y, permutation, threads);
}
void sorting_permutation_backward(const sorting::Problem& p, const void* gy, const void* gp,
                                  void* gx, int threads) {
  ops_for(p.dtype).permutation_backward(p, Net(p), gy, gp, gx, threads);
}
void sorting_loss(const sorting::Problem& p, const SortingTargets& targets, Reduction reduction,
                  void* loss, void* gx, int threads) {
  const bool mean = reduction == Reduction::kMean;
  if (reduction == Reduction::kNone) {
    loss_of_items(p, targets, loss, gx, threads);
  } else if (p.dtype == DType::kF64) {
    reduced_loss(p, targets, mean, static_cast<double*>(loss), static_cast<double*>(gx), threads);
  } else {
    reduced_loss(p, targets, mean, static_cast<float*>(loss), static_cast<float*>(gx), threads);
  }
}

}  // namespace pyloss::cpu
