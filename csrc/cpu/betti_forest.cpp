#include "cpu/betti_forest.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/compiler.h"
#include "cpu/union_find.h"

namespace pyloss {
namespace cpu {
namespace betti_forest {
namespace {

// How many items ahead the loops in value order ask for memory: all of it is random access.
constexpr uint32_t kAhead = 16;

template <class K>
K square_key(const K* keys, const Grid& g, uint32_t s) {
  const K* const p = keys + s;
  return std::max(std::max(p[0], p[1]), std::max(p[g.pitch], p[g.pitch + 1]));
}

template <class Fn>
void each(uint64_t word, uint32_t first, Fn&& fn) {
  for (; word; word &= word - 1) fn(first + uint32_t(lowest_bit(word)));
}

template <int kBits, class K>
void radix_sort(Array<Sortable<K>>& order, uint32_t n, Slab& slab) {
  using U = std::make_unsigned_t<K>;
  constexpr int kPasses = (8 * sizeof(K) + kBits - 1) / kBits;
  constexpr uint32_t kBuckets = 1u << kBits;
  constexpr U kSign = U(1) << (8 * sizeof(K) - 1);
  std::vector<uint32_t> counts(kPasses * kBuckets, 0);
  for (uint32_t i = 0; i < n; ++i) {
    const U key = U(order[i].key) ^ kSign;
    for (int pass = 0; pass < kPasses; ++pass) {
      ++counts[pass * kBuckets + ((key >> (pass * kBits)) & (kBuckets - 1))];
    }
  }
  Array<Sortable<K>> to(slab, n);
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* const count = counts.data() + pass * kBuckets;
    const int shift = pass * kBits;
    if (count[((U(order[0].key) ^ kSign) >> shift) & (kBuckets - 1)] == n) continue;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kBuckets; ++i) {
      const uint32_t c = count[i];
      count[i] = sum;
      sum += c;
    }
    for (uint32_t i = 0; i < n; ++i) {
      const Sortable<K> x = order[i];
      to[count[((U(x.key) ^ kSign) >> shift) & (kBuckets - 1)]++] = x;
    }
    std::swap(order, to);
  }
}

}  // namespace

template <class K>
void sort_items(Array<Sortable<K>>& order, uint32_t n, Slab& slab) {
  if (n < 200) {
    std::sort(order.get(), order.get() + n, [](const Sortable<K>& a, const Sortable<K>& b) {
      return a.key != b.key ? a.key < b.key : a.item < b.item;
    });
  } else if (n < 6000) {
    radix_sort<8>(order, n, slab);
  } else {
    radix_sort<11>(order, n, slab);
  }
}

template <class K>
Forest<K> make_forest(const K* keys, const Grid& g, const Planes& planes, const K* const other[2],
                      Slab& slab) {
  const uint32_t n = planes.voxels.count;
  Forest<K> f;
  f.count = n;
  f.age = Array<Age<K>>(slab, n);
  f.edge = Array<uint32_t>(slab, n);
  const bool labels = other != nullptr;
  if (labels) {
    for (auto& label : f.label) label = Array<Age<K>>(slab, n);
  }
  uint32_t i = 0;
  for (uint32_t at = g.words; at < (g.rows + 1) * g.words; ++at) {
    each(planes.voxels.roots[at].cells, 64 * at, [&](uint32_t v) {
      f.age[i] = age_of(keys[v], v);
      if (labels) {
        f.label[0][i] = age_of(other[0][v], v);
        f.label[1][i] = age_of(other[1][v], v);
      }
      ++i;
    });
  }
  return f;
}

template <class K>
Forest<K> make_square_forest(const K* keys, const Grid& g, const Planes& planes, const K* other,
                             Slab& slab) {
  const uint32_t n = planes.squares.count;
  Forest<K> f;
  f.count = n;
  f.age = Array<Age<K>>(slab, n);
  f.edge = Array<uint32_t>(slab, n);
  f.age[0] = age_of(kFrame<K>, 0);
  if (other) {
    f.label[0] = Array<Age<K>>(slab, n);
    f.label[0][0] = age_of(kFrame<K>, 0);
  }
  uint32_t i = 1;
  for (uint32_t at = g.words; at < g.rows * g.words; ++at) {
    each(planes.squares.roots[at].cells, 64 * at, [&](uint32_t s) {
      f.age[i] = age_of(square_key(keys, g, s), s);
      if (other) f.label[0][i] = age_of(square_key(other, g, s), s);
      ++i;
    });
  }
  return f;
}

// --------------------------------------------------------------------------------------------------
// Events

namespace {

inline uint64_t from_left(const Edges* edges, uint32_t at, bool first) {
  return edges[at].right << 1 | (first ? 0 : edges[at - 1].right >> 63);
}
inline uint64_t from_left(const uint64_t* words, uint32_t at) {
  return words[at] << 1 | words[at - 1] >> 63;
}
inline uint64_t from_right(const uint64_t* words, uint32_t at) {
  return words[at] >> 1 | words[at + 1] << 63;
}

// Squares of which a voxel is in the set.
inline uint64_t squares_with(const uint64_t* voxels, uint32_t at, uint32_t words) {
  return voxels[at] | from_right(voxels, at) | voxels[at + words] | from_right(voxels, at + words);
}
inline uint64_t squares_within(const uint64_t* voxels, uint32_t at, uint32_t words) {
  return voxels[at] & from_right(voxels, at) & voxels[at + words] & from_right(voxels, at + words);
}

Events empty_events(const Grid& g, bool squares, Slab& slab) {
  Events e;
  e.cells = Array<uint64_t>(slab, g.all_words());
  e.edges = Array<Edges>(slab, g.all_words());
  std::fill_n(e.cells.get(), g.all_words(), 0);
  std::fill_n(e.edges.get(), g.all_words(), Edges{0, 0});
  e.squares = squares;
  e.count = 0;
  return e;
}

}  // namespace

Events voxel_events(const Grid& g, const Planes& planes, const Planes* const others[2],
                    Slab& slab) {
  Events found = empty_events(g, false, slab);
  for (uint32_t row = 1; row <= g.rows; ++row) {
    for (uint32_t w = 0; w < g.words; ++w) {
      const uint32_t at = row * g.words + w;
      const Directions& d = planes.voxels.directions[at];
      uint64_t need = 0;
      for (int i = 0; i < 2; ++i) {
        const Edges* const rises = others[i]->rises.get();
        // Where the cell is older than the one that its pair leads to. The highest values of the
        // other image bear no bar, so that a label of theirs need not be told from none.
        need |= ((d.up & ~rises[at - g.words].down) | (d.left & ~from_left(rises, at, w == 0)) |
                 (d.down & rises[at].down) | (d.right & rises[at].right)) &
                ~others[i]->highest[at];
      }
      need &= ~planes.lowest[at];
      if (!need) continue;
      found.count += uint32_t(bit_count(need));
      found.edges[at - g.words].down |= need & d.up;
      found.edges[at].down |= need & d.down;
      found.edges[at].right |= need & d.right;
      const uint64_t left = need & d.left;
      found.edges[at].right |= left >> 1;
      if (w > 0) found.edges[at - 1].right |= left << 63;
    }
  }
  return found;
}

Events square_events(const Grid& g, const Planes& planes, const Planes& other, const Edges* rises,
                     Slab& slab) {
  Events found = empty_events(g, true, slab);
  for (uint32_t row = 1; row < g.rows; ++row) {
    for (uint32_t w = 0; w < g.words; ++w) {
      const uint32_t at = row * g.words + w;
      const Directions& d = planes.squares.directions[at];
      uint64_t need = (d.down & ~rises[at].down) | (d.right & ~rises[at].right) |
                      (d.up & rises[at - g.words].down) | (d.left & from_left(rises, at, w == 0)) |
                      d.up_left;
      // At the lowest squares of the other image ends no bar of it, so that a label of theirs need
      // not be told from none.
      need &= ~squares_within(other.lowest.get(), at, g.words) &
              ~squares_with(planes.highest.get(), at, g.words);
      if (!need) continue;
      found.count += uint32_t(bit_count(need));
      found.cells[at] = need;
      found.edges[at + g.words].right |= need & d.down;
      found.edges[at].right |= need & d.up;
      found.edges[at].down |= need & d.left;
      const uint64_t right = need & d.right, up_left = need & d.up_left;
      found.edges[at].down |= right << 1;
      found.edges[at + 1].down |= right >> 63;
      found.edges[at].right |= up_left >> 1;
      if (w > 0) found.edges[at - 1].right |= up_left << 63;
    }
  }
  return found;
}

namespace {

// Cells of which the roots are asked for, a bunch at a time.
template <class Fn>
class Bunch {
 public:
  Bunch(const Walks& walks, const Grid& g, Fn fn) : walks_(walks), g_(g), fn_(fn) {}
  void add(uint32_t cell) {
    cells_[n_++] = cell;
    if (n_ == kSize) finish();
  }
  void finish() {
    uint32_t roots[kSize];
    find_roots(walks_, g_, cells_, n_, roots);
    for (uint32_t i = 0; i < n_; ++i) fn_(cells_[i], roots[i]);
    n_ = 0;
  }

