// Betti matching on the CPU: images I (input), T (target) and M = min(I, T), as filtrations.
//
//     local   pair neighbours in I, T and M                             betti_local.h
//     sort    the edges that are left, of each
//     dim 0   union-find over the roots; M's also carries the oldest vertices in I and T
//     dim 1   the dual runs over the edges that dim 0 left; those of I and T also carry which
//             square of M dies                                          betti_forest.h
//     match   a bar of M matches the two bars, of I and of T, found at its death
//
// Every bar list has one writer: no result depends on the number of threads.
#include "cpu/betti_image.h"

#include <algorithm>
#include <vector>

#include "common/compiler.h"
#include "cpu/betti_forest.h"
#include "cpu/betti_local.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {

using namespace betti_item;
using namespace betti_forest;

namespace {

// Items, and those of them that are still to come, ascending.
template <class K>
struct Run {
  Array<Item> items;
  Array<Sortable<K>> order;
  uint32_t item_count = 0, count = 0;
};

// Dimension 0 of an image.
template <class K>
Run<K> join_voxels(const K* keys, const Grid& g, const Planes& planes, const Events* events,
                   Forest<K>& forest, const K* const labels[2], Slab& slab) {
  Run<K> r;
  const uint32_t n = planes.rest_count + (events ? events->count : 0);
  r.items = Array<Item>(slab, n);
  r.order = Array<Sortable<K>>(slab, n);
  r.item_count = collect(keys, g, planes, events, r.items.get(), r.order.get());
  sort_items(r.order, n, slab);
  r.count = join_ascending(forest, r.order.get(), r.items.get(), n, labels, slab);
  return r;
}

// Dimension 1. `labels`: keys of the image whose squares are labels, or null.
template <class K>
void join_squares(Run<K>& r, const Grid& g, const Planes& planes, Forest<K>& forest,
                  const K* labels, Slab& slab) {
  find_sides(planes, g, r.items.get(), r.item_count);
  join_descending(forest, g, r.order.get(), r.items.get(), r.count, labels, slab);
  r = Run<K>();
}

uint32_t lowest_voxel(const Grid& g, const uint64_t* lowest) {
  uint32_t at = g.words;
  while (!lowest[at]) ++at;
  return 64 * at + uint32_t(lowest_bit(lowest[at]));
}

// For the memory of a later root's edge, which is anywhere.
template <class K>
void ask_ahead(const Forest<K>& f, const K* keys, uint32_t i) {
  constexpr uint32_t kAhead = 16;
  if (i + kAhead < f.count) PYLOSS_PREFETCH(keys + (f.edge[i + kAhead] >> 1));
}

// The voxel that carries an edge's value, and the value; of equal ones the last. Without branches,
// which could not be predicted.
template <class K>
struct Carrier {
  uint32_t voxel;
  K key;

  Carrier(const K* keys, const Grid& g, uint32_t e) : voxel(e >> 1), key(keys[voxel]) {
    see(keys, g.second_end(e));
  }
  void see(const K* keys, uint32_t v) {
    const K other = keys[v];
    voxel = other >= key ? v : voxel;
    key = std::max(key, other);
  }
};

// The bars of dimension 0 in the order of their births; `number`, where asked for, receives those
// of the roots.
template <class K>
void list_bars(const Forest<K>& f, const K* keys, const Grid& g, uint32_t oldest,
               std::vector<Bar>& bars, uint32_t* number) {
  bars.reserve(f.count);
  for (uint32_t i = 0; i < f.count; ++i) {
    ask_ahead(f, keys, i);
    if (number) number[i] = kNone;
    const uint32_t v = uint32_t(f.age[i]), e = f.edge[i];
    if (v == oldest) continue;
    const Carrier<K> last(keys, g, e);
    if (last.key == key_of_age<K>(f.age[i])) continue;
    if (number) number[i] = uint32_t(bars.size());
    const uint32_t birth = g.flat(v);
    bars.push_back({birth, g.flat_edge(e), birth, g.flat(last.voxel)});
  }
}

// Those of dimension 1 in the order of their deaths. `pair(square, i)` gets the bar of each root.
template <class K, class Pair>
void list_square_bars(const Forest<K>& f, const K* keys, const Grid& g, std::vector<Bar>& bars,
                      Pair&& pair) {
  bars.reserve(f.count);
  for (uint32_t i = 1; i < f.count; ++i) {
    ask_ahead(f, keys, i);
    const uint32_t s = uint32_t(f.age[i]), e = f.edge[i];
    const Carrier<K> first(keys, g, e);
    if (first.key == key_of_age<K>(f.age[i])) continue;
    Carrier<K> top(keys, g, 2 * s + 1);
    top.see(keys, s + g.pitch);
    top.see(keys, s + g.pitch + 1);
    pair(i, uint32_t(bars.size()));
    bars.push_back({g.flat_edge(e), g.flat(s), g.flat(first.voxel), g.flat(top.voxel)});
  }
}

}  // namespace

