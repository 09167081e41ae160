// Betti matching on the CPU: images I (input), T (target) and M = min(I, T), as filtrations.
//
//     sort I, T -> merge into M's order                 betti_matching_runs.h
//     dim 0   Kruskal on I, T and M; M's run also keeps the oldest vertices in I and T
//     dim 1   dual runs over the edges that dim 0 left; those of I and T also keep which square of
//     M
//             dies
//     match   a bar of M matches the two bars, of I and of T, found at its death
//     loss    values at the voxels of the bars; the gradient is scattered to the same voxels
//
// Parallel: over the items of the batch where there are as many as threads, else over the images
// within an item. Every bar list has one writer, and sums follow the list: no result depends on the
// number of threads. Sums in double.
//
// Memory at a time per item: 15.5 words per voxel (float32), plus 16 bytes per bar.
#include "cpu/betti_matching.h"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/betti_matching_runs.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {
namespace {

using namespace betti_runs;
using betti::Options;
using betti::Problem;

struct Match {
  uint32_t input, target;                       // numbers of bars
  uint32_t comparison_birth, comparison_death;  // cells
};

struct DimResult {
  std::vector<Bar> input, target;
  std::vector<Match> matches;
  std::vector<uint8_t> input_matched, target_matched;
};

struct ItemResult {
  DimResult dim[2];
  uint32_t oldest_input, oldest_target;  // vertices
};

[[noreturn]] void found_nan(const char* name, int64_t item) {
  throw std::invalid_argument(std::string(name) + " must not contain NaN; item " +
                              std::to_string(item) + " does");
}

void link(const std::vector<ComparisonBar>& comparison, DimResult& r) {
  r.input_matched.assign(r.input.size(), 0);
  r.target_matched.assign(r.target.size(), 0);
  for (const ComparisonBar& m : comparison) {
    if (m.in_input == kNone || m.in_target == kNone) continue;
    r.matches.push_back({m.in_input, m.in_target, m.birth, m.death});
    r.input_matched[m.in_input] = 1;
    r.target_matched[m.in_target] = 1;
  }
}

// Vertex of birth -> number of the bar.
Array<uint32_t> by_birth(const std::vector<Bar>& bars, const Frame& f, Slab& slab) {
  Array<uint32_t> number(slab, f.size());
  std::fill(number.get(), number.get() + f.size(), kNone);
  for (uint32_t i = 0; i < bars.size(); ++i) number[bars[i].birth] = i;
  return number;
}

template <class R>
ItemResult match_item(const Problem& batch, int64_t item, int threads, Slab& slab) {
  using K = typename betti::KeyOf<R>::type;
  const Frame f(uint32_t(batch.rows), uint32_t(batch.cols));
  const int64_t n = batch.rows * batch.cols;
  const R* image[2] = {static_cast<const R*>(batch.input) + item * n,
                       static_cast<const R*>(batch.target) + item * n};
  ItemResult result;
  enum { kInput, kTarget, kComparison };
  Order order[3];
  {
    Array<K> keys[2] = {Array<K>(slab, f.size()), Array<K>(slab, f.size())};
    parallel_for(2, 1, threads, [&](int64_t i, int64_t) {
      if (!make_keys(image[i], f, batch.superlevel, keys[i].get())) {
        found_nan(i == kInput ? "input" : "target", item);
      }
      order[i] = sort_voxels(keys[i].get(), f, slab);
    });
    order[kComparison] =
        merge_orders(order[kInput], order[kTarget], keys[0].get(), keys[1].get(), f, slab);
  }
  result.oldest_input = order[kInput].at(0);
  result.oldest_target = order[kTarget].at(0);

  Array<Cycle> cycles[3];
  uint32_t cycle_count[3];
  std::vector<ComparisonBar> comparison;
  DimResult& zero = result.dim[0];
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    cycles[i] = Array<Cycle>(slab, f.voxels());
    if (i == kComparison) {
      run_dim0_comparison(order[i], order[kInput], order[kTarget], f, cycles[i].get(),
                          cycle_count[i], comparison, slab);
    } else {
      run_dim0(order[i], f, cycles[i].get(), cycle_count[i], i == kInput ? zero.input : zero.target,
               slab);
    }
  });
  if (batch.wanted(0)) {
    const Array<uint32_t> of_input = by_birth(zero.input, f, slab),
                          of_target = by_birth(zero.target, f, slab);
    for (ComparisonBar& m : comparison) {
      m.in_input = of_input[m.in_input];
      m.in_target = of_target[m.in_target];
    }
    link(comparison, zero);
  } else {
    zero = DimResult();
  }
  if (!batch.wanted(1) || f.rows < 2 || f.cols < 2) return result;

  DimResult& one = result.dim[1];
  Array<uint32_t> squares, bar_of[2];  // squares of the comparison image
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    positions_to_ranks(order[i], f);
    order[i].voxel = Array<uint32_t>();
    if (i != kComparison) return;
    squares = Array<uint32_t>(slab, f.size());
    square_ranks(order[i], f, squares.get());
  });
  std::vector<Bar> of_comparison;
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    if (i == kComparison) {
      run_dim1(order[i], squares.get(), f, cycles[i].get(), cycle_count[i], of_comparison, nullptr,
               nullptr, slab);
      return;
    }
    bar_of[i] = Array<uint32_t>(slab, f.size());
    std::fill(bar_of[i].get(), bar_of[i].get() + f.size(), kNone);
    Array<uint32_t> own(slab, f.size());
    square_ranks(order[i], f, own.get());
    run_dim1(order[i], own.get(), f, cycles[i].get(), cycle_count[i],
             i == kInput ? one.input : one.target, squares.get(), bar_of[i].get(), slab);
    cycles[i] = Array<Cycle>();  // at its peak the memory is what counts
    order[i].position = Array<uint32_t>();
  });
  comparison.clear();
  for (const Bar& m : of_comparison) {
    comparison.push_back({m.birth, m.death, bar_of[0][m.death], bar_of[1][m.death]});
  }
  link(comparison, one);
  return result;
}

