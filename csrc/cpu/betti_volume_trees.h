// Dimensions 0 and 2 of a volume, by union-find over the cells that the stars of voxels
// (betti_volume_stars.h) leave: edges that pair with no square ascending, for dimension 0; squares
// that pair with no edge descending, for dimension 2, where the nodes are cubes and the outside.
//
// For the bars of an image itself the pairs within stars are a forest to begin with, and only
// critical cells are left. Image persistence has to know what each component holds at every time,
// and so takes all of them in order.
//
// Memory traffic: one pass over the voxels; for image persistence two random accesses per voxel, of
// nodes that have all in one cache line, and those of the paths to roots.
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

// A bit per edge number.
struct EdgeSet {
  Array<uint64_t> words;

  EdgeSet() = default;
  EdgeSet(const Lattice& l, Slab& slab) : words(slab, size_of(l)) {
    std::fill(words.get(), words.get() + size_of(l), 0);
  }
  static size_t size_of(const Lattice& l) { return size_t(l.size()) * 3 / 64 + 1; }
  void add(uint32_t e) { words[e >> 6] |= uint64_t(1) << (e & 63); }
  bool has(uint32_t e) const { return words[e >> 6] >> (e & 63) & 1; }
};

// Kruskal with the elder rule. `negative` receives the edges that join components.
void run_dim0(const Order& o, const Lattice& l, const Stars& stars, EdgeSet& negative,
              std::vector<Bar>& bars, Slab& slab);
// The dual run. Squares that give birth are no longer critical afterwards: what is left of
// `stars.critical` are columns of dimension 1.
void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              Slab& slab);

// Both again, with the other order of the image persistence beside their own.
//
// Of the comparison image: with the oldest vertices in the image of order `rows`, of which the one
// that dies with each bar goes to `deaths`, in the order of bars.
void run_dim0_image(const Order& o, const Order& rows, const Lattice& l, const Stars& stars,
                    EdgeSet& negative, std::vector<Bar>& bars, std::vector<uint32_t>& deaths,
                    Slab& slab);
// Of an image: with the cubes that the comparison image, of order `columns`, fills last. `bar_of`
// [size, kNone] receives the number of each bar by the one that dies with it.
void run_dim2_image(const Order& o, const Order& columns, const Lattice& l, const Stars& stars,
                    std::vector<Bar>& bars, uint32_t* bar_of, Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
