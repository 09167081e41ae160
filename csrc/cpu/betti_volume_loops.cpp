#include "cpu/betti_volume_loops.h"

#include <algorithm>
#include <functional>

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

// A pivot's column: a square, or with this flag the number of a column that was kept.
constexpr uint32_t kKept = 0x80000000u;

class Reduction {
 public:
  // `negative`: edges to leave out; null: none.
  Reduction(const Order& rows, const Lattice& l, const EdgeSet* negative, Slab& slab)
      : rank_(rows.rank.get()), l_(l), negative_(negative), pivots_(slab, size_t(l.size()) * 3) {
    std::fill(pivots_.get(), pivots_.get() + size_t(l.size()) * 3, kNone);
  }

  // Reduces the column of a square. resolve(edge, add) adds, for an edge that pairs within its
  // star, the other edges of its column, and says whether it did.
  template <class Resolve>
  uint32_t reduce(uint32_t square, Resolve&& resolve) {
    uint32_t edges[4];
    Square(l_, square).edges(edges);
    heap_.clear();
    for (uint32_t e : edges) add(e);
    bool changed = false;
    for (;;) {
      const uint32_t e = pop();
      if (e == kNone) return kNone;
      if (resolve(e, [this](uint32_t x) { add(x); })) {
        changed = true;
        continue;
      }
      const uint32_t column = pivots_[e];
      if (column == kNone) {
        pivots_[e] = changed ? keep() : square;
        return e;
      }
      changed = true;
      if (column & kKept) {
        const uint32_t *x = kept_.data() + starts_[column ^ kKept],
                       *end = kept_.data() + starts_[(column ^ kKept) + 1];
        for (; x < end; ++x) add(*x);
      } else {
        Square(l_, column).edges(edges);
        for (uint32_t x : edges) {
          if (x != e) add(x);
        }
      }
    }
  }

  // Whether the column of a square has a pivot of its own, the largest edge; which it is then
  // given.
  bool emergent(uint32_t square, uint32_t& edge) {
    const Square s(l_, square);
    const uint32_t *r = rank_, *c = s.corners;
    const uint32_t last = std::max(r[c[2]], r[c[3]]), a = s.normal == 0 ? 1 : 0,
                   b = s.normal == 2 ? 1 : 2;
    if (last >= std::max(r[c[0]], r[c[1]])) {
      edge = 3 * c[2] + b;
    } else {
      edge = r[c[1]] >= r[c[0]] ? 3 * c[1] + a : 3 * c[0] + b;
    }
    if (pivots_[edge] != kNone) return false;
    pivots_[edge] = square;
    return true;
  }

  // The column of a pivot, without the pivot.
  std::vector<uint32_t> column(uint32_t edge) const {
    const uint32_t code = pivots_[edge];
    if (code & kKept) {
      const uint32_t i = code ^ kKept;
      return {kept_.begin() + int64_t(starts_[i]), kept_.begin() + int64_t(starts_[i + 1])};
    }
    uint32_t edges[4];
    Square(l_, code).edges(edges);
    std::vector<uint32_t> others;
    std::remove_copy(edges, edges + 4, std::back_inserter(others), edge);
    return others;
  }

 private:
  void add(uint32_t e) {
    if (negative_ && negative_->has(e)) return;
    heap_.push_back(uint64_t(Edge(l_, e).rank(rank_)) << 32 | e);
    std::push_heap(heap_.begin(), heap_.end());
  }
  uint64_t take() {
    const uint64_t x = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end());
    heap_.pop_back();
    return x;
  }
  // The largest edge that does not cancel.
  uint32_t pop() {
    while (!heap_.empty()) {
      const uint64_t x = take();
      if (heap_.empty() || heap_.front() != x) return uint32_t(x);
      take();
    }
    return kNone;
  }
  // What is left in the heap, as a column.
  uint32_t keep() {
    std::sort(heap_.begin(), heap_.end(), std::greater<uint64_t>());
    for (size_t i = 0; i < heap_.size(); ++i) {
      if (i + 1 < heap_.size() && heap_[i] == heap_[i + 1]) {
        ++i;
      } else {
        kept_.push_back(uint32_t(heap_[i]));
      }
    }
    starts_.push_back(kept_.size());
    return kKept | uint32_t(starts_.size() - 2);
  }

  const uint32_t* rank_;
  const Lattice& l_;
  const EdgeSet* negative_;
  Array<uint32_t> pivots_;
  std::vector<uint64_t> heap_;
  std::vector<uint32_t> kept_;
  std::vector<size_t> starts_{0};
};