template <class R>
ItemResult bars_of_item(const Problem& batch, int64_t item, Slab& slab) {
  const Frame f(uint32_t(batch.rows), uint32_t(batch.cols));
  const R* image = static_cast<const R*>(batch.input) + item * batch.rows * batch.cols;
  ItemResult result;
  Order order;
  {
    Array<typename betti::KeyOf<R>::type> keys(slab, f.size());
    if (!make_keys(image, f, batch.superlevel, keys.get())) found_nan("input", item);
    order = sort_voxels(keys.get(), f, slab);
  }
  result.oldest_input = result.oldest_target = order.at(0);
  Array<Cycle> cycles(slab, f.voxels());
  uint32_t cycle_count;
  run_dim0(order, f, cycles.get(), cycle_count, result.dim[0].input, slab);
  if (!batch.wanted(0)) result.dim[0] = DimResult();
  if (!batch.wanted(1) || f.rows < 2 || f.cols < 2) return result;
  positions_to_ranks(order, f);
  order.voxel = Array<uint32_t>();
  Array<uint32_t> squares(slab, f.size());
  square_ranks(order, f, squares.get());
  run_dim1(order, squares.get(), f, cycles.get(), cycle_count, result.dim[1].input, nullptr,
           nullptr, slab);
  return result;
}

// fn(item, threads within it, slab). A slab serves one item after the other.
template <class Fn>
void over_items(const Problem& batch, int threads, Fn&& fn) {
  // Waking a thread up for part of a small image takes longer than the part.
  if (batch.items < threads && batch.rows * batch.cols < 128 * 128) {
    threads = int(std::max<int64_t>(batch.items, 1));
  }
  const bool outer = batch.items >= threads;
  const size_t size = Frame(uint32_t(batch.rows), uint32_t(batch.cols)).size();
  const size_t bytes = size * (batch.input_dtype == DType::kF64 ? 72 : 62);
  std::mutex mutex;
  std::vector<std::unique_ptr<Slab>> idle;
  parallel_for(batch.items, 1, outer ? threads : 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Slab> slab;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        slab = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!slab) slab.reset(new Slab(bytes));
    for (int64_t item = begin; item < end; ++item) fn(item, outer ? 1 : threads, *slab);
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(slab));
  });
}

