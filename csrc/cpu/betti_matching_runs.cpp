#include "cpu/betti_matching_runs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace pyloss {
namespace cpu {
namespace betti_runs {
namespace {

// How many voxels ahead the loops in value order ask for memory: all of it is random access.
constexpr uint32_t kAhead = 24;

inline void touch(const void* p) {
  __builtin_prefetch(p);
}

inline uint32_t find(uint32_t* parent, uint32_t x) {
  uint32_t up = parent[x];
  while (up != x) {
    const uint32_t next = parent[up];
    parent[x] = next;
    x = next;
    up = parent[x];
  }
  return x;
}

template <class K>
struct Keyed {
  K key;
  uint32_t voxel;
};

void frame_positions(const Frame& f, uint32_t* position) {
  std::fill(position, position + f.stride, kNone);
  for (uint32_t row = 0; row < f.rows; ++row) position[f.padded(row, f.cols)] = kNone;
  std::fill(position + f.padded(f.rows, 0), position + f.size(), kNone);
}

// An image of two values: the smaller ones, then the larger ones. False if it has more.
template <class K>
bool sort_two_values(const K* keys, const Frame& f, Order& o) {
  const K first = keys[f.padded(0, 0)];
  K other = first;
  uint32_t of_first = 0;
  for (uint32_t row = 0; row < f.rows; ++row) {
    const K *k = keys + f.padded(row, 0), *end = k + f.cols;
    if (other == first) {
      const K* found = std::find_if(k, end, [first](K x) { return x != first; });
      if (found != end) other = *found;
    }
    bool third = false;
    uint32_t equal = 0;
    for (; k < end; ++k) {
      third |= (*k != first) & (*k != other);
      equal += *k == first;
    }
    if (third) return false;
    of_first += equal;
  }
  const uint32_t n = f.voxels();
  const bool first_is_low = first <= other;
  const K low = first_is_low ? first : other;
  const uint32_t low_count = first_is_low ? of_first : n - of_first;
  uint32_t next[2] = {0, low_count};
  for (uint32_t row = 0; row < f.rows; ++row) {
    const uint32_t begin = f.padded(row, 0);
    for (uint32_t v = begin; v < begin + f.cols; ++v) {
      uint32_t& at = next[keys[v] != low];
      o.voxel[at] = v | kTie;
      o.position[v] = at++;
    }
  }
  if (low_count) o.voxel[low_count - 1] &= ~kTie;
  o.voxel[n - 1] &= ~kTie;
  o.ties = true;
  return true;
}

}  // namespace

template <class R>
bool make_keys(const R* image, const Frame& f, bool superlevel,
               typename betti::KeyOf<R>::type* keys) {
  bool nan = false;
  for (uint32_t row = 0; row < f.rows; ++row) {
    const R* x = image + int64_t(row) * f.cols;
    auto* out = keys + f.padded(row, 0);
    bool bad = false;
    for (uint32_t col = 0; col < f.cols; ++col) {
      bad |= x[col] != x[col];
      out[col] = betti::filtration_key(x[col], superlevel);
    }
    nan |= bad;
  }
  return !nan;
}

template <class K>
Order sort_voxels(const K* keys, const Frame& f, Slab& slab) {
  constexpr int kBits = 11, kPasses = (8 * sizeof(K) + kBits - 1) / kBits;
  constexpr uint32_t kBuckets = 1u << kBits;
  const uint32_t n = f.voxels();
  Order o;
  o.voxel = Array<uint32_t>(slab, n);
  o.position = Array<uint32_t>(slab, f.size());
  frame_positions(f, o.position.get());
  if (sort_two_values(keys, f, o)) return o;

  std::vector<uint32_t> counts(kPasses * kBuckets, 0);
  for (uint32_t row = 0; row < f.rows; ++row) {
    const K* k = keys + f.padded(row, 0);
    for (uint32_t col = 0; col < f.cols; ++col) {
      for (int pass = 0; pass < kPasses; ++pass) {
        ++counts[pass * kBuckets + ((k[col] >> (pass * kBits)) & (kBuckets - 1))];
      }
    }
  }
  Array<Keyed<K>> from(slab, n), to(slab, n);
  for (uint32_t row = 0, i = 0; row < f.rows; ++row) {
    const uint32_t begin = f.padded(row, 0);
    for (uint32_t v = begin; v < begin + f.cols; ++v) from[i++] = {keys[v], v};
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* count = counts.data() + pass * kBuckets;
    if (std::find(count, count + kBuckets, n) != count + kBuckets) continue;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kBuckets; ++i) {
      const uint32_t c = count[i];
      count[i] = sum;
      sum += c;
    }
    const int shift = pass * kBits;
    for (uint32_t i = 0; i < n; ++i) {
      const Keyed<K> x = from[i];
      to[count[(x.key >> shift) & (kBuckets - 1)]++] = x;
    }
    std::swap(from, to);
  }
  for (uint32_t i = 0; i < n; ++i) {
    const uint32_t v = from[i].voxel;
    const bool tie = i + 1 < n && from[i + 1].key == from[i].key;
    o.ties |= tie;
    o.voxel[i] = v | (tie ? kTie : 0);
    o.position[v] = i;
  }
  return o;
}

template <class K>
Order merge_orders(const Order& a, const Order& b, const K* key_a, const K* key_b, const Frame& f,
                   Slab& slab) {
  const uint32_t n = f.voxels();
  Order o;
  o.voxel = Array<uint32_t>(slab, n);
  o.position = Array<uint32_t>(slab, f.size());
  frame_positions(f, o.position.get());
  // Voxels whose value comes from a, in a's order, and the others in b's: each ascending.
  uint32_t i = 0, j = 0, v = 0, w = 0;
  K x = 0, y = 0;
  auto next_of_a = [&] {
    for (; i < n; ++i) {
      if (i + kAhead < n) {
        const uint32_t far = a.at(i + kAhead);
        touch(key_a + far);
        touch(key_b + far);
        touch(o.position.get() + far);
      }
      v = a.at(i);
      x = key_a[v];
      if (x <= key_b[v]) return;
    }
  };
  auto next_of_b = [&] {
    for (; j < n; ++j) {
      if (j + kAhead < n) {
        const uint32_t far = b.at(j + kAhead);
        touch(key_a + far);
        touch(key_b + far);
      }
      w = b.at(j);
      y = key_b[w];
      if (y < key_a[w]) return;
    }
  };
  next_of_a();
  next_of_b();
  K previous = 0;
  for (uint32_t at = 0; at < n; ++at) {
    const bool from_a = j >= n || (i < n && (x < y || (x == y && v < w)));
    const uint32_t voxel = from_a ? v : w;
    const K key = from_a ? x : y;
    if (at > 0 && key == previous) {
      o.voxel[at - 1] |= kTie;
      o.ties = true;
    }
    o.voxel[at] = voxel;
    o.position[voxel] = at;
    previous = key;
    if (from_a) {
      ++i;
      next_of_a();
    } else {
      ++j;
      next_of_b();
    }
  }
  return o;
}

template bool make_keys<float>(const float*, const Frame&, bool, uint32_t*);
template bool make_keys<double>(const double*, const Frame&, bool, uint64_t*);
template Order sort_voxels<uint32_t>(const uint32_t*, const Frame&, Slab&);
template Order sort_voxels<uint64_t>(const uint64_t*, const Frame&, Slab&);
template Order merge_orders<uint32_t>(const Order&, const Order&, const uint32_t*, const uint32_t*,
                                      const Frame&, Slab&);
template Order merge_orders<uint64_t>(const Order&, const Order&, const uint64_t*, const uint64_t*,
                                      const Frame&, Slab&);

// --------------------------------------------------------------------------------------------------
// Dimension 0. Nodes are positions, so that the elder of two roots is the smaller number.

namespace {

struct OwnBars {
  const Order& o;
  std::vector<Bar>& bars;

