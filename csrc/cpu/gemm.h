// Matrix products on the CPU, float and double: whole ones, and the pieces of a loop that uses the
// tiles of a product while they are in the cache and never stores the whole.
//
//   C_ij (+)= sum_l A_il B_lj
//
// Decomposition: C in register tiles of 14 x 32 floats (AVX-512; 6 x 16 with AVX2, 6 x 8 below).
// Operands are copied ("packed") into panels in the order in which the tiles read them: B into
// panels of 32 columns, A into panels of the height of a tile. K is cut into blocks of kDepth, so
// that a panel of B, 48 KB at most, stays in the first caches while the rows of A, at most
// left_rows(depth) of them, stream past it from the second.
// Memory traffic: A and B read once for each block of the other one's, C written once and read
// and written once more for each further block of K.
// Accumulator: R, in registers within a block of K. An element is summed in the order of l inside
// a block, blocks in order; so its bits depend on the number of threads, on the cut into tasks and
// on its place in a tile in no way. (multiply() adds a small C, of a long K, in up to 8 parts of K,
// which depend on the sizes alone.)
//
// 1. A whole product: multiply(). A B, A B^T, A^T B are one function, since a MatrixView has two
//    strides:
//
//      multiply(row_major(x, n, d, d), row_major(w, v, d, d).transposed(), z, v, false, threads);
//
// 2. Streaming: S = Q K^T (n x m) by tiles, f(tile) on each; and what is made of the tile
//    multiplied on, in the same pass:
//
//      Buffer<R> keys(right_size<R>(d, m));          // once: K^T as right operand of S = Q K^T
//      const Right<R> scores = pack_right(k.transposed(), keys.get());
//      Buffer<R> rows(right_size<R>(m, d));          // once, for dQ += G K
//      const Right<R> values = pack_right(k, rows.get());
//      ... for each block of rows [i, i + h), h about 64, in parallel, with buffers of its own:
//      const Left<R> left = pack_left(q.block(i, 0, h, d), buffer);
//      stream(left, i, scores, width, tile_buffer, [&](const Tile<R>& t) {
//        // t.data[r * t.stride + c] is S at (t.row + r, t.column + c), r < t.rows, c < t.columns.
//        ... statistics of it, or G written over it ...
//        add_product(t, values, dq + i * d, d);                         // dQ[rows] += G K[columns]
//        add_transposed_product(t, q_rows, dk + t.column * d, d);  // dK[columns] += G^T Q[rows]
//      });
//
//    q_rows = pack_right(q.block(i, 0, h, d), ...): the rows of Q as right operand.
//    Nothing here starts threads: run_tasks (cpu/tasks.h) hands out blocks of rows. Two tasks must
//    not add to the same dK: give each its own, or cut the tasks by columns, and add up in a fixed
//    order.
//    The functor is plain code of the base instruction set; loops over the columns that matter
//    belong in a PYLOSS_MULTIVERSION function (common/compiler.h, cpu/lanes.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/compiler.h"

namespace pyloss::cpu::gemm {

// Element (i, j) is data[i row_stride + j column_stride]; products are fast where one stride is 1.
template <class R>
struct MatrixView {
  const R* data;
  int64_t rows, columns, row_stride, column_stride;

  const R* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
  MatrixView transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  MatrixView block(int64_t i, int64_t j, int64_t n_rows, int64_t n_columns) const {
    return {at(i, j), n_rows, n_columns, row_stride, column_stride};
  }
};
template <class R>
MatrixView<R> row_major(const R* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows, columns, stride, 1};
}

// C (+)= A B + 1 bias^T, C with rows of ldc elements, which must not overlap A or B; the bias, one
// number for each column, may be null.
template <class R>
void multiply(const MatrixView<R>& a, const MatrixView<R>& b, R* c, int64_t ldc, bool add,
              int threads, const R* bias = nullptr);

// At least so many multiplications and additions in registers, on this thread: the yardstick of
// benchmarks. What it returns means nothing.
template <class R>
double multiply_adds(int64_t operations);

