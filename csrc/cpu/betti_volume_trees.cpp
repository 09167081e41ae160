#include "cpu/betti_volume_trees.h"

#include <algorithm>
#include <utility>

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

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

// Whether a comes before b.
inline bool before(const uint32_t* rank, uint32_t a, uint32_t b) {
  return rank[a] < rank[b] || (rank[a] == rank[b] && a < b);
}

// --------------------------------------------------------------------------------------------------
// Dimension 0

struct OwnBars {
  std::vector<Bar>& bars;

  void die(uint32_t dead, uint32_t, bool is_bar, uint32_t e, uint32_t death_voxel) {
    if (is_bar) bars.push_back({dead, e, dead, death_voxel});
  }
};

struct ComparisonBars {
  const uint32_t *input, *target;  // ranks
  std::vector<ComparisonBar>& bars;
  uint32_t *oldest_input, *oldest_target;  // of the component of each root

  static uint32_t merge(const uint32_t* rank, uint32_t* oldest, uint32_t dead, uint32_t live) {
    const uint32_t a = oldest[dead], b = oldest[live];
    const bool a_first = before(rank, a, b);
    oldest[live] = a_first ? a : b;
    return a_first ? b : a;
  }
  void die(uint32_t dead, uint32_t live, bool is_bar, uint32_t e, uint32_t) {
    const uint32_t a = merge(input, oldest_input, dead, live),
                   b = merge(target, oldest_target, dead, live);
    if (is_bar) bars.push_back({dead, e, a, b});
  }
};

struct EdgesOf {
  const uint32_t* local;

  void touch(uint32_t v) const { __builtin_prefetch(local + v); }
  uint32_t operator()(uint32_t v) const { return Stars::edges(local[v]); }
};

template <class Deaths>
void kruskal(const Order& o, const Lattice& l, const Stars& stars, EdgeSet& negative, Deaths deaths,
             Slab& slab) {
  const uint32_t* rank = o.rank.get();
  Array<uint32_t> parents(slab, l.size());
  uint32_t* parent = parents.get();
  for (uint32_t v = 0; v < l.size(); ++v) parent[v] = v;
  const StarOffsets at(l);
  in_order<false>(o, l, at.edge, EdgesOf{stars.local.get()}, [&](uint32_t e, uint32_t r) {
    const Edge edge(l, e);
    uint32_t live = find(parent, edge.first), dead = find(parent, edge.second);
    if (live == dead) return;
    if (before(rank, dead, live)) std::swap(live, dead);
    parent[dead] = live;
    negative.add(e);
    deaths.die(dead, live, rank[dead] != r, e, edge.owner(rank));
  });
}

}  // namespace

void run_dim0(const Order& o, const Lattice& l, const Stars& stars, EdgeSet& negative,
              std::vector<Bar>& bars, Slab& slab) {
  kruskal(o, l, stars, negative, OwnBars{bars}, slab);
}

void run_dim0_comparison(const Order& o, const Order& input, const Order& target, const Lattice& l,
                         const Stars& stars, EdgeSet& negative, std::vector<ComparisonBar>& bars,
                         Slab& slab) {
  Array<uint32_t> oldest_input(slab, l.size()), oldest_target(slab, l.size());
  for (uint32_t v = 0; v < l.size(); ++v) oldest_input[v] = oldest_target[v] = v;
  kruskal(o, l, stars, negative,
          ComparisonBars{input.rank.get(), target.rank.get(), bars, oldest_input.get(),
                         oldest_target.get()},
          slab);
}

// --------------------------------------------------------------------------------------------------
// Dimension 2. Node 0, in the frame, stands for the outside, which outlives all others.

namespace {

struct SquaresOf {
  const uint32_t* local;
  const uint16_t* critical;

  void touch(uint32_t v) const {
    __builtin_prefetch(local + v);
    __builtin_prefetch(critical + v);
  }
  uint32_t operator()(uint32_t v) const { return Stars::filled(local[v]) | critical[v]; }
};

// The first voxel of a cube that carries its value.
uint32_t cube_voxel(const uint32_t* rank, const Lattice& l, uint32_t cube) {
  uint32_t best = cube;
  for (uint32_t octant = 1; octant < 8; ++octant) {
    const uint32_t v = cube + (octant >> 2 & 1) * l.step[0] + (octant >> 1 & 1) * l.step[1] +
                       (octant & 1) * l.step[2];
    if (rank[v] > rank[best]) best = v;
  }
  return best;
}

}  // namespace

void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              const uint32_t* comparison, uint32_t* bar_of, Slab& slab) {
  if (!l.has_cubes()) return;
  const uint32_t* rank = o.rank.get();
  Array<uint32_t> own(slab, l.size()), parents(slab, l.size()), longest;
  cube_ranks(o, l, own.get());
  uint32_t* parent = parents.get();
  for (uint32_t c = 0; c < l.size(); ++c) parent[c] = own[c] == kNone ? 0 : c;
  if (comparison) {  // of the component of each root the one that the comparison image fills last
    longest = Array<uint32_t>(slab, l.size());
    for (uint32_t c = 0; c < l.size(); ++c) longest[c] = c;
  }
  const StarOffsets at(l);
  auto clear = [&](uint32_t s, uint32_t owner) {
    for (int k = 0; k < 12; ++k) {
      if (3 * owner + uint32_t(at.square[k]) == s) stars.critical[owner] &= ~(1u << k);
    }
  };
  in_order<true>(o, l, at.square, SquaresOf{stars.local.get(), stars.critical.get()},
                 [&](uint32_t s, uint32_t r) {
                   const uint32_t cube = s / 3;
                   uint32_t live = find(parent, cube - l.step[s % 3]), dead = find(parent, cube);
                   if (live == dead) return;
                   if (before(own.get(), live, dead)) std::swap(live, dead);
                   parent[dead] = live;
                   uint32_t lost = kNone;
                   if (comparison) {
                     lost = longest[dead];
                     if (before(comparison, longest[live], lost)) std::swap(longest[live], lost);
                   }
                   const bool is_bar = own[dead] != r;
                   if (!is_bar && !o.ties) return;  // a square of the star of the cube's owner
                   const uint32_t owner = Square(l, s).owner(rank);
                   clear(s, owner);
                   if (!is_bar) return;
                   if (comparison) bar_of[lost] = uint32_t(bars.size());
                   bars.push_back({s, dead, owner, cube_voxel(rank, l, dead)});
                 });
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