  void prepare(uint32_t) {}
  void appear(uint32_t, uint32_t) {}
  void die(uint32_t dead, uint32_t, bool is_bar, uint32_t e, uint32_t death_voxel) {
    if (!is_bar) return;
    const uint32_t v = o.at(dead);
    bars.push_back({v, e, v, death_voxel});
  }
};

struct ComparisonBars {
  const Order &o, &input, &target;
  std::vector<ComparisonBar>& bars;
  uint32_t *oldest_input, *oldest_target;  // of the component of each root, as positions

  void prepare(uint32_t v) {
    touch(input.position.get() + v);
    touch(target.position.get() + v);
  }
  void appear(uint32_t at, uint32_t v) {
    oldest_input[at] = input.position[v];
    oldest_target[at] = target.position[v];
  }
  static uint32_t merge(uint32_t* oldest, uint32_t dead, uint32_t live) {
    const uint32_t a = oldest[dead], b = oldest[live];
    oldest[live] = std::min(a, b);
    return std::max(a, b);
  }
  void die(uint32_t dead, uint32_t live, bool is_bar, uint32_t e, uint32_t) {
    const uint32_t a = merge(oldest_input, dead, live), b = merge(oldest_target, dead, live);
    if (is_bar) bars.push_back({o.at(dead), e, input.at(a), target.at(b)});
  }
};

template <class Deaths>
void kruskal(const Order& o, const Frame& f, Cycle* cycles, uint32_t& cycle_count, Deaths deaths,
             Slab& slab) {
  const uint32_t n = f.voxels(), stride = f.stride;
  const uint32_t* position = o.position.get();
  Array<uint32_t> parents(slab, n);
  uint32_t* parent = parents.get();
  uint32_t cycle = 0;

  for (uint32_t begin = 0; begin < n;) {
    if (begin + kAhead < n) {
      const uint32_t far = o.at(begin + kAhead);
      touch(position + far - stride);
      touch(position + far);
      touch(position + far + stride);
      deaths.prepare(far);
    }
    if (begin + kAhead / 2 < n) {
      const uint32_t near = o.at(begin + kAhead / 2);
      // Without branches, which would be mispredicted every other time.
      const uint32_t up = position[near - stride], down = position[near + stride];
      touch(parent + (up < begin ? up : begin));
      touch(parent + (down < begin ? down : begin));
    }
    const uint32_t v = o.voxel[begin];
    if (!(v & kTie)) {
      // One voxel of this value, and its edges to smaller neighbours, ascending. Collected without
      // branches: which neighbours are smaller cannot be predicted.
      uint32_t at[5], edge[5], count = 0;
      auto collect = [&](uint32_t neighbour, uint32_t e) {
        at[count] = position[neighbour];
        edge[count] = e;
        count += at[count] < begin;
      };
      collect(v - stride, 2 * (v - stride));
      collect(v - 1, 2 * (v - 1) + 1);
      collect(v + stride, 2 * v);
      collect(v + 1, 2 * v + 1);
      parent[begin] = begin;
      deaths.appear(begin, v);
      if (count > 0) {  // the first edge joins it to what is there: a bar of length 0
        uint32_t root = find(parent, at[0]);
        parent[begin] = root;
        deaths.die(begin, root, false, edge[0], v);
        for (uint32_t i = 1; i < count; ++i) {
          const uint32_t other = find(parent, at[i]);
          cycles[cycle] = {edge[i], begin};
          cycle += other == root;
          if (other == root) continue;
          const uint32_t dead = std::max(root, other), live = std::min(root, other);
          parent[dead] = live;
          deaths.die(dead, live, true, edge[i], v);
          root = live;
        }
      }
      ++begin;
      continue;
    }
    uint32_t end = begin + 1;
    while (o.voxel[end - 1] & kTie) ++end;
    for (uint32_t i = begin; i < end; ++i) {
      parent[i] = i;
      deaths.appear(i, o.at(i));
    }
    auto edge = [&](uint32_t p, uint32_t q, uint32_t e) {
      const uint32_t a = find(parent, position[p]), b = find(parent, position[q]);
      if (a == b) {
        cycles[cycle++] = {e, begin};
        return;
      }
      const uint32_t dead = std::max(a, b), live = std::min(a, b);
      parent[dead] = live;
      deaths.die(dead, live, dead < begin, e, position[q] >= begin ? q : p);
    };
    // Edges up to smaller voxels (number 2 (w - stride)) and all others: two ascending streams.
    uint32_t next_up = begin;
    auto ups = [&](uint32_t below) {
      for (; next_up < end && o.at(next_up) < below; ++next_up) {
        const uint32_t w = o.at(next_up);
        if (position[w - stride] < begin) edge(w - stride, w, 2 * (w - stride));
      }
    };
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t u = o.at(i);
      ups(u + stride);
      if (position[u - 1] < begin) edge(u - 1, u, 2 * (u - 1) + 1);
      if (position[u + stride] < end) edge(u, u + stride, 2 * u);
      if (position[u + 1] < end) edge(u, u + 1, 2 * u + 1);
    }
    ups(kNone);
    begin = end;
  }
  cycle_count = cycle;
}

}  // namespace

