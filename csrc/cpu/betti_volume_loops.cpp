#include "cpu/betti_volume_loops.h"

#include <algorithm>

#include "common/compiler.h"
#include "cpu/betti_volume_column.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

// Edge -> its column. Of few edges: by open addressing, at most half full; of many an array.
class Pivots {
 public:
  Pivots(size_t count, size_t edges, Slab& slab) {
    if (16 * count > edges) {
      columns_ = Array<uint32_t>(slab, edges);
      std::fill(columns_.get(), columns_.get() + edges, kNone);
      return;
    }
    int bits = 6;
    while (size_t(1) << bits < 2 * count) ++bits;
    shift_ = 32 - bits;
    mask_ = (uint32_t(1) << bits) - 1;
    slots_ = Array<Slot>(slab, size_t(mask_) + 1);
    std::fill(slots_.get(), slots_.get() + mask_ + 1, Slot{kNone, kNone});
  }
  // kNone where there is none yet.
  uint32_t& operator[](uint32_t e) const {
    if (columns_.get()) return columns_[e];
    uint32_t i = (e * 0x9e3779b1u) >> shift_;
    while (slots_[i].edge != e && slots_[i].column != kNone) i = (i + 1) & mask_;
    slots_[i].edge = e;  // a free one stays free until it has a column
    return slots_[i].column;
  }

 private:
  struct Slot {
    uint32_t edge, column;
  };

  int shift_;
  uint32_t mask_;
  Array<Slot> slots_;
  Array<uint32_t> columns_;
};

class Reduction {
 public:
  // Of up to `count` columns. `negative`: edges to leave out; null: none.
  Reduction(size_t count, const Order& rows, const Lattice& l, const Bits* negative, Slab& slab)
      : rank_(rows.rank.get()),
        l_(l),
        negative_(negative),
        pivots_(count, size_t(l.size()) * 3, slab) {}

  // Reduces the column of a square to its pivot; kNone: to nothing. resolve(edge, keys) gives, for
  // an edge that pairs within its star, the other keys of its column: their number, or -1.
  template <class Resolve>
  uint32_t reduce(uint32_t square, Resolve&& resolve) {
    uint64_t keys[4 * 12];
    column_.clear();
    column_.add(keys, keys_of(square, kNone, keys));
    bool changed = false;
    for (uint64_t key; column_.pop(key); changed = true) {
      const uint32_t e = uint32_t(key);
      if (const int count = resolve(e, keys); count >= 0) {
        column_.add(keys, size_t(count));
        continue;
      }
      uint32_t& code = pivots_[e];
      if (code == kNone) {
        code = changed ? keep() : square;
        return e;
      }
      if (code & kKept) {
        const size_t begin = starts_[code ^ kKept], end = starts_[(code ^ kKept) + 1];
        column_.add(kept_.data() + begin, end - begin);
      } else {
        column_.add(keys, size_t(keys_of(code, e, keys)));
      }
    }
    return kNone;
  }

  // Whether the column of a square has a pivot of its own, the largest edge, which it is then
  // given. pairs(edge): the edge pairs within its star.
  template <class Pairs>
  bool emergent(uint32_t square, Pairs&& pairs, uint32_t& edge) {
    const Square s(l_, square);
    const uint32_t *r = rank_, *c = s.corners;
    const uint32_t last = std::max(r[c[2]], r[c[3]]), a = s.normal == 0 ? 1 : 0,
                   b = s.normal == 2 ? 1 : 2;
    if (last >= std::max(r[c[0]], r[c[1]])) {
      edge = 3 * c[2] + b;
    } else {
      edge = r[c[1]] >= r[c[0]] ? 3 * c[1] + a : 3 * c[0] + b;
    }
    if (pairs(edge)) return false;
    uint32_t& column = pivots_[edge];
    if (column != kNone) return false;
    column = square;
    return true;
  }