// --------------------------------------------------------------------------------------------------
// Loss

template <class R>
void loss_of_item(const Problem& batch, const Options& o, int64_t item, const ItemResult& found,
                  R* loss, R* grad) {
  const Frame f(uint32_t(batch.rows), uint32_t(batch.cols));
  const int64_t n = batch.rows * batch.cols;
  const R* input = static_cast<const R*>(batch.input) + item * n;
  const R* target = static_cast<const R*>(batch.target) + item * n;
  if (grad) std::fill(grad, grad + n, R(0));
  for (int d = 0; d < batch.dims; ++d) {
    const DimResult& r = found.dim[d];
    double matched = 0, left_input = 0, left_target = 0;
    if (batch.wanted(d)) {
      const R factor = R(o.dim_weight[d] * o.matched_weight);
      auto match = [&](uint32_t voxel, uint32_t target_voxel) {
        const R x = input[voxel], y = target[target_voxel];
        matched += betti::matched_term<R>(x, 0, y, 0);
        if (grad) grad[voxel] += factor * betti::matched_slope(x, y);
      };
      for (const Match& m : r.matches) {
        const Bar &a = r.input[m.input], &b = r.target[m.target];
        match(f.flat(a.birth_voxel), f.flat(b.birth_voxel));
        match(f.flat(a.death_voxel), f.flat(b.death_voxel));
      }
      if (d == 0 && o.essential) match(f.flat(found.oldest_input), f.flat(found.oldest_target));
      const R lone = R(o.dim_weight[d] * o.unmatched_weight);
      for (size_t i = 0; i < r.input.size(); ++i) {
        if (r.input_matched[i]) continue;
        const uint32_t p = f.flat(r.input[i].birth_voxel), q = f.flat(r.input[i].death_voxel);
        const R x = input[p], y = input[q];
        if (!betti::counts(x, y, o.min_persistence)) continue;
        left_input += betti::unmatched_term(x, y, o.extreme, batch.superlevel);
        if (!grad) continue;
        R slope_x, slope_y;
        betti::unmatched_slopes(x, y, o.extreme, batch.superlevel, slope_x, slope_y);
        grad[p] += lone * slope_x;
        grad[q] += lone * slope_y;
      }
      for (size_t i = 0; i < r.target.size(); ++i) {
        if (r.target_matched[i]) continue;
        const Bar& b = r.target[i];
        left_target +=
            betti::unmatched_term(target[f.flat(b.birth_voxel)], target[f.flat(b.death_voxel)],
                                  o.extreme, batch.superlevel);
      }
    }
    loss[d * betti::kTerms + betti::kMatched] = R(matched);
    loss[d * betti::kTerms + betti::kUnmatchedInput] = R(left_input);
    loss[d * betti::kTerms + betti::kUnmatchedTarget] = R(left_target);
  }
}

template <class R>
void loss_of_batch(const Problem& batch, const Options& options, R* loss, R* grad, int threads) {
  const int64_t n = batch.rows * batch.cols, terms = batch.dims * betti::kTerms;
  over_items(batch, threads, [&](int64_t item, int within, Slab& slab) {
    const ItemResult found = match_item<R>(batch, item, within, slab);
    loss_of_item(batch, options, item, found, loss + item * terms,
                 grad ? grad + item * n : nullptr);
  });
}

// --------------------------------------------------------------------------------------------------
// Rows

// Sorted within a dimension, then with the item's number and the dimension before each.
template <size_t kWidth>
void append(std::vector<std::array<uint32_t, kWidth>>& rows, int64_t item, int dim,
            std::vector<int64_t>& out) {
  std::sort(rows.begin(), rows.end());
  out.reserve(out.size() + rows.size() * (kWidth + 2));
  for (const auto& row : rows) {
    out.push_back(item);
    out.push_back(dim);
    for (uint32_t x : row) out.push_back(x == kNone ? -1 : int64_t(x));
  }
  rows.clear();
}

struct Numbers {
  const Frame& f;
  int dim;

