// Places and order of the voxels of a volume: what the other parts of betti_volume.h stand on.
//
// A cell belongs to its last voxel in the order of (value, index), its owner, which carries its
// value. Cells are never sorted: taken owner by owner in ascending order they come out ascending,
// but for owners of equal value, whose cells are brought into order of their numbers together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/betti_matching.h"
#include "common/compiler.h"
#include "cpu/betti_item.h"
#include "cpu/slab.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {

using betti::kNone;

template <class T>
using Array = SlabArray<T>;

// Padded numbers: betti_item.h. Directions at a voxel, in the order of the numbers of its edges:
// 0, 1, 2 to the previous voxel along axis 0, 1, 2, and 3, 4, 5 to the next one.
struct Lattice {
  uint32_t depth, rows, cols;
  uint32_t step[3];

  explicit Lattice(const betti::Problem& p)
      : depth(uint32_t(p.depth)), rows(uint32_t(p.rows)), cols(uint32_t(p.cols)) {
    step[2] = 1;
    step[1] = cols + 1;
    step[0] = (rows + 1) * step[1];
  }
  uint32_t voxels() const { return depth * rows * cols; }
  uint32_t size() const { return (depth + 2) * step[0] + step[1] + 1; }
  // The first voxel of a row.
  uint32_t row(uint32_t slice, uint32_t r) const {
    return (slice + 1) * step[0] + (r + 1) * step[1] + 1;
  }
  bool has_cubes() const { return depth > 1 && rows > 1 && cols > 1; }
  int32_t offset(int direction) const {
    return direction < 3 ? -int32_t(step[direction]) : int32_t(step[direction - 3]);
  }
  // fn(first voxel, flat index of it) of each row.
  template <class Fn>
  void each_row(Fn&& fn) const {
    for (uint32_t slice = 0, at = 0; slice < depth; ++slice) {
      for (uint32_t r = 0; r < rows; ++r, at += cols) fn(row(slice, r), at);
    }
  }
};

// A set of voxels or edges.
struct Bits {
  Array<uint64_t> words;

  Bits() = default;
  Bits(size_t n, Slab& slab) : words(slab, n / 64 + 1) {
    std::fill(words.get(), words.get() + n / 64 + 1, 0);
  }
  void add(uint32_t i) { words[i >> 6] |= uint64_t(1) << (i & 63); }
  bool has(uint32_t i) const { return words[i >> 6] >> (i & 63) & 1; }
};

struct Order {
  Array<uint32_t> voxel;  // [voxels] ascending in (value, index)
  Array<uint32_t> rank;   // [size] place of the first voxel of the same value; kNone in the frame
  Bits repeated;          // voxels whose value others have, too
};

// Keys in padded places. False if there is a NaN.
template <class R>
bool make_keys(const R* image, const Lattice& l, bool superlevel,
               typename betti::KeyOf<R>::type* keys);
template <class K>
Order sort_voxels(const K* keys, const Lattice& l, Slab& slab);

// Per cube the rank of its value, per other number kNone. [size]
void cube_ranks(const Order& o, const Lattice& l, uint32_t* ranks);

// --------------------------------------------------------------------------------------------------
// Cells by their numbers

// The later one of two voxels, the second of the larger index.
inline uint32_t later(const uint32_t* rank, uint32_t v, uint32_t w) {
  return rank[w] >= rank[v] ? w : v;
}

struct Edge {
  uint32_t first, second;

  Edge(const Lattice& l, uint32_t e) : first(e / 3), second(first + l.step[e % 3]) {}
  uint32_t rank(const uint32_t* r) const { return std::max(r[first], r[second]); }
  uint32_t owner(const uint32_t* r) const { return later(r, first, second); }
};

// Corners ascending.
struct Square {
  uint32_t corner, normal, corners[4];