  // The edges of the column of a pivot.
  std::vector<uint32_t> column(uint32_t edge) const {
    const uint32_t code = pivots_[edge];
    std::vector<uint32_t> edges;
    if (code & kKept) {
      edges.push_back(edge);
      for (size_t i = starts_[code ^ kKept]; i < starts_[(code ^ kKept) + 1]; ++i) {
        edges.push_back(uint32_t(kept_[i]));
      }
    } else {
      edges.resize(4);
      Square(l_, code).edges(edges.data());
    }
    return edges;
  }

  // The keys of `count` edges that are no rows to leave out, descending.
  int keys_of(const uint32_t* edges, int count, uint64_t* keys) const {
    int k = 0;
    for (int i = 0; i < count; ++i) {
      const uint32_t e = edges[i];
      if (negative_ && negative_->has(e)) continue;
      insert_key(key_of(Edge(l_, e).rank(rank_), e), keys, k);
    }
    return k;
  }

 private:
  // Of the edges of a square but one.
  int keys_of(uint32_t square, uint32_t but, uint64_t* keys) const {
    const Square s(l_, square);
    uint32_t edges[4], r[4];
    s.edges(edges);
    for (int i = 0; i < 4; ++i) r[i] = rank_[s.corners[i]];
    const uint32_t ranks[4] = {std::max(r[0], r[2]), std::max(r[0], r[1]), std::max(r[1], r[3]),
                               std::max(r[2], r[3])};
    int k = 0;
    for (int i = 0; i < 4; ++i) {
      if (edges[i] == but || (negative_ && negative_->has(edges[i]))) continue;
      insert_key(key_of(ranks[i], edges[i]), keys, k);
    }
    return k;
  }
  uint32_t keep() {
    column_.append_to(kept_);
    starts_.push_back(kept_.size());
    return kKept | uint32_t(starts_.size() - 2);
  }

  const uint32_t* rank_;
  const Lattice& l_;
  const Bits* negative_;
  Pivots pivots_;
  Column column_;
  std::vector<uint64_t> kept_;
  std::vector<size_t> starts_{0};
};

// The columns of edges that pair within their star. `local`: of the voxels, Stars::local.
class StarColumns {
 public:
  StarColumns(const Order& o, const Lattice& l, const uint32_t* local, const Reduction& reduction)
      : rank_(o.rank.get()),
        l_(l),
        local_(local),
        at_(l),
        tables_(star_tables()),
        reduction_(reduction) {}

  bool pairs(uint32_t e) const {
    uint32_t v, i;
    return squares(e, v, i) != 0;
  }
  int operator()(uint32_t e, uint64_t* keys) const {
    uint32_t v, i;
    const uint32_t found = squares(e, v, i);
    if (!found) return -1;
    uint32_t inner = 1u << i, edges[24 + 6];
    int count = 0;
    for (uint32_t x = found; x; x &= x - 1) {
      const int k = lowest_bit(x);
      inner ^= 1u << kSquareEnds[k][0] | 1u << kSquareEnds[k][1];
      edges[count++] = 3 * v + uint32_t(at_.outer[k][0]);
      edges[count++] = 3 * v + uint32_t(at_.outer[k][1]);
    }
    for (; inner; inner &= inner - 1)
      edges[count++] = 3 * v + uint32_t(at_.edge[lowest_bit(inner)]);
    return reduction_.keys_of(edges, count, keys);
  }

 private:
  // Those of its column, its owner, and its direction from there.
  uint32_t squares(uint32_t e, uint32_t& v, uint32_t& i) const {
    const Edge edge(l_, e);
    v = edge.owner(rank_);
    i = e % 3 + (v == edge.first ? 3 : 0);
    return tables_.column[Stars::columns(local_[v])][i];
  }

  const uint32_t* rank_;
  const Lattice& l_;
  const uint32_t* local_;
  StarOffsets at_;
  const StarTables& tables_;
  const Reduction& reduction_;
};

struct Masks {
  const uint16_t* squares;

  void touch(uint32_t v) const { PYLOSS_PREFETCH(squares + v); }
  uint32_t operator()(uint32_t v) const { return squares[v]; }
};

size_t count_of(const Lattice& l, const uint16_t* squares) {
  size_t count = 0;
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      if (squares[v]) count += size_t(bit_count(squares[v]));
    }
  });
  return count;
}

}  // namespace

