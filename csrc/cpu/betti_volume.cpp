// Betti matching of volumes on the CPU: images I (input), T (target) and M = min(I, T), as
// filtrations.
//
//     order   ranks of the voxels of I, T and M                            betti_volume_order.h
//     stars   pairs within the star of each voxel, of length 0, by tables  betti_volume_stars.h
//     dim 0   Kruskal over the edges that are left; M's runs also keep the oldest vertices in I, T
//     dim 2   dual runs over the squares that are left; those of I and T also keep which cube of M
//             dies                                                         betti_volume_trees.h
//     dim 1   reduction of the columns that are left, for I, T and M; and of every column of M with
//             the rows of I and with those of T                            betti_volume_loops.h
//     match   a bar of M matches the two bars, of I and of T, found at its death
//
// A target of two values needs no rows of its own in image persistence: rows_of_comparison.
//
// Parallel: the images, then the runs. Every list has one writer: no result depends on the number
// of threads.
//
// Memory traffic per voxel, with a binary target: 3 sorts of 8 bytes, 26 comparisons and 7 bytes of
// stars in each of 4 complexes (I, T, M, and I where M is smallest), 3 forests of voxels and 4 of
// cubes, of 4 bytes. At a time up to 85 bytes; with every row and column, 150.
#include "cpu/betti_volume.h"

#include <algorithm>
#include <utility>
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

// Whether the bars of image persistence with the rows of T, a target of two values, are those of M
// itself as far as they matter. They do where their birth is that of a bar of T, and so has the low
// value. The cells of this value are the same in T and in M, with the same order, if I is larger
// wherever T is; and above it any order of rows gives the same pairs below it, M's own for one.
template <class K>
bool rows_of_comparison(const K* input, const K* target, const Lattice& l) {
  const K first = target[l.row(0, 0)];
  K low = first, high = first;
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      low = std::min(low, target[v]);
      high = std::max(high, target[v]);
    }
  });
  bool same = true;
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      same &= target[v] == low ? input[v] >= low : (target[v] == high) & (input[v] > low);
    }
  });
  return same;
}

struct Images {
  const Problem& batch;
  const Lattice l;
  int threads;
  Slab& slab;
  bool target_rows_of_comparison = false;
  Order order[3];
  Stars stars[3];
  Bits negative[3];
  std::vector<Bar> of_comparison[3];
  std::vector<uint32_t> births;  // of dimension 2, of the comparison image

  Images(const Problem& b, int t, Slab& s) : batch(b), l(b), threads(t), slab(s) {}

  // The order and the stars of all three.
  template <class R>
  void prepare(int64_t item) {
    using K = typename betti::KeyOf<R>::type;
    Array<K> keys[3];
    for (auto& k : keys) k = Array<K>(slab, l.size());
    parallel_for(2, 1, threads, [&](int64_t i, int64_t) {
      if (!make_keys(image_of<R>(batch, int(i), item), l, batch.superlevel, keys[i].get())) {
        found_nan(i == kInput ? "input" : "target", item);
      }
    });
    for (uint32_t v = 0; v < l.size(); ++v) {
      keys[kComparison][v] = std::min(keys[kInput][v], keys[kTarget][v]);
    }
    target_rows_of_comparison = rows_of_comparison(keys[kInput].get(), keys[kTarget].get(), l);
    parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
      order[i] = sort_voxels(keys[i].get(), l, slab);
      stars[i] = make_stars(order[i].rank.get(), l, slab);
      negative[i] = Bits(size_t(l.size()) * 3, slab);
    });
  }
  // The images whose rows need runs of their own.
  int row_images() const { return target_rows_of_comparison ? 1 : 2; }

  void match_dim0(DimResult& r);
  void match_dim2(DimResult& r);
  void match_dim1(DimResult& r);
};

