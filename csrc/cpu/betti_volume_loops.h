// Dimension 1 of a volume: pairs of edges and squares by the reduction of the columns of squares.
//
// Columns are the squares that give no birth in dimension 2, ascending; rows the edges that join no
// components, which are all that a pivot can be. Of an image itself only the critical columns are
// reduced: a pivot that pairs within its star (betti_volume_stars.h) is resolved by the column that
// the tables know. For rows of one image and columns of another every column counts, but most have
// a pivot of their own already.
//
// A column is a heap of (rank, edge); equal ones cancel as they surface. Reduced columns are kept
// where something was added to them.
//
// Memory traffic: 12 bytes per voxel for pivots, and the columns.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/betti_volume_trees.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {

// Bars of dimension 1 of an image, in the order of deaths.
void run_dim1(const Order& o, const Lattice& l, const Stars& stars, const EdgeSet& negative,
              std::vector<Bar>& bars, Slab& slab);

// A critical square of the comparison image and the edge of the row image that pairs with it.
struct ImagePair {
  uint32_t square, edge;
};
// `rows`, `negative`: of the row image; `columns`, `stars`: of the comparison image, after its
// run_dim2. In the order of squares.
void run_dim1_image(const Order& rows, const EdgeSet& negative, const Order& columns,
                    const Stars& stars, const Lattice& l, std::vector<ImagePair>& pairs,
                    Slab& slab);

// The edges of the reduced columns of some critical squares, which are cycles that stand for the
// bars that die there; in the order of `squares`, empty for what is no such square.
std::vector<std::vector<uint32_t>> reduced_columns(const Order& o, const Lattice& l,
                                                   const Stars& stars,
                                                   const std::vector<uint32_t>& squares,
                                                   Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
