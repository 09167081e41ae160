// Dimensions 0 and 2 of a volume, by union-find over the cells that the stars of voxels
// (betti_volume_stars.h) leave: edges that pair with no square ascending, for dimension 0; squares
// that pair with no edge descending, for dimension 2, where the nodes are cubes and the outside.
//
// The pairs within stars are a forest to begin with, and only critical cells are left. Image
// persistence has to know which cell of a component is the best in another order, at every time.
// Most need not be asked: those that join one that is better.
//
// Memory traffic: one pass over the voxels, and random accesses to the nodes of what is left.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/betti_item.h"
#include "cpu/betti_volume_order.h"
#include "cpu/betti_volume_stars.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {

using betti_item::Bar;

// Kruskal with the elder rule. `negative` receives the edges that join components.
void run_dim0(const Order& o, const Lattice& l, const Stars& stars, Bits& negative,
              std::vector<Bar>& bars, Slab& slab);
// The same for the comparison image, with the oldest vertices in the image of order `rows`, of
// which the one that dies with each bar goes to `deaths`.
void run_dim0_image(const Order& o, const Order& rows, const Lattice& l, const Stars& stars,
                    Bits& negative, std::vector<Bar>& bars, std::vector<uint32_t>& deaths,
                    Slab& slab);

// The dual run. Squares that give birth are no longer critical afterwards: what is left of
// `stars.critical` are columns of dimension 1; `births` receives what is not.
void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              std::vector<uint32_t>& births, Slab& slab);
// The same, with the cubes that the comparison image, of order `columns`, fills last: `bar_of`
// [size, kNone] receives the number of each bar by the one that dies with it, but of no cube of
// that image's smallest value, which gives it no bar.
void run_dim2_image(const Order& o, const Order& columns, const Lattice& l, const Stars& stars,
                    std::vector<Bar>& bars, uint32_t* bar_of, Slab& slab);
// The same without bars for a part of a volume, given by its stars: squares that it has first, in
// the order of `o`, then the others, of which these are the stars and the births.
void clear_part(const Order& o, const Lattice& l, const Stars& part, const uint32_t* in_part,
                const Stars& others, const std::vector<uint32_t>& births, Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
