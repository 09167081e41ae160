// The star of each voxel of a volume: which of its cells the voxel owns, and which of these pair
// among themselves. Such pairs have length 0; what is left over is what persistence is about.
//
// The cells around a voxel form an octahedron: its 6 edges, 12 squares and 8 cubes are the
// vertices, edges and faces. A cell is owned where all other voxels of it come before. Let no voxel
// of the star have the value of the voxel. Then the owned cells are all those of this value near
// here, so that the reduction of their columns among them is part of that of the whole matrix, and
// depends on the masks of owned cells alone: tables hold it. The voxel pairs with the first edge;
// edges with the squares that connect them, by the square mask; squares with cubes, by the cube
// mask.
//
// With equal values in the star, only those pairs (row, column) are taken in which the row is the
// largest face of the column and the column the smallest coface of the row, among all cells of this
// value: apparent pairs, which are pairs of the reduction in any matrix. Their faces and cofaces
// lie in the same star. That square mask (cube mask) of apparent columns gives the same pairs by
// the tables, so that later no one needs to know about equal values.
//
// Memory traffic: 26 neighbours of each voxel, from the cache; 7 bytes written.
#pragma once

#include <cstdint>

#include "cpu/betti_volume_order.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {

// Directions of the two edges of each square at a voxel; squares in the order of their numbers.
inline constexpr uint8_t kSquareEnds[12][2] = {{0, 1}, {0, 2}, {0, 5}, {0, 4}, {1, 2}, {1, 5},
                                               {1, 3}, {2, 4}, {2, 3}, {4, 5}, {3, 5}, {3, 4}};

struct StarTables {
  uint16_t squares[64];      // mask of edges -> squares with both edges in it
  uint8_t cubes[4096];       // mask of squares -> cubes with all three squares in it
  uint8_t dying[4096];       // -> edges that pair with squares
  uint16_t killing[4096];    // -> squares that pair with edges
  uint16_t column[4096][6];  // and for each such edge the squares whose sum its reduced column is
  uint16_t apparent[4096];   // -> squares whose largest edge has no smaller square
  uint16_t filled[256];      // mask of cubes -> squares that pair with cubes
  uint8_t apparent_cubes[256];  // likewise
  // -> for each cube that pairs with a square the cube on the other side of what it is summed to,
  // and for the others 8. Cubes are numbered by octants, bit 2, 1, 0: the next voxel along axis 0,
  // 1, 2.
  uint8_t beyond[256][8];

  StarTables();
};
const StarTables& star_tables();

// Numbers of the cells around a voxel, and voxels of them, relative to the voxel.
struct StarOffsets {
  int32_t edge[6], square[12];  // to 3 v
  int32_t end[6];               // to v
  int32_t opposite[12];         // the corner of a square opposite to v
  int32_t outer[12][2];  // the edges of a square not at v: from its first end, its second; to 3 v
  int32_t cube[8];       // to v

  explicit StarOffsets(const Lattice& l);
};

// Of each voxel. All masks are of cells that it owns.
struct Stars {
  Array<uint32_t> local;     // [size] see below; 0 in the frame
  Array<uint16_t> critical;  // [size] squares that pair with none of the star
  Array<uint8_t> cubes;      // [size] cubes that pair with squares, all but one if all 8

  // Index of StarTables::column for the edges that pair with squares: all squares where not `tied`.
  static uint32_t columns(uint32_t x) { return x & 0xfff; }
  static uint32_t filled(uint32_t x) { return x >> 12 & 0xfff; }  // squares that pair with cubes
  // Edges that pair with no square; the first of them pairs with the voxel where `joined`.
  static uint32_t edges(uint32_t x) { return x >> 24 & 0x3f; }
  static bool joined(uint32_t x) { return x >> 30 & 1; }
  static bool tied(uint32_t x) { return x >> 31; }  // there are equal values in the star
};

// Voxels of rank kNone are no part of the volume.
Stars make_stars(const uint32_t* rank, const Lattice& l, Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