void run_dim1(const Order& o, const Lattice& l, const Stars& stars, const Bits& negative,
              std::vector<Bar>& bars, Slab& slab) {
  const uint32_t* rank = o.rank.get();
  const StarOffsets at(l);
  Reduction reduction(count_of(l, stars.critical.get()), o, l, &negative, slab);
  const StarColumns of_star(o, l, stars.local.get(), reduction);
  in_order<false>(o, l, at.square, Masks{stars.critical.get()}, [&](uint32_t s, uint32_t r) {
    const uint32_t e = reduction.reduce(s, of_star);
    if (e == kNone) return;
    const Edge edge(l, e);
    if (edge.rank(rank) == r) return;
    bars.push_back({e, s, edge.owner(rank), Square(l, s).owner(rank)});
  });
}

void run_dim1_image(const Side& rows, const Bits& negative, const Side& columns,
                    const std::vector<uint32_t>& births, const Lattice& l,
                    std::vector<ImagePair>& pairs, Slab& slab) {
  const uint32_t *rank = rows.order.rank.get(), *column_rank = columns.order.rank.get();
  const StarOffsets at(l);
  const StarTables& t = star_tables();
  // The part of the smallest value.
  Stars part;
  {
    Array<uint32_t> in_part(slab, l.size());
    for (uint32_t v = 0; v < l.size(); ++v) in_part[v] = column_rank[v] == 0 ? rank[v] : kNone;
    part = make_stars(in_part.get(), l, slab);
    clear_part(rows.order, l, part, in_part.get(), columns.stars, births, slab);
  }
  // What is known of the stars, and the columns that are left.
  uint32_t* local = part.local.get();
  Array<uint16_t> left(slab, l.size());
  std::fill(left.get(), left.get() + l.size(), uint16_t(0));
  l.each_row([&](uint32_t begin, uint32_t) {
    for (uint32_t v = begin; v < begin + l.cols; ++v) {
      if (column_rank[v] == 0) continue;
      const uint32_t x = rows.stars.local[v], y = columns.stars.local[v];
      const bool same = Stars::columns(x) == Stars::columns(y) && !Stars::tied(x | y);
      local[v] = same ? x : 0;
      left[v] = uint16_t(columns.stars.critical[v] | (same ? 0 : t.killing[Stars::columns(y)]));
    }
  });
  in_order<false>(columns.order, l, at.square, Masks{columns.stars.critical.get()},
                  [&](uint32_t s, uint32_t r) {
                    if (r > 0) pairs.push_back({s, kNone});
                  });

  const size_t count = count_of(l, part.critical.get()) + count_of(l, left.get());
  Reduction reduction(count, rows.order, l, &negative, slab);
  const StarColumns of_star(rows.order, l, local, reduction);
  in_order<false>(rows.order, l, at.square, Masks{part.critical.get()},
                  [&](uint32_t s, uint32_t) { reduction.reduce(s, of_star); });
  size_t next = 0;
  const auto pairs_in_star = [&](uint32_t e) { return of_star.pairs(e); };
  in_order<false>(columns.order, l, at.square, Masks{left.get()}, [&](uint32_t s, uint32_t) {
    uint32_t e;
    if (!reduction.emergent(s, pairs_in_star, e)) e = reduction.reduce(s, of_star);
    if (next < pairs.size() && pairs[next].square == s) pairs[next++].edge = e;
  });
}

void reduced_columns(const Order& o, const Lattice& l, const Stars& stars,
                     const std::function<void(uint32_t, const std::vector<uint32_t>&)>& found,
                     Slab& slab) {
  const StarOffsets at(l);
  Reduction reduction(count_of(l, stars.critical.get()), o, l, nullptr, slab);
  const StarColumns of_star(o, l, stars.local.get(), reduction);
  in_order<false>(o, l, at.square, Masks{stars.critical.get()}, [&](uint32_t s, uint32_t) {
    const uint32_t e = reduction.reduce(s, of_star);
    if (e != kNone) found(s, reduction.column(e));
  });
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
