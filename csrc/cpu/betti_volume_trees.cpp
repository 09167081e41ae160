#include "cpu/betti_volume_trees.h"

#include <algorithm>
#include <utility>

#include "common/compiler.h"
#include "cpu/union_find.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

// Whether a comes before b.
inline bool before(uint32_t rank_a, uint32_t a, uint32_t rank_b, uint32_t b) {
  return rank_a < rank_b || (rank_a == rank_b && a < b);
}

struct Masks {
  const uint16_t* cells;

  void touch(uint32_t v) const { PYLOSS_PREFETCH(cells + v); }
  uint32_t operator()(uint32_t v) const { return cells[v]; }
};

// --------------------------------------------------------------------------------------------------
// Dimension 0

// Without the edge that pairs with the voxel.
struct CriticalEdges {
  const uint32_t* local;

  void touch(uint32_t v) const { PYLOSS_PREFETCH(local + v); }
  uint32_t operator()(uint32_t v) const {
    const uint32_t edges = Stars::edges(local[v]);
    return Stars::joined(local[v]) ? edges & (edges - 1) : edges;
  }
};

}  // namespace

void run_dim0(const Order& o, const Lattice& l, const Stars& stars, Bits& negative,
              std::vector<Bar>& bars, Slab& slab) {
  const uint32_t *rank = o.rank.get(), *local = stars.local.get();
  Array<uint32_t> parents(slab, l.size());
  uint32_t* parent = parents.get();
  const StarOffsets at(l);
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      parent[v] = v;
      if (!Stars::joined(local[v])) continue;
      const int first = lowest_bit(Stars::edges(local[v]));
      parent[v] = v + uint32_t(at.end[first]);
      negative.add(3 * v + uint32_t(at.edge[first]));
    }
  });
  in_order<false>(o, l, at.edge, CriticalEdges{local}, [&](uint32_t e, uint32_t r) {
    const Edge edge(l, e);
    uint32_t live = find_root(parent, edge.first), dead = find_root(parent, edge.second);
    if (live == dead) return;
    if (before(rank[dead], dead, rank[live], live)) std::swap(live, dead);
    parent[dead] = live;
    negative.add(e);
    if (rank[dead] != r) bars.push_back({dead, e, dead, edge.owner(rank)});
  });
}

void run_dim0_image(const Order& o, const Order& rows, const Lattice& l, const Stars& stars,
                    Bits& negative, std::vector<Bar>& bars, std::vector<uint32_t>& deaths,
                    Slab& slab) {
  const uint32_t *rank = o.rank.get(), *other = rows.rank.get();
  Array<uint32_t> parents(slab, l.size()), oldest(slab, l.size());
  uint32_t *parent = parents.get(), *best = oldest.get();
  const auto older = [&](uint32_t a, uint32_t b) { return before(other[a], a, other[b], b); };
  const auto ask = [&](uint32_t v) {
    const uint32_t root = find_root(parent, v);
    if (older(v, best[root])) best[root] = v;
  };
  // A voxel joins its neighbour from the start where nothing else happens at its time; where its
  // neighbour is no older, it asks then (kAsks). No bar dies at the smallest value: there order
  // plays no role.
  constexpr uint16_t kAsks = 1 << 6;
  Array<uint16_t> left(slab, l.size());
  const StarOffsets at(l);
  int32_t offset[7] = {};
  std::copy(at.edge, at.edge + 6, offset);
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      const uint32_t x = stars.local[v], edges = Stars::edges(x);
      parent[v] = best[v] = v;
      left[v] = uint16_t(edges);
      if (!Stars::joined(x)) continue;
      const int first = lowest_bit(edges);
      const uint32_t rest = edges & (edges - 1), neighbour = v + uint32_t(at.end[first]);
      if (rank[v] > 0 && (rest || o.repeated.has(v))) continue;
      parent[v] = neighbour;
      negative.add(3 * v + uint32_t(at.edge[first]));
      left[v] = rank[v] > 0 && older(v, neighbour) ? kAsks : uint16_t(rest);
    }
  });
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      if (rank[v] == 0) ask(v);
    }
  });
  in_order<false>(o, l, offset, Masks{left.get()}, [&](uint32_t e, uint32_t r) {
    if (const uint32_t v = o.voxel[r]; left[v] == kAsks) return ask(v);  // of no other one's rank
    const Edge edge(l, e);
    uint32_t live = find_root(parent, edge.first), dead = find_root(parent, edge.second);
    if (live == dead) return;
    if (before(rank[dead], dead, rank[live], live)) std::swap(live, dead);
    parent[dead] = live;
    negative.add(e);
    if (older(best[dead], best[live])) std::swap(best[dead], best[live]);
    if (rank[dead] == r) return;
    bars.push_back({dead, e, dead, edge.owner(rank)});
    deaths.push_back(best[dead]);
  });
}