template <class R>
ItemResult match_image(const Problem& batch, int64_t item, int threads, Slab& slab) {
  using K = typename betti_local::KeyOf<R>::type;
  const Grid g(batch);
  const int64_t n = batch.rows * batch.cols;
  const R* const image[2] = {static_cast<const R*>(batch.input) + item * n,
                             static_cast<const R*>(batch.target) + item * n};
  ItemResult result;
  enum { kInput, kTarget, kComparison };
  Array<K> keys[3];
  Range<K> range[3];
  parallel_for(2, 1, threads, [&](int64_t i, int64_t) {
    keys[i] = Array<K>(slab, g.size() + 64);
    if (!make_keys(image[i], g, batch.superlevel, keys[i].get(), range[i])) {
      found_nan(i == kInput ? "input" : "target", item);
    }
  });
  Planes planes[3];
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    if (i == kComparison) {
      keys[i] = Array<K>(slab, g.size() + 64);
      range[i] = min_keys(keys[kInput].get(), keys[kTarget].get(), g, keys[i].get());
    }
    planes[i] = pair_locally(keys[i].get(), g, &range[i], slab);
  });
  const bool squares = batch.wanted(1) && g.rows > 1;
  const K* const side_keys[2] = {keys[kInput].get(), keys[kTarget].get()};
  const K* const own_keys = keys[kComparison].get();
  const Planes* const sides[2] = {&planes[kInput], &planes[kTarget]};
  const Planes& own = planes[kComparison];
  Array<Edges> rises;
  if (squares) rises = square_rises(own_keys, g, slab);

  Run<K> runs[3];
  Forest<K> forest[3];
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    planes[i].voxels.open(g, slab);
    if (i != kComparison) {
      forest[i] =
          make_forest(side_keys[i], g, *sides[i], static_cast<const K* const*>(nullptr), slab);
      Events events;
      if (squares) events = square_events(g, *sides[i], own, rises.get(), slab);
      runs[i] = join_voxels(side_keys[i], g, *sides[i], squares ? &events : nullptr, forest[i],
                            static_cast<const K* const*>(nullptr), slab);
      planes[i].voxels.close();
      return;
    }
    const bool labels = batch.wanted(0);
    forest[i] = make_forest(own_keys, g, own, labels ? side_keys : nullptr, slab);
    Events events;
    if (labels) {
      events = voxel_events(g, own, sides, slab);
      lowest_labels(forest[i], g, own, sides, side_keys);
    }
    runs[i] = join_voxels(own_keys, g, own, labels ? &events : nullptr, forest[i],
                          labels ? side_keys : nullptr, slab);
    planes[i].voxels.close();
  });

  const uint32_t oldest[2] = {lowest_voxel(g, planes[kInput].lowest.get()),
                              lowest_voxel(g, planes[kTarget].lowest.get())};
  result.oldest_input = g.flat(oldest[kInput]);
  result.oldest_target = g.flat(oldest[kTarget]);
  std::vector<ComparisonBar> comparison;
  if (batch.wanted(0)) {
    DimResult& zero = result.dim[0];
    Array<uint32_t> number[2];
    for (int i = 0; i < 2; ++i) {
      number[i] = Array<uint32_t>(slab, forest[i].count);
      list_bars(forest[i], side_keys[i], g, oldest[i], i == kInput ? zero.input : zero.target,
                number[i].get());
    }
    const auto bar_at = [&](int i, uint32_t v) {
      const uint32_t root = sides[i]->voxels.number(v);
      return root == kNone ? kNone : number[i][root];
    };
    const Forest<K>& f = forest[kComparison];
    const uint32_t first = lowest_voxel(g, own.lowest.get());
    for (uint32_t i = 0; i < f.count; ++i) {
      ask_ahead(f, own_keys, i);
      const uint32_t v = uint32_t(f.age[i]), e = f.edge[i];
      if (v == first) continue;
      if (std::max(own_keys[e >> 1], own_keys[g.second_end(e)]) == own_keys[v]) continue;
      const uint32_t in_input = bar_at(kInput, uint32_t(f.label[0][i]));
      const uint32_t in_target = bar_at(kTarget, uint32_t(f.label[1][i]));
      comparison.push_back({g.flat(v), g.flat_edge(e), in_input, in_target});
    }
    link(comparison, zero);
  }
  if (!squares) return result;

  DimResult& one = result.dim[1];
  Array<uint32_t> bar_of[2];  // by the root of M that ends with it
  parallel_for(3, 1, threads, [&](int64_t i, int64_t) {
    const bool side = i != kComparison;
    const K* const label_keys = side ? own_keys : nullptr;
    planes[i].squares.open(g, slab);
    forest[i] = make_square_forest(keys[i].get(), g, planes[i], label_keys, slab);
    if (side) highest_labels(forest[i], g, planes[i], own, rises.get(), own_keys);
    join_squares(runs[i], g, planes[i], forest[i], label_keys, slab);
    planes[i].squares.close();
    if (!side) return;
    bar_of[i] = Array<uint32_t>(slab, own.squares.count);
    std::fill_n(bar_of[i].get(), own.squares.count, kNone);
    list_square_bars(forest[i], keys[i].get(), g, i == kInput ? one.input : one.target,
                     [&](uint32_t root, uint32_t bar) {
                       const uint32_t in_own =
                           own.squares.number(uint32_t(forest[i].label[0][root]));
                       if (in_own != kNone) bar_of[i][in_own] = bar;
                     });
  });
  comparison.clear();
  std::vector<Bar> of_comparison;
  list_square_bars(forest[kComparison], own_keys, g, of_comparison, [&](uint32_t root, uint32_t) {
    comparison.push_back({0, 0, bar_of[0][root], bar_of[1][root]});
  });
  for (size_t i = 0; i < of_comparison.size(); ++i) {
    comparison[i].birth = of_comparison[i].birth;
    comparison[i].death = of_comparison[i].death;
  }
  link(comparison, one);
  return result;
}