void Images::match_dim0(DimResult& r) {
  std::vector<Bar>& bars = of_comparison[0];
  std::vector<uint32_t> deaths[2];
  parallel_for(2 + row_images(), 1, threads, [&](int64_t i, int64_t) {
    if (i < 2) {
      return run_dim0(order[i], l, stars[i], negative[i], i == kInput ? r.input : r.target, slab);
    }
    // The runs of the comparison image find the same bars.
    std::vector<Bar> again;
    Bits unused(size_t(l.size()) * 3, slab);
    const bool first = i == kComparison;
    run_dim0_image(order[kComparison], order[i - 2], l, stars[kComparison],
                   first ? negative[kComparison] : unused, first ? bars : again, deaths[i - 2],
                   slab);
  });
  if (!batch.wanted(0)) {
    r = DimResult();
    return;
  }
  const Array<uint32_t> of_input = by_birth(r.input, l.size(), slab),
                        of_target = by_birth(r.target, l.size(), slab);
  std::vector<ComparisonBar> comparison;
  for (size_t i = 0; i < bars.size(); ++i) {
    const Bar& m = bars[i];
    comparison.push_back({m.birth, m.death, of_input[deaths[0][i]],
                          of_target[row_images() == 2 ? deaths[1][i] : m.birth]});
  }
  link(comparison, r);
}

void Images::match_dim2(DimResult& r) {
  std::vector<Bar>& bars = of_comparison[2];
  Array<uint32_t> bar_of[2];
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    std::vector<Bar>& own = i == kInput ? r.input : i == kTarget ? r.target : bars;
    std::vector<uint32_t> unused;
    if (i >= row_images()) {
      return run_dim2(order[i], l, stars[i], own, i == kComparison ? births : unused, slab);
    }
    bar_of[i] = Array<uint32_t>(slab, l.size());
    std::fill(bar_of[i].get(), bar_of[i].get() + l.size(), kNone);
    run_dim2_image(order[i], order[kComparison], l, stars[i], own, bar_of[i].get(), slab);
  });
  if (!batch.wanted(2)) {
    r = DimResult();
    return;
  }
  std::vector<ComparisonBar> comparison;
  Array<uint32_t> of_target;
  const size_t squares = size_t(l.size()) * 3;
  if (row_images() == 1) of_target = by_birth(r.target, squares, slab);
  for (const Bar& m : bars) {
    comparison.push_back({m.birth, m.death, bar_of[kInput][m.death],
                          row_images() == 2 ? bar_of[kTarget][m.death] : of_target[m.birth]});
  }
  link(comparison, r);
}

void Images::match_dim1(DimResult& r) {
  std::vector<Bar>& bars = of_comparison[1];
  std::vector<ImagePair> pairs[2];
  const int images = row_images();
  parallel_for(images + 3, 1, threads, [&](int64_t i, int64_t) {  // the longest first
    if (i < images) {
      run_dim1_image({order[i], stars[i]}, negative[i], {order[kComparison], stars[kComparison]},
                     births, l, pairs[i], slab);
    } else {
      const int64_t which = i - images;
      run_dim1(order[which], l, stars[which], negative[which],
               which == kInput    ? r.input
               : which == kTarget ? r.target
                                  : bars,
               slab);
    }
  });
  std::vector<ComparisonBar> comparison;
  for (const Bar& m : bars) comparison.push_back({m.birth, m.death, kNone, kNone});
  for (int i : {kInput, kTarget}) {
    const Array<uint32_t> number =
        by_birth(i == kInput ? r.input : r.target, size_t(l.size()) * 3, slab);
    const auto in = i == kInput ? &ComparisonBar::in_input : &ComparisonBar::in_target;
    size_t at = 0;  // both in the order of deaths
    for (ComparisonBar& m : comparison) {
      uint32_t birth = m.birth;
      if (i < images) {
        while (pairs[i][at].square != m.death) ++at;
        birth = pairs[i][at].edge;
      }
      m.*in = number[birth];
    }
  }
  link(comparison, r);
}

}  // namespace