// --------------------------------------------------------------------------------------------------
// Dimension 2. Node 0, in the frame, stands for the outside, which outlives all others.

namespace {

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

// Each cube by itself, all else with the outside.
Array<uint32_t> single_cubes(const Lattice& l, Slab& slab) {
  Array<uint32_t> parents(slab, l.size());
  std::fill(parents.get(), parents.get() + l.size(), 0);
  for (uint32_t slice = 0; slice + 1 < l.depth; ++slice) {
    for (uint32_t r = 0; r + 1 < l.rows; ++r) {
      const uint32_t begin = l.row(slice, r);
      for (uint32_t c = begin; c + 1 < begin + l.cols; ++c) parents[c] = c;
    }
  }
  return parents;
}

// Joins the cubes that pair within their star, of the voxels where use(v): joined(cube, parent).
template <class Use, class Joined>
void plant(const Stars& stars, const Lattice& l, uint32_t* parent, Use&& use, Joined&& joined) {
  const StarOffsets at(l);
  const StarTables& t = star_tables();
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      const uint32_t cubes = stars.cubes[v];
      if (!cubes || !use(v)) continue;
      for (uint32_t x = cubes; x; x &= x - 1) {
        const int c = lowest_bit(x), next = t.beyond[cubes][c];
        if (next == 8) continue;
        const uint32_t cube = v + uint32_t(at.cube[c]), up = v + uint32_t(at.cube[next]);
        parent[cube] = up;
        joined(v, cube, up);
      }
    }
  });
}

// The dual run over the squares of `left`: merge(square, dead, live), and bar(bar) where the one
// that dies was older; other(rank) says whether something else happens at a time, and does it.
template <class Merge, class Bars, class Other>
void dual(const Order& o, const Lattice& l, const Stars& stars, uint32_t* parent,
          const uint16_t* left, Merge&& merge, Bars&& bar, Other&& other) {
  const uint32_t* rank = o.rank.get();
  const StarOffsets at(l);
  int32_t offset[13] = {};
  std::copy(at.square, at.square + 12, offset);
  const auto rank_of = [&](uint32_t cube) {
    return cube ? rank[cube_voxel(rank, l, cube)] : kNone;
  };
  in_order<true>(o, l, offset, Masks{left}, [&](uint32_t s, uint32_t r) {
    if (other(r)) return;
    const uint32_t cube = s / 3;
    uint32_t live = find_root(parent, cube - l.step[s % 3]), dead = find_root(parent, cube);
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
    merge(s, dead, live);
    if (rank_dead != r) bar(Bar{s, dead, owner, cube_voxel(rank, l, dead)});
  });
}

}  // namespace

