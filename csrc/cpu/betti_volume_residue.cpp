// Apparent pairs are no columns here, and need not be: whoever meets the pivot of one finds its
// column. Let e be a pivot that no column has so far, tau its smallest coface in the order of the
// columns. If e is the largest face of tau in that of the rows, then tau is the column of e.
//
// Edges that join components are no pivots of any matrix with these rows, and left out.
//
// Memory traffic: 12 bytes of pivots per voxel and matrix, and the columns.
#include "cpu/betti_volume_residue.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/betti_volume_column.h"
#include "cpu/betti_volume_order.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {

using namespace betti_item;

using betti_volume::kKept;

namespace {

// Edges and squares by the flat index of their corner.
struct Cells {
  uint32_t size[3], stride[3];

  explicit Cells(const Problem& p)
      : size{uint32_t(p.depth), uint32_t(p.rows), uint32_t(p.cols)},
        stride{size[1] * size[2], size[2], 1} {}
  uint32_t voxels() const { return size[0] * stride[0]; }
  uint32_t coordinate(uint32_t v, uint32_t axis) const { return v / stride[axis] % size[axis]; }
  bool has_next(uint32_t v, uint32_t axis) const { return coordinate(v, axis) + 1 < size[axis]; }
  static uint32_t first(uint32_t normal) { return normal == 0 ? 1 : 0; }
  static uint32_t second(uint32_t normal) { return normal == 2 ? 1 : 2; }
  bool is_square(uint32_t s) const {
    return s / 3 < voxels() && has_next(s / 3, first(s % 3)) && has_next(s / 3, second(s % 3));
  }

  uint32_t edge_voxel(const uint32_t* rank, uint32_t e) const {
    return betti_volume::later(rank, e / 3, e / 3 + stride[e % 3]);
  }
  uint32_t square_voxel(const uint32_t* rank, uint32_t s) const {
    const uint32_t p = s / 3, a = stride[first(s % 3)], b = stride[second(s % 3)];
    using betti_volume::later;
    return later(rank, later(rank, later(rank, p, p + b), p + a), p + a + b);
  }
  uint64_t edge_key(const uint32_t* rank, uint32_t e) const {
    return uint64_t(rank[edge_voxel(rank, e)]) << 32 | e;
  }
  uint64_t square_key(const uint32_t* rank, uint32_t s) const {
    return uint64_t(rank[square_voxel(rank, s)]) << 32 | s;
  }
  void faces(uint32_t s, uint32_t e[4]) const {
    const uint32_t p = s / 3, a = first(s % 3), b = second(s % 3);
    e[0] = 3 * p + a;
    e[1] = 3 * p + b;
    e[2] = 3 * (p + stride[b]) + a;
    e[3] = 3 * (p + stride[a]) + b;
  }
  uint32_t largest_face(const uint32_t* rank, uint32_t s) const {
    uint32_t e[4];
    faces(s, e);
    uint64_t best = 0;
    for (uint32_t x : e) best = std::max(best, edge_key(rank, x));
    return uint32_t(best);
  }
  uint32_t smallest_coface(const uint32_t* rank, uint32_t e) const {
    const uint32_t p = e / 3, axis = e % 3;
    uint64_t best = ~uint64_t(0);
    for (uint32_t across = 0; across < 3; ++across) {
      if (across == axis) continue;
      const uint32_t normal = 3 - axis - across;
      if (has_next(p, across)) best = std::min(best, square_key(rank, 3 * p + normal));
      if (coordinate(p, across) == 0) continue;
      best = std::min(best, square_key(rank, 3 * (p - stride[across]) + normal));
    }
    return uint32_t(best);  // kNone where there is none
  }
};

class Reduction {
 public:
  // `negative`: edges to leave out.
  Reduction(const Cells& cells, const uint32_t* rows, const uint32_t* columns,
            const uint8_t* negative)
      : cells_(cells),
        rows_(rows),
        columns_(columns),
        negative_(negative),
        pivots_(size_t(cells.voxels()) * 3, kNone) {}

  // The pivot of a column; kNone: it vanishes.
  uint32_t reduce(uint32_t square) {
    uint64_t keys[4];
    column_.clear();
    column_.add(keys, keys_of(square, kNone, keys));
    bool changed = false;
    for (uint64_t key; column_.pop(key); changed = true) {
      const uint32_t e = uint32_t(key);
      uint32_t& code = pivots_[e];
      if (code == kNone) {
        const uint32_t tau = cells_.smallest_coface(columns_, e);
        if (tau == kNone || cells_.largest_face(rows_, tau) != e) {
          code = changed ? keep() : square;
          return e;
        }
        code = tau;
      }
      if (code & kKept) {
        const size_t begin = starts_[code ^ kKept], end = starts_[(code ^ kKept) + 1];
        column_.add(kept_.data() + begin, end - begin);
      } else {
        column_.add(keys, keys_of(code, e, keys));
      }
    }
    return kNone;
  }

 private:
  // The keys of a square's edges but one, descending.
  size_t keys_of(uint32_t square, uint32_t but, uint64_t* keys) const {
    uint32_t faces[4];
    cells_.faces(square, faces);
    int k = 0;
    for (uint32_t e : faces) {
      if (e != but && !negative_[e]) betti_volume::insert_key(cells_.edge_key(rows_, e), keys, k);
    }
    return size_t(k);
  }
  uint32_t keep() {
    column_.append_to(kept_);
    starts_.push_back(kept_.size());
    return kKept | uint32_t(starts_.size() - 2);
  }