  uint32_t birth(uint32_t cell) const { return dim == 0 ? f.flat(cell) : f.flat_edge(cell); }
  uint32_t death(uint32_t cell) const { return dim == 0 ? f.flat_edge(cell) : f.flat(cell); }
  std::array<uint32_t, 4> row(const Bar& b) const {
    return {f.flat(b.birth_voxel), f.flat(b.death_voxel), birth(b.birth), death(b.death)};
  }
};

void append_left(const std::vector<Bar>& bars, const std::vector<uint8_t>& matched,
                 const Numbers& numbers, int64_t item, std::vector<int64_t>& out) {
  std::vector<std::array<uint32_t, 4>> rows;
  for (size_t i = 0; i < bars.size(); ++i) {
    if (matched.empty() || !matched[i]) rows.push_back(numbers.row(bars[i]));
  }
  append(rows, item, numbers.dim, out);
}

template <class T>
std::vector<T> joined(const std::vector<std::vector<T>>& parts) {
  size_t size = 0;
  for (const auto& part : parts) size += part.size();
  std::vector<T> all;
  all.reserve(size);
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

ItemResult match_item(const Problem& batch, int64_t item, int threads, Slab& slab) {
  return batch.input_dtype == DType::kF64 ? match_item<double>(batch, item, threads, slab)
                                          : match_item<float>(batch, item, threads, slab);
}

}  // namespace

void betti_loss(const Problem& batch, const Options& options, void* loss, void* grad, int threads) {
  if (batch.input_dtype == DType::kF64) {
    loss_of_batch(batch, options, static_cast<double*>(loss), static_cast<double*>(grad), threads);
  } else {
    loss_of_batch(batch, options, static_cast<float*>(loss), static_cast<float*>(grad), threads);
  }
}

BettiRows betti_matching(const Problem& batch, int threads) {
  const Frame f(uint32_t(batch.rows), uint32_t(batch.cols));
  std::vector<std::vector<int64_t>> matched(batch.items), input(batch.items), target(batch.items);
  over_items(batch, threads, [&](int64_t item, int within, Slab& slab) {
    const ItemResult found = match_item(batch, item, within, slab);
    for (int d = 0; d < batch.dims; ++d) {
      const DimResult& r = found.dim[d];
      const Numbers numbers{f, d};
      std::vector<std::array<uint32_t, 10>> rows;
      rows.reserve(r.matches.size());
      for (const Match& m : r.matches) {
        const auto a = numbers.row(r.input[m.input]), b = numbers.row(r.target[m.target]);
        rows.push_back({a[0], a[1], b[0], b[1], a[2], a[3], b[2], b[3],
                        numbers.birth(m.comparison_birth), numbers.death(m.comparison_death)});
      }
      append(rows, item, d, matched[item]);
      append_left(r.input, r.input_matched, numbers, item, input[item]);
      append_left(r.target, r.target_matched, numbers, item, target[item]);
    }
  });
  return {joined(matched), joined(input), joined(target)};
}

std::vector<int64_t> persistence_pairs(const Problem& batch, bool essential, int threads) {
  const Frame f(uint32_t(batch.rows), uint32_t(batch.cols));
  std::vector<std::vector<int64_t>> pairs(batch.items);
  over_items(batch, threads, [&](int64_t item, int, Slab& slab) {
    const ItemResult found = batch.input_dtype == DType::kF64
                                 ? bars_of_item<double>(batch, item, slab)
                                 : bars_of_item<float>(batch, item, slab);
    for (int d = 0; d < batch.dims; ++d) {
      const DimResult& r = found.dim[d];
      const Numbers numbers{f, d};
      std::vector<std::array<uint32_t, 4>> rows;
      rows.reserve(r.input.size() + 1);
      for (const Bar& b : r.input) rows.push_back(numbers.row(b));
      if (d == 0 && essential && batch.wanted(0)) {
        const uint32_t v = f.flat(found.oldest_input);
        rows.push_back({v, kNone, v, kNone});
      }
      append(rows, item, d, pairs[item]);
    }
  });
  return joined(pairs);
}

}  // namespace cpu
}  // namespace pyloss
