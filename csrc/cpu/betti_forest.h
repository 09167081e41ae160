// The two union-find runs of a 2D image over what its local pairs leave (betti_local.h): in
// dimension 0 over the roots of the voxels, edges ascending, in dimension 1 over those of the
// squares, the edges that dimension 0 left descending.
//
// Besides its own oldest, a component carries labels: the oldest voxel (square) of another image's
// order in it. These are what image persistence pairs a death (a birth) with. A cell in a local
// pair brings its label at the edge of the pair, where it can count: an event (betti_local.h).
#pragma once

#include <cstdint>

#include "cpu/betti_local.h"

namespace pyloss {
namespace cpu {
namespace betti_forest {

using namespace betti_local;

// Ascending by key, stable.
template <class K>
void sort_items(Array<Sortable<K>>& order, uint32_t n, Slab& slab);

// By the number of a root: where its component ends, and its oldest cells.
template <class K>
struct Forest {
  uint32_t count = 0;
  Array<Age<K>> age;       // own
  Array<uint32_t> edge;    // of the merge at which it ended
  Array<Age<K>> label[2];  // the oldest of others that ended there
};

// `other`: keys of the image whose order is to be followed, or null.
template <class K>
Forest<K> make_forest(const K* keys, const Grid& g, const Planes& planes, const K* const other[2],
                      Slab& slab);
// Likewise of squares: largest first, the outside before all.
template <class K>
Forest<K> make_square_forest(const K* keys, const Grid& g, const Planes& planes, const K* other,
                             Slab& slab);

// What the labels of voxels (squares) need besides those of the roots. `others`: the images whose
// order is followed; planes.rises and the levels are theirs.
Events voxel_events(const Grid& g, const Planes& planes, const Planes* const others[2], Slab& slab);
// `other`, `rises`: of the squares of the comparison image.
Events square_events(const Grid& g, const Planes& planes, const Planes& other, const Edges* rises,
                     Slab& slab);
// Labels that are there before the first bar can be born or die: those of voxels of the lowest
// value (squares of the highest).
template <class K>
void lowest_labels(Forest<K>& f, const Grid& g, const Planes& planes, const Planes* const others[2],
                   const K* const keys[2]);
template <class K>
void highest_labels(Forest<K>& f, const Grid& g, const Planes& planes, const Planes& other,
                    const Edges* rises, const K* keys);

// Of the n items the cycles and the events of dimension 1 stay in `order`; returns their number.
template <class K>
uint32_t join_ascending(Forest<K>& f, Sortable<K>* order, Item* items, uint32_t n,
                        const K* const keys[2], Slab& slab);
// With the roots of find_sides() in the items.
template <class K>
void join_descending(Forest<K>& f, const Grid& g, const Sortable<K>* order, const Item* items,
                     uint32_t n, const K* keys, Slab& slab);

}  // namespace betti_forest
}  // namespace cpu
}  // namespace pyloss
