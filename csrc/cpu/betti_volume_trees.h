// Dimensions 0 and 2 of a volume, by union-find over the cells that the stars of voxels
// (betti_volume_stars.h) leave: edges that pair with no square ascending, for dimension 0; squares
// that pair with no edge descending, for dimension 2, where the nodes are cubes and the outside.
//
// Memory traffic: two random accesses per voxel and run, and those of the paths to roots.
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
using betti_item::ComparisonBar;

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
// The same for the comparison image, with the oldest vertices of input and target beside its own:
// those that die with a bar are in_input, in_target.
void run_dim0_comparison(const Order& o, const Order& input, const Order& target, const Lattice& l,
                         const Stars& stars, EdgeSet& negative, std::vector<ComparisonBar>& bars,
                         Slab& slab);

// The dual run. Squares that give birth are no longer critical afterwards: what is left of
// `stars.critical` are columns of dimension 1. With `comparison` (ranks of the cubes of the
// comparison image), `bar_of` [size, kNone] receives the number of the bar by the cube that dies
// with it in the comparison image.
void run_dim2(const Order& o, const Lattice& l, const Stars& stars, std::vector<Bar>& bars,
              const uint32_t* comparison, uint32_t* bar_of, Slab& slab);

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
