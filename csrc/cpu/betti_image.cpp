// Betti matching on the CPU: images I (input), T (target) and M = min(I, T), as filtrations.
//
//     sort I, T -> merge into M's order                 betti_matching_runs.h
//     dim 0   Kruskal on I, T and M; M's run also keeps the oldest vertices in I and T
//     dim 1   dual runs over the edges that dim 0 left; those of I and T also keep which square of
//             M dies
//     match   a bar of M matches the two bars, of I and of T, found at its death
//
// Every bar list has one writer: no result depends on the number of threads.
//
// Memory at a time: 15.5 words per voxel (float32), plus 16 bytes per bar.
#include "cpu/betti_image.h"

#include <algorithm>
#include <vector>

#include "cpu/betti_matching_runs.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {

using namespace betti_item;
using namespace betti_runs;

namespace {

// Vertex of birth -> number of the bar.
Array<uint32_t> by_birth(const std::vector<Bar>& bars, const Frame& f, Slab& slab) {
  Array<uint32_t> number(slab, f.size());
  std::fill(number.get(), number.get() + f.size(), kNone);
  for (uint32_t i = 0; i < bars.size(); ++i) number[bars[i].birth] = i;
  return number;
}

}  // namespace

template <class R>
ItemResult match_image(const Problem& batch, int64_t item, int threads, Slab& slab) {
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
ItemResult bars_of_image(const Problem& batch, int64_t item, Slab& slab) {
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

size_t image_bytes(const Problem& batch) {
  const size_t size = Frame(uint32_t(batch.rows), uint32_t(batch.cols)).size();
  return size * (batch.input_dtype == DType::kF64 ? 72 : 62);
}

template ItemResult match_image<float>(const Problem&, int64_t, int, Slab&);
template ItemResult match_image<double>(const Problem&, int64_t, int, Slab&);
template ItemResult bars_of_image<float>(const Problem&, int64_t, Slab&);
template ItemResult bars_of_image<double>(const Problem&, int64_t, Slab&);

}  // namespace cpu
}  // namespace pyloss
