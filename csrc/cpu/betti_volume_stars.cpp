#include "cpu/betti_volume_stars.h"

#include <algorithm>
#include <vector>

#include "common/compiler.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

// Squares of a cube, the cube numbered by its octant: bit 2, 1, 0 for the next voxel along axis 0,
// 1, 2, which is also the order of the cubes' numbers.
uint32_t squares_of_cube(int octant) {
  int end[3];
  for (int axis = 0; axis < 3; ++axis) end[axis] = (octant >> (2 - axis) & 1) ? axis + 3 : axis;
  uint32_t mask = 0;
  for (int k = 0; k < 12; ++k) {
    auto has = [&](int e) { return e == end[0] || e == end[1] || e == end[2]; };
    if (has(kSquareEnds[k][0]) && has(kSquareEnds[k][1])) mask |= 1u << k;
  }
  return mask;
}

uint32_t edges_of_square(int k) {
  return 1u << kSquareEnds[k][0] | 1u << kSquareEnds[k][1];
}

int highest(uint32_t mask) {
  return highest_bit(mask);
}

// Reduces the columns of `mask`, ascending: rows(k) is the boundary of column k. found(row, column,
// the columns whose sum the reduced one is) for each pair.
template <class Rows, class Found>
void reduce(uint32_t mask, Rows&& rows, Found&& found) {
  uint32_t reduced[12] = {}, sum[12] = {};
  for (int k = 0; k < 12; ++k) {
    if (!(mask >> k & 1)) continue;
    uint32_t column = rows(k), parts = 1u << k;
    while (column && reduced[highest(column)]) {
      const int row = highest(column);
      parts ^= sum[row];
      column ^= reduced[row];
    }
    if (!column) continue;
    const int row = highest(column);
    reduced[row] = column;
    sum[row] = parts;
    found(row, k, parts);
  }
}

// The columns of `mask` whose largest row is in no earlier one.
template <class Rows>
uint32_t apparent(uint32_t mask, Rows&& rows) {
  uint32_t seen = 0, found = 0;
  for (int k = 0; k < 12; ++k) {
    if (!(mask >> k & 1)) continue;
    if (!(seen >> highest(rows(k)) & 1)) found |= 1u << k;
    seen |= rows(k);
  }
  return found;
}

}  // namespace

StarTables::StarTables() {
  for (uint32_t edges = 0; edges < 64; ++edges) {
    squares[edges] = 0;
    for (int k = 0; k < 12; ++k) {
      const uint32_t ends = edges_of_square(k);
      if ((edges & ends) == ends) squares[edges] |= 1u << k;
    }
  }
  for (uint32_t mask = 0; mask < 4096; ++mask) {
    cubes[mask] = 0;
    for (int c = 0; c < 8; ++c) {
      const uint32_t sides = squares_of_cube(c);
      if ((mask & sides) == sides) cubes[mask] |= 1u << c;
    }
    dying[mask] = 0;
    killing[mask] = 0;
    std::fill(column[mask], column[mask] + 6, uint16_t(0));
    reduce(mask, edges_of_square, [&](int edge, int square, uint32_t parts) {
      dying[mask] |= 1u << edge;
      killing[mask] |= 1u << square;
      column[mask][edge] = uint16_t(parts);
    });
    apparent[mask] = uint16_t(betti_volume::apparent(mask, edges_of_square));
  }
  for (uint32_t mask = 0; mask < 256; ++mask) {
    filled[mask] = 0;
    std::fill(beyond[mask], beyond[mask] + 8, uint8_t(8));
    reduce(mask, squares_of_cube, [&](int square, int cube, uint32_t parts) {
      filled[mask] |= 1u << square;
      for (int c = 0; c < 8; ++c) {
        if (!(parts >> c & 1) && (squares_of_cube(c) >> square & 1))
          beyond[mask][cube] = uint8_t(c);
      }
    });
    apparent_cubes[mask] = uint8_t(betti_volume::apparent(mask, squares_of_cube));
  }
}

const StarTables& star_tables() {
  static const StarTables tables;
  return tables;
}

