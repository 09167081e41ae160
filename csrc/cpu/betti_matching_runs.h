// The parts of Betti matching on one image of up to two dimensions: sorting voxels, and the two
// union-find runs over its edges. betti_image.cpp puts them together.
//
// Inside, voxels and cells have padded numbers: betti_item.h.
//
// Sorting. LSD radix sort of the voxels' keys (11 bits a pass, passes in which all digits agree are
// skipped), two buckets for an image of two values. Edges are not sorted: taken voxel by voxel in
// ascending order, each with its edges to smaller neighbours, they come out ascending already;
// among equal voxels two streams are merged.
//
// Memory traffic: about 40 bytes per voxel and run, in random order, hence the prefetches. All
// integer work; results do not depend on threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/betti_matching.h"
#include "cpu/betti_item.h"
#include "cpu/slab.h"

namespace pyloss {
namespace cpu {
namespace betti_runs {

using betti::kNone;

struct Frame {
  uint32_t rows, cols, stride;

  Frame(uint32_t r, uint32_t c) : rows(r), cols(c), stride(c + 1) {}
  uint32_t voxels() const { return rows * cols; }
  uint32_t size() const { return (rows + 2) * stride + 1; }
  uint32_t padded(uint32_t row, uint32_t col) const { return (row + 1) * stride + col; }
  uint32_t second_end(uint32_t e) const { return (e >> 1) + ((e & 1) ? 1 : stride); }
};

template <class T>
using Array = SlabArray<T>;

// Set in Order::voxel where the next voxel has the same value.
inline constexpr uint32_t kTie = 0x80000000u;

struct Order {
  Array<uint32_t> voxel;     // [voxels] ascending in (value, index)
  Array<uint32_t> position;  // [size] of each voxel therein; kNone in the frame
  bool ties = false;

  uint32_t at(uint32_t position) const { return voxel[position] & ~kTie; }
};

// Keys in padded places. False if there is a NaN.
template <class R>
bool make_keys(const R* image, const Frame& f, bool superlevel,
               typename betti::KeyOf<R>::type* keys);
template <class K>
Order sort_voxels(const K* keys, const Frame& f, Slab& slab);
// The order of min(a, b), from the orders of a and b.
template <class K>
Order merge_orders(const Order& a, const Order& b, const K* key_a, const K* key_b, const Frame& f,
                   Slab& slab);

using betti_item::Bar;
// In the lists of bars of the comparison image: the births that die with each in the two images; in
// dimension 1 these are looked up later, by `death`.
using betti_item::ComparisonBar;

// An edge that joins nothing, and the rank of its value.
struct Cycle {
  uint32_t edge, rank;
};

// Dimension 0: Kruskal with the elder rule. `cycles` receives, ascending, the edges that join
// nothing: exactly the edges of the dual spanning tree. [voxels]
void run_dim0(const Order& o, const Frame& f, Cycle* cycles, uint32_t& cycle_count,
              std::vector<Bar>& bars, Slab& slab);
// The same for the comparison image, with the oldest vertices of input and target beside its own.
void run_dim0_comparison(const Order& o, const Order& input, const Order& target, const Frame& f,
                         Cycle* cycles, uint32_t& cycle_count, std::vector<ComparisonBar>& bars,
                         Slab& slab);

// positions -> position of the first voxel of the same value.
void positions_to_ranks(Order& o, const Frame& f);
// Per square the rank of its value. [size]
void square_ranks(const Order& o, const Frame& f, uint32_t* ranks);

// Dimension 1: the dual run over `cycles`, descending. `o` holds ranks. With `comparison` (ranks of
// the squares of the comparison image), `bar_of` [size, kNone] receives the number of the bar by
// the square that dies with it in the comparison image.
void run_dim1(const Order& o, const uint32_t* squares, const Frame& f, const Cycle* cycles,
              uint32_t cycle_count, std::vector<Bar>& bars, const uint32_t* comparison,
              uint32_t* bar_of, Slab& slab);

}  // namespace betti_runs
}  // namespace cpu
}  // namespace pyloss