 private:
  static constexpr uint32_t kSize = 256;
  const Walks& walks_;
  const Grid& g_;
  Fn fn_;
  uint32_t n_ = 0, cells_[kSize];
};

}  // namespace

template <class K>
void lowest_labels(Forest<K>& f, const Grid& g, const Planes& planes, const Planes* const others[2],
                   const K* const keys[2]) {
  const uint64_t* const low = planes.lowest.get();
  for (int i = 0; i < 2; ++i) {
    const Edges* const rises = others[i]->rises.get();
    Age<K>* const label = f.label[i].get();
    Bunch bunch(planes.voxels, g, [&](uint32_t v, uint32_t root) {
      label[root] = std::min(label[root], age_of(keys[i][v], v));
    });
    for (uint32_t row = 1; row <= g.rows; ++row) {
      for (uint32_t w = 0; w < g.words; ++w) {
        const uint32_t at = row * g.words + w;
        if (!low[at]) continue;
        // Whatever has an older neighbour of the lowest value does not count.
        const uint64_t count =
            low[at] & ~others[i]->highest[at] & ~(low[at - g.words] & rises[at - g.words].down) &
            ~(from_left(low, at) & from_left(rises, at, w == 0)) &
            ~(low[at + g.words] & ~rises[at].down) & ~(from_right(low, at) & ~rises[at].right);
        each(count, 64 * at, [&](uint32_t v) { bunch.add(v); });
      }
    }
    bunch.finish();
  }
}

template <class K>
void highest_labels(Forest<K>& f, const Grid& g, const Planes& planes, const Planes& other,
                    const Edges* rises, const K* keys) {
  const uint64_t* const high = planes.highest.get();
  Age<K>* const label = f.label[0].get();
  Bunch bunch(planes.squares, g, [&](uint32_t s, uint32_t root) {
    label[root] = std::max(label[root], age_of(square_key(keys, g, s), s));
  });
  for (uint32_t row = 1; row < g.rows; ++row) {
    for (uint32_t w = 0; w < g.words; ++w) {
      const uint32_t at = row * g.words + w, below = at + g.words;
      if (!(high[at] | from_right(high, at) | high[below] | from_right(high, below))) continue;
      const uint64_t squares = squares_with(high, at, g.words) & Grid::below(w, g.cols - 1) &
                               ~squares_within(other.lowest.get(), at, g.words);
      // The edges of a square that have the highest value.
      const uint64_t top = high[at] | from_right(high, at);
      const uint64_t bottom = high[below] | from_right(high, below);
      const uint64_t left = high[at] | high[below];
      const uint64_t right = from_right(high, at) | from_right(high, below);
      const uint64_t count = squares & ~(top & ~rises[at - g.words].down) &
                             ~(bottom & rises[at].down) & ~(left & ~from_left(rises, at, w == 0)) &
                             ~(right & rises[at].right);
      each(count, 64 * at, [&](uint32_t s) { bunch.add(s); });
    }
  }
  bunch.finish();
}

// --------------------------------------------------------------------------------------------------
// Union-find. Without branches on what merges, which cannot be predicted: an edge within a
// component writes what is there already.

namespace {

Array<uint32_t> singletons(uint32_t n, Slab& slab) {
  Array<uint32_t> parent(slab, n);
  for (uint32_t i = 0; i < n; ++i) parent[i] = i;
  return parent;
}

template <bool kLabels, class K>
uint32_t ascending(Forest<K>& f, Sortable<K>* order, Item* items, uint32_t n,
                   const K* const keys[2], Slab& slab) {
  const Array<uint32_t> parents = singletons(f.count, slab);
  uint32_t* const parent = parents.get();
  Age<K>* const age = f.age.get();
  uint32_t cycle = 0;
  for (uint32_t i = 0; i < n; ++i) {
    if (i + 2 * kAhead < n) PYLOSS_PREFETCH(items + order[i + 2 * kAhead].item);
    if (i + kAhead < n) {
      const Item& far = items[order[i + kAhead].item];
      PYLOSS_PREFETCH(parent + far.a);
      PYLOSS_PREFETCH(age + far.a);
      if (far.b < kOther) {
        PYLOSS_PREFETCH(parent + far.b);
        PYLOSS_PREFETCH(age + far.b);
      }
      if (kLabels) {
        for (int k = 0; k < 2; ++k) {
          PYLOSS_PREFETCH(f.label[k].get() + far.a);
          PYLOSS_PREFETCH(far.b == kEvent ? static_cast<const void*>(keys[k] + far.cell)
                                          : f.label[k].get() + far.b);
        }
      }
    }
    const Sortable<K> at = order[i];
    const Item x = items[at.item];
    if (x.b >= kOther) {
      if (x.b == kOther) {
        order[cycle++] = at;
      } else if (kLabels) {
        const uint32_t root = find_root(parent, x.a);
        for (int k = 0; k < 2; ++k) {
          Age<K>& label = f.label[k][root];
          label = std::min(label, age_of(keys[k][x.cell], x.cell));
        }
      }
      continue;
    }
    const uint32_t a = find_root(parent, x.a), b = find_root(parent, x.b);
    const bool a_dies = age[a] > age[b];
    const uint32_t dead = a_dies ? a : b, live = a_dies ? b : a;
    order[cycle] = at;
    cycle += a == b;
    items[at.item].b = a == b ? kCycle : x.b;
    parent[dead] = live;
    f.edge[dead] = x.cell;
    if (kLabels) {
      for (int k = 0; k < 2; ++k) {
        const Age<K> p = f.label[k][dead], q = f.label[k][live];
        f.label[k][dead] = std::max(p, q);
        f.label[k][live] = std::min(p, q);
      }
    }
  }
  return cycle;
}

template <bool kLabels, class K>
void descending(Forest<K>& f, const Grid& g, const Sortable<K>* order, const Item* items,
                uint32_t n, const K* keys, Slab& slab) {
  const Array<uint32_t> parents = singletons(f.count, slab);
  uint32_t* const parent = parents.get();
  Age<K>* const age = f.age.get();
  for (uint32_t i = n; i-- > 0;) {
    if (i >= 2 * kAhead) PYLOSS_PREFETCH(items + order[i - 2 * kAhead].item);
    if (i >= kAhead) {
      const Item& far = items[order[i - kAhead].item];
      for (const uint32_t root : {far.a, far.b == kOther ? far.a : far.b}) {
        PYLOSS_PREFETCH(parent + root);
        PYLOSS_PREFETCH(age + root);
        if (kLabels) PYLOSS_PREFETCH(f.label[0].get() + root);
      }
    }
    const Item& x = items[order[i].item];
    if (kLabels && x.b == kOther) {
      Age<K>& label = f.label[0][find_root(parent, x.a)];
      label = std::max(label, age_of(square_key(keys, g, x.cell), x.cell));
      continue;
    }
    const uint32_t a = find_root(parent, x.a), b = find_root(parent, x.b);
    const bool a_dies = age[a] < age[b];
    const uint32_t dead = a_dies ? a : b, live = a_dies ? b : a;
    parent[dead] = live;
    f.edge[dead] = x.cell;
    if (kLabels) {
      const Age<K> p = f.label[0][dead], q = f.label[0][live];
      f.label[0][dead] = std::min(p, q);
      f.label[0][live] = std::max(p, q);
    }
  }
}

}  // namespace

template <class K>
uint32_t join_ascending(Forest<K>& f, Sortable<K>* order, Item* items, uint32_t n,
                        const K* const keys[2], Slab& slab) {
  return keys ? ascending<true>(f, order, items, n, keys, slab)
              : ascending<false>(f, order, items, n, keys, slab);
}

template <class K>
void join_descending(Forest<K>& f, const Grid& g, const Sortable<K>* order, const Item* items,
                     uint32_t n, const K* keys, Slab& slab) {
  if (keys) {
    descending<true>(f, g, order, items, n, keys, slab);
  } else {
    descending<false>(f, g, order, items, n, keys, slab);
  }
}

#define PYLOSS_INSTANTIATE(K)                                                                     \
  template void sort_items(Array<Sortable<K>>&, uint32_t, Slab&);                                 \
  template Forest<K> make_forest(const K*, const Grid&, const Planes&, const K* const[2], Slab&); \
  template Forest<K> make_square_forest(const K*, const Grid&, const Planes&, const K*, Slab&);   \
  template void lowest_labels(Forest<K>&, const Grid&, const Planes&, const Planes* const[2],     \
                              const K* const[2]);                                                 \
  template void highest_labels(Forest<K>&, const Grid&, const Planes&, const Planes&,             \
                               const Edges*, const K*);                                           \
  template uint32_t join_ascending(Forest<K>&, Sortable<K>*, Item*, uint32_t, const K* const[2],  \
                                   Slab&);                                                        \
  template void join_descending(Forest<K>&, const Grid&, const Sortable<K>*, const Item*,         \
                                uint32_t, const K*, Slab&);
PYLOSS_INSTANTIATE(int32_t)
PYLOSS_INSTANTIATE(int64_t)
#undef PYLOSS_INSTANTIATE

}  // namespace betti_forest
}  // namespace cpu
}  // namespace pyloss
