// values[i, :] = the k largest of q_i . k_j over j (but j = first + i), descending.
//
// Decomposition: a list of k numbers for each query, sorted, whose last one is the bound that a
// product must pass; the first bound is taken from the largest numbers of 16 parts of a tile. Tiles
// of products (gemm.h) stay in the cache: sixteen numbers are compared with the bound at once, and
// the few that pass are inserted. Where the queries are the keys, a
// tile above the diagonal serves its rows and its columns: half of the products.
// Order: larger first, NaN before all, of equal ones the smaller index. A list meets its columns in
// ascending order, so that a number must be above those that are there. This makes the result one
// and the same for any number of threads, and for whole and half products, whose elements have the
// same bits (gemm.h).
// Threads: blocks of rows; of the half product, equal parts of the tiles, each with lists of its
// own, which are put together in the order of the parts.
// Memory: the keys packed, and a block of queries, a tile and perhaps the lists for each thread.
#include "cpu/similarity_topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/compiler.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/tasks.h"
#if PYLOSS_HAS_TARGET_PRAGMA
#include <immintrin.h>
#endif

namespace pyloss::cpu {
namespace {

// Rows and columns of a tile: of the panels of all instruction sets a multiple.
constexpr int64_t kTile = 128;
constexpr int64_t kMostParts = 16;

template <class R>
bool above(R a, R b) {
  return a > b || (a != a && b == b);
}

// Of each query, with room for more than k, in whole vectors; empty places hold -inf and the index
// -1.
template <class R>
struct Lists {
  static constexpr int64_t kLanes = 64 / sizeof(R);

  int64_t k, stride;
  R* values;  // (rows x stride), largest first
  int32_t* indices;
  R* bounds;  // of each: what is not above is none of the k; the k-th number, or more

  static int64_t stride_of(int64_t k) { return (k + kLanes - 1) / kLanes * kLanes; }

  void clear(int64_t rows) const {
    constexpr R kLowest = -std::numeric_limits<R>::infinity();
    std::fill_n(values, rows * stride, kLowest);
    std::fill_n(indices, rows * stride, -1);
    std::fill_n(bounds, rows, kLowest);
  }

  void raise(int64_t row) const {
    const R last = values[row * stride + k - 1];
    if (above(last, bounds[row])) bounds[row] = last;
  }

  void insert(int64_t row, R value, int32_t index) const {
    R* const x = values + row * stride;
    int32_t* const at = indices + row * stride;
    int64_t p = k - 1;
    if (!above(value, x[p])) return;
    for (; p > 0 && above(value, x[p - 1]); --p) {
      x[p] = x[p - 1];
      at[p] = at[p - 1];
    }
    x[p] = value;
    at[p] = index;
    raise(row);
  }
};

// The lists of a part of the work, in memory of their own.
template <class R>
class Memory {
 public:
  Memory(int64_t rows, int64_t k, int64_t parts)
      : rows_(rows),
        k_(k),
        stride_(Lists<R>::stride_of(k)),
        values_(parts * rows * stride_),
        bounds_(parts * (rows + Lists<R>::kLanes)),
        indices_(parts * rows * stride_) {}

  Lists<R> part(int64_t i) const {
    const int64_t at = i * rows_ * stride_;
    return {k_, stride_, values_.get() + at, indices_.get() + at,
            bounds_.get() + i * (rows_ + Lists<R>::kLanes)};
  }

 private:
  const int64_t rows_, k_, stride_;
  const gemm::Buffer<R> values_, bounds_;
  const gemm::Buffer<int32_t> indices_;
};

#define PYLOSS_KERNELS "cpu/similarity_topk_scan.h"
#include "cpu/per_instruction_set.h"

template <class R>
auto scan_of_this_cpu() {
#if PYLOSS_HAS_TARGET_PRAGMA
  if (instruction_set() == InstructionSet::kV4) return &v4::scan_tile<R>;
  if (instruction_set() == InstructionSet::kV3) return &v3::scan_tile<R>;
#endif
  return &base::scan_tile<R>;
}

template <class R>
struct Call {
  const SimilarityTopk& p;
  const gemm::MatrixView<R> queries;
  const gemm::Right<R> keys;
  void (*const scan)(const gemm::Tile<R>&, const Lists<R>&, bool);

  int64_t blocks() const { return gemm::blocks_of(p.rows, kTile); }
  int64_t height(int64_t block) const { return std::min(kTile, p.rows - block * kTile); }

  gemm::Left<R> left(int64_t block, R* buffer) const {
    return gemm::pack_left(queries.block(block * kTile, 0, height(block), p.depth), buffer);
  }
  int64_t left_size() const { return gemm::left_size<R>(std::min(kTile, p.rows), p.depth); }
  int64_t tile_size() const { return std::min(kTile, p.rows) * gemm::tile_stride<R>(kTile); }

