// The loops over tiles of logits and rows of features that matter for the time, chosen by
// instruction set.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/gemm.h"

namespace pyloss::cpu::similarity_tiles {

using gemm::Tile;

// Columns of a tile are padded to whole vectors.

// Of a tile: sums of exp(z - shift) over each row and column.
template <class R>
struct Sums {
  const R *row_shifts, *column_shifts;  // null: no shifts, and z at most exp_limit
  R *rows, *columns;                    // columns null: not wanted
  R *weighted, *column_weighted;        // of z exp(z - shift); null: not wanted
};

// Of the rows or columns of a tile, for the gradient.
template <class R>
struct Terms {
  const R *factor, *shift;  // columns without factors have no term; no shifts as above
  const R* positive;        // the gradient of a positive pair; null: none
};

template <class R>
struct EqualSums {
  R *rows, *columns;  // columns null: not wanted
  int64_t *row_counts, *column_counts;
};

// Ids of the rows and columns of a tile, null where no pair is special for them.
struct Ids {
  const int64_t *rows, *columns;
};

// Of a tile: sums over negatives and over positives, of each row and column.
template <class R>
struct PairSums {
  R *rows[2], *columns[2];  // columns null: not wanted
  int64_t *row_counts[2], *column_counts[2];
};

template <class R>
struct TileMath {
  void (*pad)(const Tile<R>&);
  void (*maxima)(const Tile<R>&, R*, R*);
  void (*sum_exp)(const Tile<R>&, const Sums<R>&);
  void (*softmax_gradient)(const Tile<R>&, const Terms<R>&, const Terms<R>&);
  void (*hide_equal)(const Tile<R>&, const int64_t*, const int64_t*);
  void (*sum_equal)(const Tile<R>&, const int64_t*, const int64_t*, const EqualSums<R>&);
  void (*add_equal)(const Tile<R>&, const int64_t*, const int64_t*, const R*, const R*);
  // Of pair sums. to_signed: z becomes -y (z + bias), y = 1 for equal ids and -1 else.
  void (*to_signed)(const Tile<R>&, R, Ids);
  void (*sum_softplus)(const Tile<R>&, R*, R*);
  void (*sigmoid_gradient)(const Tile<R>&, Ids, const R*, const R*);
  void (*sum_margins)(const Tile<R>&, R, R, Ids, const PairSums<R>&);
  void (*margin_gradient)(const Tile<R>&, R, R, Ids, const R* const*, const R* const*);
  void (*read_scaled)(const void*, DType, int64_t, R, R*);
  void (*write_scaled)(const R*, int64_t, R, DType, void*);
  R (*dot)(const R*, const R*, int64_t);
  void (*divide)(const R*, int64_t, R, R*);
  void (*take_away)(const R*, int64_t, R, R, R*);
};

template <class R>
const TileMath<R>& tile_math();

}  // namespace pyloss::cpu::similarity_tiles
