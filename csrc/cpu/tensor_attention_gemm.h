// Matrix products of small windows, exponentials and copies of tensor attention, for one
// instruction set.
//
// No include guard (per_instruction_set.h). The products run the register tile of gemm_tile.h. They
// read their operands where the attention has them, which is in the first-level cache and in rows
// of whole vectors: copies into the panels of gemm.h would cost more than they save at windows of
// this size.
#include "cpu/gemm_tile.h"
// After its vector types.
#include "cpu/exp_vector.h"

// (rows x k) times (k x columns), columns rounded up to whole vectors.
template <class R, bool kTransposed, End kEnd>
void product(int64_t rows, int64_t columns, int64_t k, const R* a, int64_t lda, const R* b,
             int64_t ldb, R* c, int64_t ldc, const Extra<R>& extra = {}) {
  constexpr int kLanes = Vec<R>::kLanes;
  const int64_t tiles = (rows + PYLOSS_TILE_ROWS - 1) / PYLOSS_TILE_ROWS;
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    const int vectors = columns - n > kLanes ? 2 : 1;
    for (int64_t t = 0; t < tiles; ++t) {  // equal heights: a short tile would wait for latencies
      const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      const RunTile<R> run =
          tile_of<R, kTransposed, kEnd>(static_cast<int>(r1 - r0), vectors,
                                        std::make_integer_sequence<int, 2 * PYLOSS_TILE_ROWS>{});
      constexpr bool kHasW = kEnd == End::kWeigh || kEnd == End::kSpread;
      constexpr bool kHasOwn = kEnd == End::kSpread;
      run(kTransposed ? a + r0 : a + r0 * lda, lda, b + n, ldb,
          kEnd == End::kWeigh ? c + n : c + r0 * ldc + n, ldc, k,
          {kHasW ? extra.w + r0 * ldc + n : nullptr, kHasOwn ? extra.factor + n : nullptr,
           kHasOwn ? extra.own + n : nullptr});
    }
  }
}

// ---- copies into the working precision
// -----------------------------------------------------------

// to[r][l] = from[r][l] + bias, zero in the padding.
template <class R, class T>
void copy_rows(R* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
               int64_t features, double bias) {
  const R shift = R(bias);
  for (int64_t r = 0; r < rows; ++r) {
    R* x = to + r * to_stride;
    const T* y = from + r * from_stride;
    for (int64_t l = 0; l < features; ++l) x[l] = R(to_float(y[l])) + shift;
    for (int64_t l = features; l < to_stride; ++l) x[l] = R(0);
  }
}

// to[l][r] = from[r][l] + bias, zero in the padding.
template <class R, class T>
void copy_transposed(R* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
                     int64_t features, double bias) {
  const R shift = R(bias);
  constexpr int64_t kBlock = 16;  // rows whose lines stay in cache while they are read
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const int64_t r1 = std::min(rows, r0 + kBlock);
    for (int64_t l = 0; l < features; ++l) {
      for (int64_t r = r0; r < r1; ++r) {
        to[l * to_stride + r] = R(to_float(from[r * from_stride + l])) + shift;
      }
    }
  }
  for (int64_t l = 0; l < features; ++l) {
    for (int64_t r = rows; r < rows + kPanelPad; ++r) to[l * to_stride + r] = R(0);
  }
}