void run_dim0(const Order& o, const Frame& f, Cycle* cycles, uint32_t& cycle_count,
              std::vector<Bar>& bars, Slab& slab) {
  kruskal(o, f, cycles, cycle_count, OwnBars{o, bars}, slab);
}

void run_dim0_comparison(const Order& o, const Order& input, const Order& target, const Frame& f,
                         Cycle* cycles, uint32_t& cycle_count, std::vector<ComparisonBar>& bars,
                         Slab& slab) {
  Array<uint32_t> oldest_input(slab, f.voxels()), oldest_target(slab, f.voxels());
  kruskal(o, f, cycles, cycle_count,
          ComparisonBars{o, input, target, bars, oldest_input.get(), oldest_target.get()}, slab);
}

// --------------------------------------------------------------------------------------------------
// Dimension 1. Nodes are squares; node 0 stands for the outside, which outlives all others.

void positions_to_ranks(Order& o, const Frame& f) {
  if (!o.ties) return;
  uint32_t first = 0;
  for (uint32_t i = 0; i < f.voxels(); ++i) {
    o.position[o.at(i)] = first;
    if (!(o.voxel[i] & kTie)) first = i + 1;
  }
}

void square_ranks(const Order& o, const Frame& f, uint32_t* ranks) {
  const uint32_t* rank = o.position.get();
  ranks[0] = kNone;
  for (uint32_t row = 0; row + 1 < f.rows; ++row) {
    const uint32_t* a = rank + f.padded(row, 0);
    const uint32_t* b = a + f.stride;
    uint32_t* out = ranks + f.padded(row, 0);
    for (uint32_t col = 0; col + 1 < f.cols; ++col) {
      out[col] = std::max(std::max(a[col], a[col + 1]), std::max(b[col], b[col + 1]));
    }
  }
}

