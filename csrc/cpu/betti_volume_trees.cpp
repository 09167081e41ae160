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

// For image persistence: a component of cells with its order, and the best of its cells in another.
struct Node {
  uint32_t parent, rank;
  uint32_t best, best_rank;
};

inline uint32_t find(Node* nodes, uint32_t x) {
  uint32_t up = nodes[x].parent;
  while (up != x) {
    const uint32_t next = nodes[up].parent;
    nodes[x].parent = next;
    x = next;
    up = nodes[x].parent;
  }
  return x;
}

// Whether a comes before b.
inline bool before(uint32_t rank_a, uint32_t a, uint32_t rank_b, uint32_t b) {
  return rank_a < rank_b || (rank_a == rank_b && a < b);
}

// Prefetches what is needed of a voxel's star.
struct Ahead {
  const Lattice& l;
  const Node* nodes;

  void touch(uint32_t v, bool both_sides) const {
    const uint32_t a = l.step[0], b = l.step[1];
    __builtin_prefetch(nodes + v);
    __builtin_prefetch(nodes + v - a);
    __builtin_prefetch(nodes + v - b);
    __builtin_prefetch(nodes + (both_sides ? v + a : v - a - b));
    if (both_sides) __builtin_prefetch(nodes + v + b);
  }
};

// --------------------------------------------------------------------------------------------------
// Dimension 0

// Without the edge that pairs with the voxel.
struct CriticalEdges {
  const uint32_t* local;

  void touch(uint32_t v) const { __builtin_prefetch(local + v); }
  uint32_t operator()(uint32_t v) const {
    const uint32_t edges = Stars::edges(local[v]);
    return Stars::joined(local[v]) ? edges & (edges - 1) : edges;
  }
};

struct Edges {
  const uint32_t* local;
  Ahead ahead;

  void touch(uint32_t v) const {
    __builtin_prefetch(local + v);
    ahead.touch(v, true);
  }
  uint32_t operator()(uint32_t v) const { return Stars::edges(local[v]); }
};

}  // namespace

void run_dim0(const Order& o, const Lattice& l, const Stars& stars, EdgeSet& negative,
              std::vector<Bar>& bars, Slab& slab) {
  const uint32_t *rank = o.rank.get(), *local = stars.local.get();
  Array<uint32_t> parents(slab, l.size());
  uint32_t* parent = parents.get();
  const StarOffsets at(l);
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      parent[v] = v;
      if (!Stars::joined(local[v])) continue;
      const int first = __builtin_ctz(Stars::edges(local[v]));
      parent[v] = v + uint32_t(at.end[first]);
      negative.add(3 * v + uint32_t(at.edge[first]));
    }
  });
  in_order<false>(o, l, at.edge, CriticalEdges{local}, [&](uint32_t e, uint32_t r) {
    const Edge edge(l, e);
    uint32_t live = find(parent, edge.first), dead = find(parent, edge.second);
    if (live == dead) return;
    if (before(rank[dead], dead, rank[live], live)) std::swap(live, dead);
    parent[dead] = live;
    negative.add(e);
    if (rank[dead] != r) bars.push_back({dead, e, dead, edge.owner(rank)});
  });
}

void run_dim0_image(const Order& o, const Order& rows, const Lattice& l, const Stars& stars,
                    EdgeSet& negative, std::vector<Bar>& bars, std::vector<uint32_t>& deaths,
                    Slab& slab) {
  const uint32_t* rank = o.rank.get();
  Array<Node> all(slab, l.size());
  Node* nodes = all.get();
  for (uint32_t v = 0; v < l.size(); ++v) nodes[v] = {v, rank[v], v, rows.rank[v]};
  const StarOffsets at(l);
  const Edges edges{stars.local.get(), {l, nodes}};
  in_order<false>(o, l, at.edge, edges, [&](uint32_t e, uint32_t r) {
    const Edge edge(l, e);
    uint32_t live = find(nodes, edge.first), dead = find(nodes, edge.second);
    if (live == dead) return;
    if (before(nodes[dead].rank, dead, nodes[live].rank, live)) std::swap(live, dead);
    Node &from = nodes[dead], &to = nodes[live];
    from.parent = live;
    negative.add(e);
    if (before(from.best_rank, from.best, to.best_rank, to.best)) {
      std::swap(from.best, to.best);
      std::swap(from.best_rank, to.best_rank);
    }
    if (from.rank == r) return;
    bars.push_back({dead, e, dead, edge.owner(rank)});
    deaths.push_back(from.best);
  });
}

// --------------------------------------------------------------------------------------------------
// Dimension 2. Node 0, in the frame, stands for the outside, which outlives all others.

namespace {

struct CriticalSquares {
  const uint16_t* critical;