template <class R>
ItemResult bars_of_image(const Problem& batch, int64_t item, Slab& slab) {
  using K = typename betti_local::KeyOf<R>::type;
  const Grid g(batch);
  const R* const image = static_cast<const R*>(batch.input) + item * batch.rows * batch.cols;
  ItemResult result;
  Array<K> keys(slab, g.size() + 64);
  Range<K> range;
  if (!make_keys(image, g, batch.superlevel, keys.get(), range)) found_nan("input", item);
  const K* const key = keys.get();
  Planes planes = pair_locally(key, g, static_cast<const Range<K>*>(nullptr), slab);
  const K* const* const no_labels = nullptr;
  Forest<K> forest = make_forest(key, g, planes, no_labels, slab);
  planes.voxels.open(g, slab);
  Run<K> run = join_voxels(key, g, planes, nullptr, forest, no_labels, slab);
  planes.voxels.close();
  const Age<K>* const ages = forest.age.get();
  const uint32_t oldest = uint32_t(*std::min_element(ages, ages + forest.count));
  result.oldest_input = result.oldest_target = g.flat(oldest);
  if (batch.wanted(0)) list_bars(forest, key, g, oldest, result.dim[0].input, nullptr);
  if (!batch.wanted(1) || g.rows < 2) return result;
  const K* const none = nullptr;
  forest = make_square_forest(key, g, planes, none, slab);
  planes.squares.open(g, slab);
  join_squares(run, g, planes, forest, none, slab);
  list_square_bars(forest, key, g, result.dim[1].input, [](uint32_t, uint32_t) {});
  return result;
}

size_t image_bytes(const Problem& batch) {
  // Of an image of noise on one thread; what does not fit comes from malloc.
  const size_t cells = Grid(batch).size();
  return cells * (batch.input_dtype == DType::kF64 ? 80 : 46) + (size_t(32) << 10);
}

template ItemResult match_image<float>(const Problem&, int64_t, int, Slab&);
template ItemResult match_image<double>(const Problem&, int64_t, int, Slab&);
template ItemResult bars_of_image<float>(const Problem&, int64_t, Slab&);
template ItemResult bars_of_image<double>(const Problem&, int64_t, Slab&);

}  // namespace cpu
}  // namespace pyloss
