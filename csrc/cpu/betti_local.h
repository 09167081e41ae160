// What can be paired in a 2D image by looking at neighbours alone, 64 cells at a time.
//
// Nearly all cells of an image are paired with a neighbour, in bars of length 0: a voxel that has
// an older neighbour with the first of its edges, a square with the last of its edges. Such a pair
// makes the voxel (the square) a name for the neighbour that outlives it. What is left are roots,
// the local minima and maxima, and as many edges, those in no pair; only these are sorted and
// joined, in betti_forest.h. docs/betti_matching.md has the proof.
//
// Inside, an image lies in a frame whose value is above all others: one row above and below, and
// columns at the right up to a multiple of 64, of which the last is also the left neighbour of the
// next row's first. Voxel (row, col) is (row + 1) * pitch + col; an edge is 2 v + axis, a square
// its corner v, as in common/betti_matching.h. The order of these numbers, and with it every tie,
// is that of the public ones. A set of cells is a bit each, in words of 64 (a plane).
//
// A signal of one column is turned on its side.
#pragma once

#include <cstdint>

#include "common/betti_matching.h"
#include "common/compiler.h"
#include "cpu/slab.h"

namespace pyloss {
namespace cpu {
namespace betti_local {

using betti::kNone;
template <class T>
using Array = SlabArray<T>;

// Signed integers in the order of the values; -0 as +0.
template <class R>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <class K>
struct Wide;
template <>
struct Wide<int32_t> {
  using type = int64_t;
};
template <>
struct Wide<int64_t> {
  __extension__ using type = __int128;
};
// (value, index) of a vertex or a square as one number.
template <class K>
using Age = typename Wide<K>::type;
template <class K>
inline Age<K> age_of(K key, uint32_t cell) {
  return Age<K>(key) * (Age<K>(1) << 32) + cell;
}
template <class K>
inline K key_of_age(Age<K> age) {
  return K(age >> 32);
}
template <class K>
inline constexpr K kFrame = K((uint64_t(1) << (8 * sizeof(K) - 1)) - 1);

struct Grid {
  uint32_t rows, cols, pitch, words;  // words: of a row
  bool turned;
  double inverse;

  explicit Grid(const betti::Problem& p)
      : rows(uint32_t(p.cols == 1 ? 1 : p.rows)),
        cols(uint32_t(p.cols == 1 ? p.rows : p.cols)),
        pitch(pitch_of(cols)),
        words(pitch / 64),
        turned(p.cols == 1),
        inverse(1.0 / pitch) {}
  static uint32_t pitch_of(uint32_t cols) { return (cols + 64) / 64 * 64; }

  uint32_t size() const { return (rows + 2) * pitch; }
  uint32_t all_words() const { return (rows + 2) * words; }
  // Cells of a row's word whose column is below n.
  static uint64_t below(uint32_t word, uint32_t n) {
    const uint32_t first = 64 * word;
    if (n >= first + 64) return ~uint64_t(0);
    return n <= first ? 0 : (uint64_t(1) << (n - first)) - 1;
  }
  uint32_t second_end(uint32_t e) const { return (e >> 1) + ((e & 1) ? 1 : pitch); }
  // The public numbers. Without a division: exact, since (v + 1/2) / pitch is at least
  // 1 / (2 pitch) from any integer.
  uint32_t flat(uint32_t v) const {
    const uint32_t row = uint32_t((v + 0.5) * inverse);
    return v - row * (pitch - cols) - cols;
  }
  uint32_t flat_edge(uint32_t e) const { return 2 * flat(e >> 1) + (turned ? 0 : e & 1); }
};

// Where the local pair of a cell leads, a set of cells for each direction.
struct Directions {
  uint64_t down, right, up, left, up_left;
};
// The same as a byte of each cell, for walks. They end at kStop, a root or a cell for which the
// result of a long walk is kept, and at kOutside. From kRun on it is the number of steps to take at
// once, up for voxels and down for squares, which plateaus and slopes have many of.
enum Code : uint8_t { kStop, kOutside, kRight, kLeft, kUpLeft, kVertical, kRun };
// Cells in no local pair; `before`: the number of the first of them.
struct Roots {
  uint64_t cells;
  uint32_t before;
};
inline uint32_t number_of(const Roots& r, uint32_t cell) {
  const uint64_t bit = uint64_t(1) << (cell & 63);
  return r.cells & bit ? r.before + uint32_t(bit_count(r.cells & (bit - 1))) : kNone;
}
// Edges by their first end.
struct Edges {
  uint64_t down, right;
};

// A forest of local pairs: of the voxels or of the squares.
struct Walks {
  bool squares;
  Array<uint8_t> code;
  Array<Directions> directions;
  Array<Roots> roots;
  Array<uint32_t> kept;  // where a walk stops at no root, the number of the one it leads to
  uint32_t count = 0;    // of roots; of squares, number 0 is the outside

  // kNone: the cell is no root.
  uint32_t number(uint32_t cell) const { return number_of(roots[cell >> 6], cell); }
  // Between these two there can be walks.
  void open(const Grid& g, Slab& slab);
  void close() {
    kept = Array<uint32_t>();
    code = Array<uint8_t>();
    directions = Array<Directions>();
  }
};

struct Planes {
  Walks voxels, squares;
  Array<Edges> rest;  // in no local pair
  uint32_t rest_count = 0;
  // Where asked for:
  Array<Edges> rises;               // where the second end is not smaller
  Array<uint64_t> lowest, highest;  // voxels of the extreme values
};

template <class K>
struct Range {
  K low, high;
};

// [grid.size() + 64]. False if there is a NaN.
template <class R>
bool make_keys(const R* image, const Grid& g, bool superlevel, typename KeyOf<R>::type* keys,
               Range<typename KeyOf<R>::type>& range);
// Of min(a, b).
template <class K>
Range<K> min_keys(const K* a, const K* b, const Grid& g, K* keys);

// `range`: for the planes that are to be asked for; or null.
template <class K>
Planes pair_locally(const K* keys, const Grid& g, const Range<K>* range, Slab& slab);

// Per square whether the one below (at the right) is not smaller.
template <class K>
Array<Edges> square_rises(const K* keys, const Grid& g, Slab& slab);

// Numbers of the roots of cells, of walks that are open.
void find_roots(const Walks& walks, const Grid& g, const uint32_t* cells, uint32_t n,
                uint32_t* found);

// What happens to the union-find over the roots: an edge joins roots a and b; or, with b = kEvent,
// a cell's label comes to the component of root a; or, with b = kOther, that happens in
// dimension 1.
struct Item {
  uint32_t cell;  // edge, or the cell of an event
  uint32_t a, b;
};
inline constexpr uint32_t kEvent = kNone, kOther = kNone - 1;
// An edge that joined nothing, until a and b are roots of the squares at its sides.
inline constexpr uint32_t kCycle = kNone - 2;

template <class K>
struct Sortable {
  K key;
  uint32_t item;
};

// Events at the edges of local pairs.
struct Events {
  Array<uint64_t> cells;  // whose label comes
  Array<Edges> edges;     // with which
  bool squares;           // or voxels
  uint32_t count;
};

// The items of an image in the order of edges: those of planes.rest and of the events (or null).
// Returns their number.
template <class K>
uint32_t collect(const K* keys, const Grid& g, const Planes& planes, const Events* events,
                 Item* items, Sortable<K>* order);
// Square roots for the items that dimension 1 is left with: cycles and its events.
void find_sides(const Planes& planes, const Grid& g, Item* items, uint32_t n);

}  // namespace betti_local
}  // namespace cpu
}  // namespace pyloss