  void touch(uint32_t v) const { __builtin_prefetch(critical + v); }
  uint32_t operator()(uint32_t v) const { return critical[v]; }
};

struct Squares {
  const uint32_t* local;
  const uint16_t* critical;
  Ahead ahead;

  void touch(uint32_t v) const {
    __builtin_prefetch(local + v);
    __builtin_prefetch(critical + v);
    ahead.touch(v, false);
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

// No longer critical.
void clear(const Stars& stars, const StarOffsets& at, uint32_t square, uint32_t owner) {
  for (int k = 0; k < 12; ++k) {
    if (3 * owner + uint32_t(at.square[k]) == square) {
      stars.critical[owner] &= uint16_t(~(1u << k));
    }
  }
}

// fn(first cube, number of cubes) of each row of them.
template <class Fn>
void each_row_of_cubes(const Lattice& l, Fn&& fn) {
  for (uint32_t slice = 0; slice + 1 < l.depth; ++slice) {
    for (uint32_t r = 0; r + 1 < l.rows; ++r) fn(l.row(slice, r), l.cols - 1);
  }
}

}  // namespace

void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              Slab& slab) {
  if (!l.has_cubes()) return;
  const uint32_t* rank = o.rank.get();
  Array<uint32_t> parents(slab, l.size());
  uint32_t* parent = parents.get();
  std::fill(parent, parent + l.size(), 0);
  each_row_of_cubes(l, [&](uint32_t begin, uint32_t count) {
    for (uint32_t c = begin; c < begin + count; ++c) parent[c] = c;
  });
  const StarOffsets at(l);
  const StarTables& t = star_tables();
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      const uint32_t cubes = stars.cubes[v];
      for (uint32_t x = cubes; x; x &= x - 1) {
        const int c = __builtin_ctz(x), next = t.beyond[cubes][c];
        if (next < 8) parent[v + uint32_t(at.cube[c])] = v + uint32_t(at.cube[next]);
      }
    }
  });
  const auto rank_of = [&](uint32_t cube) {
    return cube ? rank[cube_voxel(rank, l, cube)] : kNone;
  };
  in_order<true>(o, l, at.square, CriticalSquares{stars.critical.get()},
                 [&](uint32_t s, uint32_t r) {
                   const uint32_t cube = s / 3;
                   uint32_t live = find(parent, cube - l.step[s % 3]), dead = find(parent, cube);
                   if (live == dead) return;
                   uint32_t rank_dead = rank_of(dead);
                   const uint32_t rank_live = rank_of(live);
                   if (before(rank_live, live, rank_dead, dead)) {
                     std::swap(live, dead);
                     rank_dead = rank_live;
                   }
                   parent[dead] = live;
                   const uint32_t owner = Square(l, s).owner(rank);
                   clear(stars, at, s, owner);
                   if (rank_dead != r) bars.push_back({s, dead, owner, cube_voxel(rank, l, dead)});
                 });
}

void run_dim2_image(const Order& o, const Order& columns, const Lattice& l, const Stars& stars,
                    std::vector<Bar>& bars, uint32_t* bar_of, Slab& slab) {
  if (!l.has_cubes()) return;
  const uint32_t* rank = o.rank.get();
  Array<Node> all(slab, l.size());
  Node* nodes = all.get();
  {
    Array<uint32_t> own(slab, l.size()), other(slab, l.size());
    cube_ranks(o, l, own.get());
    cube_ranks(columns, l, other.get());
    for (uint32_t c = 0; c < l.size(); ++c) {
      nodes[c] = {own[c] == kNone ? 0 : c, own[c], c, other[c]};
    }
  }
  const StarOffsets at(l);
  const Squares squares{stars.local.get(), stars.critical.get(), {l, nodes}};
  in_order<true>(o, l, at.square, squares, [&](uint32_t s, uint32_t r) {
    const uint32_t cube = s / 3;
    uint32_t live = find(nodes, cube - l.step[s % 3]), dead = find(nodes, cube);
    if (live == dead) return;
    if (before(nodes[live].rank, live, nodes[dead].rank, dead)) std::swap(live, dead);
    Node &from = nodes[dead], &to = nodes[live];
    from.parent = live;
    if (before(to.best_rank, to.best, from.best_rank, from.best)) {
      std::swap(from.best, to.best);
      std::swap(from.best_rank, to.best_rank);
    }
    const bool is_bar = from.rank != r;
    if (!is_bar && !o.ties) return;  // a square of the star of the cube's owner
    const uint32_t owner = Square(l, s).owner(rank);
    clear(stars, at, s, owner);
    if (!is_bar) return;
    bar_of[from.best] = uint32_t(bars.size());
    bars.push_back({s, dead, owner, cube_voxel(rank, l, dead)});
  });
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