  Square(const Lattice& l, uint32_t s) : corner(s / 3), normal(s % 3) {
    const uint32_t a = l.step[normal == 0 ? 1 : 0], b = l.step[normal == 2 ? 1 : 2];
    corners[0] = corner;
    corners[1] = corner + b;
    corners[2] = corner + a;
    corners[3] = corner + a + b;
  }
  uint32_t rank(const uint32_t* r) const {
    return std::max(std::max(r[corners[0]], r[corners[1]]), std::max(r[corners[2]], r[corners[3]]));
  }
  uint32_t owner(const uint32_t* r) const {
    return later(r, later(r, later(r, corners[0], corners[1]), corners[2]), corners[3]);
  }
  // Its edges, ascending.
  void edges(uint32_t e[4]) const {
    const uint32_t a = normal == 0 ? 1 : 0, b = normal == 2 ? 1 : 2;
    e[0] = 3 * corner + a;
    e[1] = 3 * corner + b;
    e[2] = 3 * corners[1] + a;
    e[3] = 3 * corners[2] + b;
  }
};

// --------------------------------------------------------------------------------------------------
// Cells in order

// The voxels with a mask that is not 0, as (rank, voxel), ascending.
template <class MaskOf>
std::vector<uint64_t> owners(const Order& o, const Lattice& l, MaskOf&& mask_of) {
  constexpr uint32_t kAhead = 24;
  std::vector<uint64_t> found;
  const auto take = [&](uint32_t v) {
    if (mask_of(v)) found.push_back(uint64_t(o.rank[v]) << 32 | v);
  };
  // Few of them are sorted again, rather than found again among all.
  const size_t few = l.voxels() / 16;
  l.each_row([&](uint32_t begin, uint32_t) {
    if (found.size() > few) return;
    for (uint32_t v = begin; v < begin + l.cols; ++v) take(v);
  });
  if (found.size() <= few) {
    std::sort(found.begin(), found.end());
    return found;
  }
  found.clear();
  const uint32_t n = l.voxels();
  for (uint32_t i = 0; i < n; ++i) {
    if (i + kAhead < n) mask_of.touch(o.voxel[i + kAhead]);
    take(o.voxel[i]);
  }
  return found;
}

// Per voxel a mask of cells that it owns, bit i the cell 3 v + offset[i]; fn(cell, rank) of each,
// in the order of (value, number).
template <bool kDescending, class MaskOf, class Fn>
void in_order(const Order& o, const Lattice& l, const int32_t* offset, MaskOf&& mask_of, Fn&& fn) {
  std::vector<uint64_t> voxels = owners(o, l, mask_of);
  if (kDescending) std::reverse(voxels.begin(), voxels.end());
  const auto bits = [&](uint64_t voxel, auto&& take) {
    const uint32_t v = uint32_t(voxel);
    for (uint32_t mask = mask_of(v); mask;) {
      const int bit = kDescending ? highest_bit(mask) : lowest_bit(mask);
      mask ^= 1u << bit;
      take(3 * v + uint32_t(offset[bit]));
    }
  };
  std::vector<uint32_t> cells;
  std::vector<uint64_t> marked;
  for (size_t i = 0; i < voxels.size();) {
    const uint32_t rank = uint32_t(voxels[i] >> 32);
    size_t end = i + 1;
    while (end < voxels.size() && voxels[end] >> 32 == rank) ++end;
    if (end == i + 1) {
      bits(voxels[i++], [&](uint32_t c) { fn(c, rank); });
      continue;
    }
    cells.clear();
    for (; i < end; ++i) bits(voxels[i], [&](uint32_t c) { cells.push_back(c); });
    // Few of them are sorted; many are found again in a bitmap of all cells.
    const size_t words = size_t(l.size()) * 3 / 64 + 1;
    if (cells.size() * 32 < words) {
      std::sort(cells.begin(), cells.end());
      if (kDescending) std::reverse(cells.begin(), cells.end());
      for (uint32_t c : cells) fn(c, rank);
      continue;
    }
    marked.assign(words, 0);
    for (uint32_t c : cells) marked[c >> 6] |= uint64_t(1) << (c & 63);
    for (size_t w = 0; w < words; ++w) {
      const size_t at = kDescending ? words - 1 - w : w;
      for (uint64_t x = marked[at]; x;) {
        const int bit = kDescending ? highest_bit(x) : lowest_bit(x);
        x ^= uint64_t(1) << bit;
        fn(uint32_t(at * 64 + bit), rank);
      }
    }
  }
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
