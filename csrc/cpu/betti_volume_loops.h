// Dimension 1 of a volume: pairs of edges and squares by the reduction of the columns of squares.
//
// Columns are the squares that give no birth in dimension 2, ascending; rows the edges that join no
// components, which are all that a pivot can be. Of an image itself only the critical columns are
// reduced: a pivot that pairs within its star (betti_volume_stars.h) is resolved by the column that
// the tables know.
//
// For rows of one image, I, and columns of another, M, more is left over.
// - Where a voxel owns the same squares in both images, and no value of its star equals its own in
//   either, the pairs within the star of I are pairs here too: every other square of the voxel
//   comes later in M, so that no column before has an edge of it.
// - The pair of a column does not depend on the order of those before it, and columns of M's
//   smallest value give no bars of M. They are taken first, in the order of I, with the stars of I
//   in the part of the volume that has this value. (A binary target makes this part large.)
// - Of the other columns most have a pivot of their own, the largest edge.
//
// A column is a sorted array of (rank, edge), or a heap when it is long, in which equal ones cancel
// as they surface. Reduced columns are kept where something was added to them.
//
// Memory traffic: the masks of the voxels once, and the columns that are left.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/betti_volume_trees.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {

// Bars of dimension 1 of an image, in the order of deaths.
void run_dim1(const Order& o, const Lattice& l, const Stars& stars, const Bits& negative,
              std::vector<Bar>& bars, Slab& slab);

// A critical square of the comparison image and the edge of the row image that pairs with it.
struct ImagePair {
  uint32_t square, edge;
};
// One side of the image persistence: an image and its stars, after run_dim2.
struct Side {
  const Order& order;
  const Stars& stars;
};
// Rows of one image, of which `negative` is, and columns of the comparison image, of which `births`
// are; pairs in the order of squares, without those of the comparison image's smallest value, which
// are no bars of it.
void run_dim1_image(const Side& rows, const Bits& negative, const Side& columns,
                    const std::vector<uint32_t>& births, const Lattice& l,
                    std::vector<ImagePair>& pairs, Slab& slab);

// The edges of the reduced columns of critical squares, which are cycles that stand for the bars
// that die there: found(square, edges) of each, in their order.
void reduced_columns(const Order& o, const Lattice& l, const Stars& stars,
                     const std::function<void(uint32_t, const std::vector<uint32_t>&)>& found,
                     Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