template <class R>
ItemResult match_volume(const Problem& batch, int64_t item, int threads, Slab& slab) {
  ItemResult result;
  Images images(batch, threads, slab);
  images.prepare<R>(item);
  result.oldest_input = images.order[kInput].voxel[0];
  result.oldest_target = images.order[kTarget].voxel[0];
  images.match_dim0(result.dim[0]);
  if (batch.wanted(1) || batch.wanted(2)) images.match_dim2(result.dim[2]);
  if (batch.wanted(1)) images.match_dim1(result.dim[1]);
  return result;
}

namespace {

// One image by itself.
struct Volume {
  const Lattice l;
  Order order;
  Stars stars;

  template <class R>
  static Volume of(const Problem& batch, int64_t item, Slab& slab) {
    Volume x{Lattice(batch), Order(), Stars()};
    Array<typename betti::KeyOf<R>::type> keys(slab, x.l.size());
    if (!make_keys(image_of<R>(batch, kInput, item), x.l, batch.superlevel, keys.get())) {
      found_nan("input", item);
    }
    x.order = sort_voxels(keys.get(), x.l, slab);
    x.stars = make_stars(x.order.rank.get(), x.l, slab);
    return x;
  }
};

}  // namespace

template <class R>
ItemResult bars_of_volume(const Problem& batch, int64_t item, Slab& slab) {
  const Volume x = Volume::of<R>(batch, item, slab);
  ItemResult result;
  result.oldest_input = result.oldest_target = x.order.voxel[0];
  Bits negative(size_t(x.l.size()) * 3, slab);
  DimResult* const dim = result.dim;
  run_dim0(x.order, x.l, x.stars, negative, dim[0].input, slab);
  std::vector<uint32_t> births;
  if (batch.wanted(1) || batch.wanted(2)) {
    run_dim2(x.order, x.l, x.stars, dim[2].input, births, slab);
  }
  if (batch.wanted(1)) run_dim1(x.order, x.l, x.stars, negative, dim[1].input, slab);
  for (int d = 0; d < 3; ++d) {
    if (!batch.wanted(d)) dim[d] = DimResult();
  }
  return result;
}

template <class R>
std::vector<int64_t> loops_of_volume(const Problem& volume, const int64_t* squares, int64_t count) {
  Slab slab(volume_bytes(volume));
  const Volume x = Volume::of<R>(volume, 0, slab);
  std::vector<Bar> voids;
  std::vector<uint32_t> births;
  run_dim2(x.order, x.l, x.stars, voids, births, slab);
  const Numbers numbers(volume);
  std::vector<std::pair<int64_t, int64_t>> places;  // (square, place)
  for (int64_t i = 0; i < count; ++i) places.push_back({squares[i], i});
  std::sort(places.begin(), places.end());
  std::vector<int64_t> rows;
  const auto found = [&](uint32_t square, const std::vector<uint32_t>& edges) {
    const int64_t number = numbers.cell(2, square);
    auto at = std::lower_bound(places.begin(), places.end(), std::make_pair(number, int64_t(0)));
    for (; at != places.end() && at->first == number; ++at) {
      for (uint32_t e : edges) rows.insert(rows.end(), {at->second, int64_t(numbers.cell(1, e))});
    }
  };
  reduced_columns(x.order, x.l, x.stars, found, slab);
  return rows;
}

size_t volume_bytes(const Problem& batch) {
  return size_t(Lattice(batch).size()) * (batch.input_dtype == DType::kF64 ? 130 : 110);
}

template ItemResult match_volume<float>(const Problem&, int64_t, int, Slab&);
template ItemResult match_volume<double>(const Problem&, int64_t, int, Slab&);
template ItemResult bars_of_volume<float>(const Problem&, int64_t, Slab&);
template ItemResult bars_of_volume<double>(const Problem&, int64_t, Slab&);
template std::vector<int64_t> loops_of_volume<float>(const Problem&, const int64_t*, int64_t);
template std::vector<int64_t> loops_of_volume<double>(const Problem&, const int64_t*, int64_t);

}  // namespace cpu
}  // namespace pyloss