  void leave_out_own(const gemm::Tile<R>& t) const {
    if (p.first < 0) return;
    const int64_t shift = p.first + t.row - t.column;  // the column of the first row's own key
    for (int64_t r = std::max<int64_t>(0, -shift); r < std::min(t.rows, t.columns - shift); ++r) {
      t.data[r * t.stride + r + shift] = -std::numeric_limits<R>::infinity();
    }
  }

  void rows(int64_t block, R* buffer, R* tile, const Lists<R>& lists) const {
    gemm::stream(left(block, buffer), block * kTile, keys, kTile, tile,
                 [&](const gemm::Tile<R>& t) {
                   leave_out_own(t);
                   scan(t, lists, false);
                 });
  }

  // The tiles begin, ..., end - 1 of those on and above the diagonal, row by row.
  void half(int64_t begin, int64_t end, R* buffer, R* tile, const Lists<R>& lists) const {
    int64_t at = 0;
    for (int64_t i = 0; i < blocks() && at < end; at += blocks() - i, ++i) {
      const int64_t from = std::max(begin - at, int64_t(0)) + i;
      const int64_t to = std::min(end - at + i, blocks());
      if (from >= to) continue;
      const gemm::Left<R> rows = left(i, buffer);
      for (int64_t j = from; j < to; ++j) {
        const int64_t stride = gemm::tile_stride<R>(kTile);
        gemm::product(rows, keys.some_columns(j * kTile, height(j)), tile, stride, false);
        const gemm::Tile<R> t{tile, stride, i * kTile, j * kTile, rows.rows, height(j)};
        if (i == j) leave_out_own(t);
        scan(t, lists, i != j);
      }
    }
  }
};

// Places that nothing above -inf has filled get what is -inf, the smallest indices first.
template <class R>
void write(const SimilarityTopk& p, const Lists<R>& lists) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const int32_t* const found = lists.indices + i * lists.stride;
    int64_t* const at = p.indices + i * p.k;
    std::copy_n(lists.values + i * lists.stride, p.k, static_cast<R*>(p.values) + i * p.k);
    std::copy_n(found, p.k, at);
    if (found[p.k - 1] >= 0) continue;
    int64_t filled = std::find(at, at + p.k, int64_t(-1)) - at;
    for (int64_t j = 0; filled < p.k; ++j) {
      if (std::find(at, at + filled, j) == at + filled) at[filled++] = j;
    }
  }
}

template <class R>
void run(const SimilarityTopk& p, int threads) {
  const auto queries =
      gemm::row_major(static_cast<const R*>(p.queries), p.rows, p.depth, p.query_stride);
  const auto keys =
      gemm::row_major(static_cast<const R*>(p.keys), p.columns, p.depth, p.key_stride);
  const gemm::Buffer<R> packed(gemm::right_size<R>(p.depth, p.columns));
  const Call<R> call{p, queries, gemm::pack_right(keys.transposed(), packed.get()),
                     scan_of_this_cpu<R>()};
  const bool one =
      p.queries == p.keys && p.rows == p.columns && p.query_stride == p.key_stride && p.first <= 0;
  const int64_t tiles = call.blocks() * (call.blocks() + 1) / 2;
  const int64_t parts =
      one ? std::min({tiles, int64_t(threads), kMostParts}) : slots_for(call.blocks(), threads);
  const Memory<R> memory(p.rows, p.k, one ? parts : 1);
  const Lists<R> lists = memory.part(0);
  const gemm::Buffer<R> left(parts * call.left_size()), tile(parts * call.tile_size());
  const auto left_of = [&](int64_t slot) { return left.get() + slot * call.left_size(); };
  const auto tile_of = [&](int64_t slot) { return tile.get() + slot * call.tile_size(); };
  if (one) {
    run_tasks(parts, parts, [&](int64_t slot, int64_t part) {
      memory.part(part).clear(p.rows);
      call.half(tiles * part / parts, tiles * (part + 1) / parts, left_of(slot), tile_of(slot),
                memory.part(part));
    });
    for (int64_t part = 1; part < parts; ++part) {
      const Lists<R> from = memory.part(part);
      for (int64_t i = 0; i < p.rows; ++i) {
        for (int64_t at = i * from.stride; at < i * from.stride + p.k; ++at) {
          if (from.indices[at] >= 0) lists.insert(i, from.values[at], from.indices[at]);
        }
      }
    }
  } else {
    lists.clear(p.rows);
    run_tasks(call.blocks(), parts, [&](int64_t slot, int64_t block) {
      call.rows(block, left_of(slot), tile_of(slot), lists);
    });
  }
  write(p, lists);
}

}  // namespace

void similarity_topk(const SimilarityTopk& p, int threads) {
  if (p.rows == 0 || p.k == 0) return;
  p.dtype == DType::kF64 ? run<double>(p, threads) : run<float>(p, threads);
}

}  // namespace pyloss::cpu