StarOffsets::StarOffsets(const Lattice& l) {
  for (int i = 0; i < 6; ++i) {
    end[i] = l.offset(i);
    edge[i] = i < 3 ? 3 * end[i] + i : i - 3;
  }
  for (int k = 0; k < 12; ++k) {
    const int i = kSquareEnds[k][0], j = kSquareEnds[k][1], normal = 3 - i % 3 - j % 3;
    const int32_t corner = std::min(end[i], 0) + std::min(end[j], 0);
    square[k] = 3 * corner + normal;
    opposite[k] = end[i] + end[j];
    outer[k][0] = 3 * end[i] + edge[j];
    outer[k][1] = 3 * end[j] + edge[i];
  }
  for (int octant = 0; octant < 8; ++octant) {
    cube[octant] = 0;
    for (int axis = 0; axis < 3; ++axis) {
      if (!(octant >> (2 - axis) & 1)) cube[octant] += end[axis];
    }
  }
}

namespace {

// For each voxel of a row bit k of `before` (`until`): its neighbour k has a smaller (no larger)
// rank. Neighbours: the 6 along edges, the 12 across squares, the 8 across cubes.
PYLOSS_MULTIVERSION
void compare_row(const uint32_t* rank, const int32_t* neighbour, uint32_t count, uint32_t* before,
                 uint32_t* until) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t own = rank[i];
    uint32_t a = 0, b = 0;
    for (int k = 0; k < 26; ++k) {
      const uint32_t other = rank[int64_t(i) + neighbour[k]];
      a |= uint32_t(other < own) << k;
      b |= uint32_t(other <= own) << k;
    }
    before[i] = a;
    until[i] = b;
  }
}

struct Star {
  uint32_t edges, squares, cubes;

  // From bits of neighbours.
  Star(const StarTables& t, uint32_t x) : edges(x & 0x3f) {
    squares = (x >> 6 & 0xfff) & t.squares[edges];
    cubes = (x >> 18) & t.cubes[squares];
  }
};

}  // namespace

Stars make_stars(const uint32_t* rank, const Lattice& l, Slab& slab) {
  const StarTables& t = star_tables();
  const StarOffsets at(l);
  int32_t neighbour[26];
  std::copy(at.end, at.end + 6, neighbour);
  std::copy(at.opposite, at.opposite + 12, neighbour + 6);
  for (int octant = 0; octant < 8; ++octant) {
    int32_t sum = 0;
    for (int axis = 0; axis < 3; ++axis) {
      sum += at.end[(octant >> (2 - axis) & 1) ? axis + 3 : axis];
    }
    neighbour[18 + octant] = sum;
  }
  uint32_t earlier = 0;  // the neighbours of smaller index, which come first among equals
  for (int k = 0; k < 26; ++k) earlier |= uint32_t(neighbour[k] < 0) << k;

  Stars stars;
  stars.local = Array<uint32_t>(slab, l.size());
  stars.critical = Array<uint16_t>(slab, l.size());
  stars.cubes = Array<uint8_t>(slab, l.size());
  std::fill(stars.local.get(), stars.local.get() + l.size(), 0);
  std::fill(stars.cubes.get(), stars.cubes.get() + l.size(), uint8_t(0));
  std::fill(stars.critical.get(), stars.critical.get() + l.size(), uint16_t(0));
  std::vector<uint32_t> before(l.cols), until(l.cols);
  l.each_row([&](uint32_t begin, uint32_t) {
    compare_row(rank + begin, neighbour, l.cols, before.data(), until.data());
    for (uint32_t col = 0; col < l.cols; ++col) {
      if (rank[begin + col] == kNone) continue;
      const uint32_t a = before[col], b = until[col];
      const Star own(t, (a & ~earlier) | (b & earlier));
      uint32_t squares = own.squares, cubes = own.cubes;
      bool joined = own.edges != 0;
      if (a != b) {
        const Star equal(t, b);
        squares &= t.apparent[equal.squares];
        cubes &= t.apparent_cubes[equal.cubes];
        joined = own.edges & equal.edges & (0 - equal.edges);
      }
      const uint32_t filled = t.filled[cubes], v = begin + col;
      stars.local[v] = squares | filled << 12 | (own.edges & ~uint32_t(t.dying[squares])) << 24 |
                       uint32_t(joined) << 30 | uint32_t(a != b) << 31;
      stars.cubes[v] = uint8_t(cubes);
      stars.critical[v] = uint16_t(own.squares & ~uint32_t(t.killing[squares]) & ~filled);
    }
  });
  return stars;
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