// Adds the columns of edges that pair within their star.
class StarColumns {
 public:
  StarColumns(const Order& o, const Lattice& l, const Stars& stars)
      : rank_(o.rank.get()), l_(l), local_(stars.local.get()), at_(l), tables_(star_tables()) {}

  template <class Add>
  bool operator()(uint32_t e, Add&& add) const {
    const Edge edge(l_, e);
    const uint32_t v = edge.owner(rank_);
    const uint32_t i = e % 3 + (v == edge.first ? 3 : 0);
    const uint32_t squares = tables_.column[Stars::columns(local_[v])][i];
    if (!squares) return false;
    uint32_t inner = 1u << i;
    for (uint32_t x = squares; x; x &= x - 1) {
      const int k = __builtin_ctz(x);
      inner ^= 1u << kSquareEnds[k][0] | 1u << kSquareEnds[k][1];
      add(3 * v + uint32_t(at_.outer[k][0]));
      add(3 * v + uint32_t(at_.outer[k][1]));
    }
    for (; inner; inner &= inner - 1) add(3 * v + uint32_t(at_.edge[__builtin_ctz(inner)]));
    return true;
  }

 private:
  const uint32_t* rank_;
  const Lattice& l_;
  const uint32_t* local_;
  StarOffsets at_;
  const StarTables& tables_;
};

struct Critical {
  const uint16_t* critical;

  void touch(uint32_t v) const { __builtin_prefetch(critical + v); }
  uint32_t operator()(uint32_t v) const { return critical[v]; }
};

// Every column: the critical ones, and those that pair within their star.
struct Columns {
  const uint32_t* local;
  const uint16_t* critical;
  const StarTables& tables;

  void touch(uint32_t v) const {
    __builtin_prefetch(local + v);
    __builtin_prefetch(critical + v);
  }
  uint32_t operator()(uint32_t v) const {
    return tables.killing[Stars::columns(local[v])] | critical[v];
  }
};

}  // namespace

void run_dim1(const Order& o, const Lattice& l, const Stars& stars, const EdgeSet& negative,
              std::vector<Bar>& bars, Slab& slab) {
  const uint32_t* rank = o.rank.get();
  const StarOffsets at(l);
  const StarColumns of_star(o, l, stars);
  Reduction reduction(o, l, &negative, slab);
  in_order<false>(o, l, at.square, Critical{stars.critical.get()}, [&](uint32_t s, uint32_t r) {
    const uint32_t e = reduction.reduce(s, of_star);
    if (e == kNone) return;
    const Edge edge(l, e);
    if (edge.rank(rank) == r) return;
    bars.push_back({e, s, edge.owner(rank), Square(l, s).owner(rank)});
  });
}

void run_dim1_image(const Order& rows, const EdgeSet& negative, const Order& columns,
                    const Stars& stars, const Lattice& l, std::vector<ImagePair>& pairs,
                    Slab& slab) {
  const StarOffsets at(l);
  Reduction reduction(rows, l, &negative, slab);
  const Columns all{stars.local.get(), stars.critical.get(), star_tables()};
  const auto none = [](uint32_t, auto&&) { return false; };
  const uint32_t* rank = columns.rank.get();
  in_order<false>(columns, l, at.square, all, [&](uint32_t s, uint32_t) {
    uint32_t e;
    if (!reduction.emergent(s, e)) e = reduction.reduce(s, none);
    const uint32_t v = Square(l, s).owner(rank);
    if (!stars.critical[v]) return;
    for (uint32_t x = stars.critical[v]; x; x &= x - 1) {
      if (3 * v + uint32_t(at.square[__builtin_ctz(x)]) == s) pairs.push_back({s, e});
    }
  });
}

std::vector<std::vector<uint32_t>> reduced_columns(const Order& o, const Lattice& l,
                                                   const Stars& stars,
                                                   const std::vector<uint32_t>& squares,
                                                   Slab& slab) {
  std::vector<std::vector<uint32_t>> found(squares.size());
  const StarOffsets at(l);
  const StarColumns of_star(o, l, stars);
  Reduction reduction(o, l, nullptr, slab);
  in_order<false>(o, l, at.square, Critical{stars.critical.get()}, [&](uint32_t s, uint32_t) {
    const uint32_t e = reduction.reduce(s, of_star);
    if (e == kNone) return;
    for (size_t i = 0; i < squares.size(); ++i) {
      if (squares[i] != s) continue;
      found[i] = reduction.column(e);
      found[i].push_back(e);
    }
  });
  return found;
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
