// Betti matching of volumes on the CPU: images I (input), T (target) and M = min(I, T), as
// filtrations.
//
//     order   ranks of the voxels of I, T and M                            betti_volume_order.h
//     stars   pairs within the star of each voxel, of length 0, by tables  betti_volume_stars.h
//     dim 0   Kruskal over the edges that are left; M's run also keeps the oldest vertices in I, T
//     dim 2   dual runs over the squares that are left; those of I and T also keep which cube of M
//             dies                                                         betti_volume_trees.h
//     dim 1   reduction of the columns that are left, for I, T and M; and of every column of M with
//             the rows of I and with those of T                            betti_volume_loops.h
//     match   a bar of M matches the two bars, of I and of T, found at its death
//
// Parallel: the images, then the runs. Every list has one writer: no result depends on the number
// of threads.
#include "cpu/betti_volume.h"

#include <algorithm>
#include <vector>

#include "cpu/betti_volume_loops.h"
#include "cpu/betti_volume_order.h"
#include "cpu/betti_volume_stars.h"
#include "cpu/betti_volume_trees.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {

using namespace betti_item;
using namespace betti_volume;

namespace {

enum { kInput, kTarget, kComparison };

template <class R>
const R* image_of(const Problem& batch, int which, int64_t item) {
  const void* images = which == kInput ? batch.input : batch.target;
  return static_cast<const R*>(images) + item * batch.depth * batch.rows * batch.cols;
}

// The number of each bar by its birth. [cells]
Array<uint32_t> by_birth(const std::vector<Bar>& bars, size_t cells, Slab& slab) {
  Array<uint32_t> number(slab, cells);
  std::fill(number.get(), number.get() + cells, kNone);
  for (uint32_t i = 0; i < bars.size(); ++i) number[bars[i].birth] = i;
  return number;
}

// Bars of the comparison image, by their deaths in the order of `pairs`: looks the births up.
void look_up(const std::vector<Bar>& of_comparison, const std::vector<ImagePair>& pairs,
             const std::vector<Bar>& bars, size_t cells, uint32_t ComparisonBar::* in,
             std::vector<ComparisonBar>& comparison, Slab& slab) {
  const Array<uint32_t> number = by_birth(bars, cells, slab);
  size_t at = 0;
  for (size_t i = 0; i < of_comparison.size(); ++i) {
    while (pairs[at].square != of_comparison[i].death) ++at;
    comparison[i].*in = number[pairs[at].edge];
  }
}

}  // namespace