  const Cells& cells_;
  const uint32_t *rows_, *columns_;
  const uint8_t* negative_;
  std::vector<uint32_t> pivots_;
  betti_volume::Column column_;
  std::vector<uint64_t> kept_;
  std::vector<size_t> starts_{0};
};

// By `key`, which no two have alike; null where there is none.
template <class T>
const T* look_up(const std::vector<T>& sorted, uint32_t T::* key, uint32_t value) {
  const auto at = std::lower_bound(sorted.begin(), sorted.end(), value,
                                   [&](const T& x, uint32_t v) { return x.*key < v; });
  return at != sorted.end() && (*at).*key == value ? &*at : nullptr;
}

}  // namespace

ReducedResidue::ReducedResidue(const Problem& batch, const BettiResidue& residue, int threads)
    : batch_(batch), residue_(residue) {
  const Cells cells(batch);
  const int64_t squares = int64_t(cells.voxels()) * 3;
  constexpr int kRows[] = {0, 1, 2, 0, 1}, kColumns[] = {0, 1, 2, 2, 2};
  const int64_t graphs = (batch.target ? 5 : 1) * batch.items;
  pairs_.resize(size_t(graphs));
  parallel_for(graphs, 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t graph = graphs - 1 - i;  // the longest first
      const int64_t m = graph / batch.items, item = graph % batch.items;
      const auto rank = [&](int image) {
        return residue.rank + (image * batch.items + item) * cells.voxels();
      };
      const int64_t* const end = residue.names + residue.count;
      const int64_t* at = std::lower_bound(residue.names, end, graph * squares);
      Reduction reduction(cells, rank(kRows[m]), rank(kColumns[m]),
                          residue.tree + (kRows[m] * batch.items + item) * squares);
      for (; at < end && *at < (graph + 1) * squares; ++at) {
        const uint32_t square = uint32_t(*at - graph * squares);
        if (*at < graph * squares || !cells.is_square(square)) {
          throw std::invalid_argument("residue: no square");
        }
        const uint32_t edge = reduction.reduce(square);
        if (edge != kNone) pairs_[size_t(graph)].push_back({square, edge});
      }
      std::sort(pairs_[size_t(graph)].begin(), pairs_[size_t(graph)].end(),
                [](const Pair& a, const Pair& b) { return a.square < b.square; });
    }
  });
}

ItemResult ReducedResidue::match(int64_t item) const {
  const Cells cells(batch_);
  const auto rank = [&](int image) {
    return residue_.rank + (image * batch_.items + item) * cells.voxels();
  };
  const auto pairs = [&](int matrix) -> const std::vector<Pair>& {
    return pairs_[size_t(matrix * batch_.items + item)];
  };
  // Bars in public numbers, by their births.
  std::vector<Bar> bars[3];
  for (int image = 0; image < (batch_.target ? 3 : 1); ++image) {
    for (const Pair& x : pairs(image)) {
      const uint32_t *r = rank(image), b = cells.edge_voxel(r, x.edge),
                     d = cells.square_voxel(r, x.square);
      if (r[b] != r[d]) bars[image].push_back({x.edge, x.square, b, d});
    }
    std::sort(bars[image].begin(), bars[image].end(),
              [](const Bar& a, const Bar& b) { return a.birth < b.birth; });
  }
  std::vector<ComparisonBar> comparison;
  if (batch_.target) {
    for (const Bar& m : bars[2]) {
      uint32_t in[2];
      for (int image = 0; image < 2; ++image) {
        // A column that is not left has an apparent pair.
        const Pair* own = look_up(pairs(3 + image), &Pair::square, m.death);
        const uint32_t e = own ? own->edge : cells.largest_face(rank(image), m.death);
        const Bar* bar = look_up(bars[image], &Bar::birth, e);
        in[image] = bar ? uint32_t(bar - bars[image].data()) : kNone;
      }
      comparison.push_back({m.birth, m.death, in[0], in[1]});
    }
  }

  const betti_volume::Lattice l(batch_);
  const auto padded = [&](uint32_t v) {
    return l.row(cells.coordinate(v, 0), cells.coordinate(v, 1)) + cells.coordinate(v, 2);
  };
  const auto padded_cell = [&](uint32_t c) { return 3 * padded(c / 3) + c % 3; };
  ItemResult result;
  DimResult& one = result.dim[1];
  for (int image = 0; image < 2; ++image) {
    for (Bar& b : bars[image]) {
      b = {padded_cell(b.birth), padded_cell(b.death), padded(b.birth_voxel),
           padded(b.death_voxel)};
    }
  }
  for (ComparisonBar& m : comparison) {
    m.birth = padded_cell(m.birth);
    m.death = padded_cell(m.death);
  }
  one.input = std::move(bars[0]);
  one.target = std::move(bars[1]);
  result.oldest_input = result.oldest_target = padded(0);  // dimension 0 is the device's
  link(comparison, one);
  return result;
}

}  // namespace cpu
}  // namespace pyloss