void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              std::vector<uint32_t>& births, Slab& slab) {
  if (!l.has_cubes()) return;
  const Array<uint32_t> parents = single_cubes(l, slab);
  plant(
      stars, l, parents.get(), [](uint32_t) { return true; }, [](uint32_t, uint32_t, uint32_t) {});
  dual(
      o, l, stars, parents.get(), stars.critical.get(),
      [&](uint32_t s, uint32_t, uint32_t) { births.push_back(s); },
      [&](const Bar& b) { bars.push_back(b); }, [](uint32_t) { return false; });
}

void run_dim2_image(const Order& o, const Order& columns, const Lattice& l, const Stars& stars,
                    std::vector<Bar>& bars, uint32_t* bar_of, Slab& slab) {
  if (!l.has_cubes()) return;
  const Array<uint32_t> parents = single_cubes(l, slab);
  uint32_t* parent = parents.get();
  Array<uint32_t> filled(slab, l.size()), longest(slab, l.size());
  cube_ranks(columns, l, filled.get());
  uint32_t* best = longest.get();
  for (uint32_t c = 0; c < l.size(); ++c) best[c] = c;
  const auto sooner = [&](uint32_t a, uint32_t b) { return before(filled[a], a, filled[b], b); };
  // As in dimension 0: cubes join from the start where no square of their owner is left over.
  constexpr uint16_t kAsks = 1 << 12;
  Array<uint16_t> left(slab, l.size());
  std::fill(left.get(), left.get() + l.size(), uint16_t(0));
  const auto alone = [&](uint32_t v) { return !o.repeated.has(v) && !stars.critical[v]; };
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      if (!alone(v)) left[v] = uint16_t(Stars::filled(stars.local[v]) | stars.critical[v]);
    }
  });
  plant(stars, l, parent, alone, [&](uint32_t v, uint32_t cube, uint32_t up) {
    if (filled[cube] > 0 && sooner(up, cube)) left[v] = kAsks;
  });
  const StarOffsets at(l);
  uint32_t lost = kNone;
  dual(
      o, l, stars, parent, left.get(),
      [&](uint32_t, uint32_t dead, uint32_t live) {
        lost = best[dead];
        if (sooner(best[live], lost)) std::swap(best[live], lost);
      },
      [&](const Bar& b) {
        bar_of[lost] = uint32_t(bars.size());
        bars.push_back(b);
      },
      [&](uint32_t r) {
        const uint32_t v = o.voxel[r];
        if (left[v] != kAsks) return false;
        for (uint32_t x = stars.cubes[v]; x; x &= x - 1) {
          const uint32_t cube = v + uint32_t(at.cube[lowest_bit(x)]),
                         root = find_root(parent, cube);
          if (sooner(best[root], cube)) best[root] = cube;
        }
        return true;
      });
}

void clear_part(const Order& o, const Lattice& l, const Stars& part, const uint32_t* in_part,
                const Stars& others, const std::vector<uint32_t>& births, Slab& slab) {
  if (!l.has_cubes()) return;
  const Array<uint32_t> parents = single_cubes(l, slab);
  uint32_t* parent = parents.get();
  const auto nothing = [](uint32_t, uint32_t, uint32_t) {};
  plant(part, l, parent, [&](uint32_t v) { return in_part[v] != kNone; }, nothing);
  plant(others, l, parent, [&](uint32_t v) { return in_part[v] == kNone; }, nothing);
  const auto join = [&](uint32_t s) {
    uint32_t a = find_root(parent, s / 3 - l.step[s % 3]), b = find_root(parent, s / 3);
    if (a == b) return false;
    parent[std::max(a, b)] = std::min(a, b);
    return true;
  };
  for (uint32_t s : births) {
    const Square square(l, s);
    bool inside = true;
    for (uint32_t v : square.corners) inside &= in_part[v] != kNone;
    if (!inside) join(s);
  }
  const StarOffsets at(l);
  in_order<true>(o, l, at.square, Masks{part.critical.get()}, [&](uint32_t s, uint32_t) {
    if (join(s)) clear(part, at, s, Square(l, s).owner(in_part));
  });
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