// How many blocks of `size` are n, the last one perhaps in part.
inline int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// ---- the pieces
// -------------------------------------------------------------------------------------------------

inline constexpr int64_t kDepth = 384;  // the longest block of K

// Rows of A that should take part in one product(): they fill three quarters of the second-level
// cache.
template <class R>
int64_t left_rows(int64_t depth);

// Uninitialised memory in whole cache lines.
template <class R>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<R*>(allocate_aligned(64, (n * sizeof(R) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  R* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(R* p) const { free_aligned(p); }
  };
  std::unique_ptr<R, Free> data_;
};

// The left operand of a product, (rows x depth): panels made by pack_left; or any rows or columns
// in the cache as they are, element (i, l) at data[i stride + l] or data[l stride + i].
enum class Form { kPanels, kRows, kColumns };
template <class R>
struct Left {
  const R* data;
  int64_t rows, depth;
  int64_t stride;  // kPanels: the depth that was packed
  Form form;
};

// The right operand, (depth x columns) in panels of panel_columns<R>() columns, each row by row,
// the last filled up with zeros.
template <class R>
struct Right {
  const R* data;
  int64_t depth, columns;
  int64_t stride;  // the depth that was packed

  // A part of the columns; `first` is a multiple of panel_columns<R>().
  Right some_columns(int64_t first, int64_t n) const {
    return {data + first * stride, depth, n, stride};
  }
  Right some_depth(int64_t first, int64_t n) const;
};

template <class R>
int64_t panel_columns();

// Elements of the buffers for packed operands.
template <class R>
int64_t left_size(int64_t rows, int64_t depth);
template <class R>
int64_t right_size(int64_t depth, int64_t columns);

template <class R>
Left<R> pack_left(const MatrixView<R>& a, R* to);
template <class R>
Right<R> pack_right(const MatrixView<R>& b, R* to);

// C (+)= left right on this thread.
template <class R>
void product(const Left<R>& left, const Right<R>& right, R* c, int64_t ldc, bool add);

template <class R>
Right<R> Right<R>::some_depth(int64_t first, int64_t n) const {
  return {data + first * panel_columns<R>(), n, columns, stride};
}

// ---- streaming
// -------------------------------------------------------------------------------------------------

// A finished part of a product, in the cache; the functor may write over it.
template <class R>
struct Tile {
  R* data;
  int64_t stride;
  int64_t row, column;  // of its first element in the whole product
  int64_t rows, columns;
};

// The row stride of a tile `width` columns wide: not a power of two, whose rows would share a few
// sets of the cache. The buffer of a tile has rows * tile_stride elements.
template <class R>
int64_t tile_stride(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(R);
  return (width + kLine - 1) / kLine * kLine + kLine;
}

// f(tile) on left right, `width` columns at a time (a multiple of panel_columns<R>()), in order.
// `row` is the number of the first row of `left`.
template <class R, class Function>
void stream(const Left<R>& left, int64_t row, const Right<R>& right, int64_t width, R* buffer,
            Function&& f) {
  const int64_t stride = tile_stride<R>(width);
  for (int64_t at = 0; at < right.columns; at += width) {
    const int64_t n = std::min(width, right.columns - at);
    product(left, right.some_columns(at, n), buffer, stride, false);
    f(Tile<R>{buffer, stride, row, at, left.rows, n});
  }
}

// c (tile.rows x right.columns) += tile right[tile.column ...]: the rows of `right` are those that
// the columns of the whole product stand for.
template <class R>
void add_product(const Tile<R>& tile, const Right<R>& right, R* c, int64_t ldc) {
  product(Left<R>{tile.data, tile.rows, tile.columns, tile.stride, Form::kRows},
          right.some_depth(tile.column, tile.columns), c, ldc, true);
}
// c (tile.columns x right.columns) += tile^T right, whose rows are those of the tile.
template <class R>
void add_transposed_product(const Tile<R>& tile, const Right<R>& right, R* c, int64_t ldc) {
  product(Left<R>{tile.data, tile.columns, tile.rows, tile.stride, Form::kColumns}, right, c, ldc,
          true);
}

}  // namespace pyloss::cpu::gemm