template <class R>
ItemResult match_volume(const Problem& batch, int64_t item, int threads, Slab& slab) {
  using K = typename betti::KeyOf<R>::type;
  const Lattice l(batch);
  ItemResult result;
  Order order[3];
  Stars stars[3];
  {
    Array<K> keys[3] = {Array<K>(slab, l.size()), Array<K>(slab, l.size()), Array<K>()};
    parallel_for(2, 1, threads, [&](int64_t i, int64_t) {
      if (!make_keys(image_of<R>(batch, int(i), item), l, batch.superlevel, keys[i].get())) {
        found_nan(i == kInput ? "input" : "target", item);
      }
    });
    keys[kComparison] = Array<K>(slab, l.size());
    for (uint32_t v = 0; v < l.size(); ++v) {
      keys[kComparison][v] = std::min(keys[kInput][v], keys[kTarget][v]);
    }
    parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
      order[i] = sort_voxels(keys[i].get(), l, slab);
      stars[i] = make_stars(order[i], l, slab);
    });
  }
  result.oldest_input = order[kInput].at(0);
  result.oldest_target = order[kTarget].at(0);

  // Dimensions 0 and 2.
  const bool loops = batch.wanted(1), voids = batch.wanted(2) && l.has_cubes();
  EdgeSet negative[3];
  std::vector<ComparisonBar> comparison;
  std::vector<Bar> of_comparison;
  Array<uint32_t> cubes, bar_of[2];
  if (voids) {
    cubes = Array<uint32_t>(slab, l.size());
    cube_ranks(order[kComparison], l, cubes.get());
    for (auto& numbers : bar_of) {
      numbers = Array<uint32_t>(slab, l.size());
      std::fill(numbers.get(), numbers.get() + l.size(), kNone);
    }
  }
  DimResult &zero = result.dim[0], &two = result.dim[2];
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    negative[i] = EdgeSet(l, slab);
    if (i == kComparison) {
      run_dim0_comparison(order[i], order[kInput], order[kTarget], l, stars[i], negative[i],
                          comparison, slab);
      run_dim2(order[i], l, stars[i], of_comparison, nullptr, nullptr, slab);
    } else {
      run_dim0(order[i], l, stars[i], negative[i], i == kInput ? zero.input : zero.target, slab);
      run_dim2(order[i], l, stars[i], i == kInput ? two.input : two.target,
               voids ? cubes.get() : nullptr, bar_of[i].get(), slab);
    }
  });
  if (batch.wanted(0)) {
    const Array<uint32_t> of_input = by_birth(zero.input, l.size(), slab),
                          of_target = by_birth(zero.target, l.size(), slab);
    for (ComparisonBar& m : comparison) {
      m.in_input = of_input[m.in_input];
      m.in_target = of_target[m.in_target];
    }
    link(comparison, zero);
  } else {
    zero = DimResult();
  }
  if (voids) {
    comparison.clear();
    for (const Bar& m : of_comparison) {
      comparison.push_back({m.birth, m.death, bar_of[0][m.death], bar_of[1][m.death]});
    }
    link(comparison, two);
  } else {
    two = DimResult();
  }
  if (!loops) return result;

  DimResult& one = result.dim[1];
  of_comparison.clear();
  std::vector<ImagePair> pairs[2];
  parallel_for(5, 1, threads, [&](int64_t i, int64_t) {  // the longest first
    if (i < 2) {
      run_dim1_image(order[i], negative[i], order[kComparison], stars[kComparison], l, pairs[i],
                     slab);
    } else {
      const int64_t which = i - 2;
      run_dim1(order[which], l, stars[which], negative[which],
               which == kInput    ? one.input
               : which == kTarget ? one.target
                                  : of_comparison,
               slab);
    }
  });
  comparison.clear();
  for (const Bar& m : of_comparison) comparison.push_back({m.birth, m.death, kNone, kNone});
  const size_t edges = size_t(l.size()) * 3;
  look_up(of_comparison, pairs[0], one.input, edges, &ComparisonBar::in_input, comparison, slab);
  look_up(of_comparison, pairs[1], one.target, edges, &ComparisonBar::in_target, comparison, slab);
  link(comparison, one);
  return result;
}

template <class R>
ItemResult bars_of_volume(const Problem& batch, int64_t item, int, Slab& slab) {
  const Lattice l(batch);
  ItemResult result;
  Order order;
  {
    Array<typename betti::KeyOf<R>::type> keys(slab, l.size());
    if (!make_keys(image_of<R>(batch, kInput, item), l, batch.superlevel, keys.get())) {
      found_nan("input", item);
    }
    order = sort_voxels(keys.get(), l, slab);
  }
  result.oldest_input = result.oldest_target = order.at(0);
  const Stars stars = make_stars(order, l, slab);
  EdgeSet negative(l, slab);
  DimResult* const dim = result.dim;
  run_dim0(order, l, stars, negative, dim[0].input, slab);
  if (batch.wanted(1) || batch.wanted(2)) {
    run_dim2(order, l, stars, dim[2].input, nullptr, nullptr, slab);
  }
  if (batch.wanted(1)) run_dim1(order, l, stars, negative, dim[1].input, slab);
  for (int d = 0; d < 3; ++d) {
    if (!batch.wanted(d)) dim[d] = DimResult();
  }
  return result;
}

size_t volume_bytes(const Problem& batch) {
  return size_t(Lattice(batch).size()) * (batch.input_dtype == DType::kF64 ? 130 : 110);
}

template ItemResult match_volume<float>(const Problem&, int64_t, int, Slab&);
template ItemResult match_volume<double>(const Problem&, int64_t, int, Slab&);
template ItemResult bars_of_volume<float>(const Problem&, int64_t, int, Slab&);
template ItemResult bars_of_volume<double>(const Problem&, int64_t, int, Slab&);

}  // namespace cpu
}  // namespace pyloss