namespace {

inline uint64_t priority(const uint32_t* ranks, uint32_t square) {
  return uint64_t(ranks[square]) << 32 | square;
}

template <bool kImage>
void dual(const Order& o, const uint32_t* squares, const Frame& f, const Cycle* cycles,
          uint32_t cycle_count, std::vector<Bar>& bars, const uint32_t* comparison,
          uint32_t* bar_of, Slab& slab) {
  const uint32_t* rank = o.position.get();
  const uint32_t stride = f.stride;
  Array<uint32_t> parents(slab, f.size());
  uint32_t* parent = parents.get();
  std::memset(parent, 0, f.size() * sizeof(uint32_t));
  for (uint32_t row = 0; row + 1 < f.rows; ++row) {
    const uint32_t begin = f.padded(row, 0);
    for (uint32_t s = begin; s + 1 < begin + f.cols; ++s) parent[s] = s;
  }
  Array<uint64_t> longest;  // of the component of each root, in the comparison image
  if (kImage) {
    longest = Array<uint64_t>(slab, f.size());
    longest[0] = uint64_t(kNone) << 32;
    for (uint32_t row = 0; row + 1 < f.rows; ++row) {
      const uint32_t begin = f.padded(row, 0);
      for (uint32_t s = begin; s + 1 < begin + f.cols; ++s) longest[s] = priority(comparison, s);
    }
  }
  for (uint32_t i = cycle_count; i-- > 0;) {
    if (i >= kAhead) {
      const uint32_t far = cycles[i - kAhead].edge >> 1;
      touch(parent + far);
      touch(parent + far - stride);
      touch(squares + far);
      if (kImage) touch(longest.get() + far);
    }
    const uint32_t e = cycles[i].edge, p = e >> 1;
    const uint32_t a = find(parent, (e & 1) ? p - stride : p - 1), b = find(parent, p);
    const uint64_t pa = priority(squares, a), pb = priority(squares, b);
    const bool a_dies = pa < pb;
    const uint32_t dead = a_dies ? a : b, live = a_dies ? b : a;
    parent[dead] = live;
    const bool is_bar = (a_dies ? pa : pb) >> 32 > cycles[i].rank;
    if (kImage) {
      const uint64_t x = longest[dead], y = longest[live];
      longest[live] = std::max(x, y);
      if (is_bar) bar_of[uint32_t(std::min(x, y))] = uint32_t(bars.size());
    }
    if (is_bar) {
      const uint32_t q = f.second_end(e);
      uint32_t top = dead;
      for (uint32_t v : {dead + 1, dead + stride, dead + stride + 1}) {
        if (rank[v] >= rank[top]) top = v;
      }
      bars.push_back({e, dead, rank[p] > rank[q] ? p : q, top});
    }
  }
}

}  // namespace

void run_dim1(const Order& o, const uint32_t* squares, const Frame& f, const Cycle* cycles,
              uint32_t cycle_count, std::vector<Bar>& bars, const uint32_t* comparison,
              uint32_t* bar_of, Slab& slab) {
  if (comparison) {
    dual<true>(o, squares, f, cycles, cycle_count, bars, comparison, bar_of, slab);
  } else {
    dual<false>(o, squares, f, cycles, cycle_count, bars, comparison, bar_of, slab);
  }
}

}  // namespace betti_runs
}  // namespace cpu
}  // namespace pyloss
