// Linear cross entropy on the CPU: the sums over chunks of rows, kept in full precision.
//
//   accumulate    total += part       the weight's gradient, whose product is in the half dtype
//   column_sums   total += sum_r x_r  the bias's gradient from the logits' gradient
//
// The products themselves are torch.mm (pyloss/ops/linear_cross_entropy), the rows between them
// the row-softmax kernel.
//
// Decomposition: threads take columns, in ranges that do not look at the thread count; each column
// is summed in row order. So the bits never depend on the threads.
// Memory traffic: accumulate reads b + 4 and writes 4 bytes per element (b the part's size);
// column_sums reads b per element; `total` stays in cache.
// Accumulator: float, double for fp64.
#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cstring>

#include "common/multiversion.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"

namespace pyloss::cpu {
namespace {

template <class T, class R>
PYLOSS_INLINE void add_of(R* total, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += R(to_float(x[i]));
}

// total[i] += x[i], in three instruction sets.
PYLOSS_MULTIVERSION void add(float* total, const float* x, int64_t n) {
  add_of(total, x, n);
}
PYLOSS_MULTIVERSION void add(float* total, const BF16* x, int64_t n) {
  add_of(total, x, n);
}
PYLOSS_MULTIVERSION void add(float* total, const F16* x, int64_t n) {
  add_of(total, x, n);
}
void add(double* total, const double* x, int64_t n) {
  add_of(total, x, n);
}

template <class T, class R>
void accumulate_as(R* total, const T* part, int64_t n, bool first, int threads) {
  parallel_for(n, kRangeElements, useful_threads(n, threads), [&](int64_t begin, int64_t end) {
    if (first) std::fill(total + begin, total + end, R(0));
    add(total + begin, part + begin, end - begin);
  });
}

template <class T, class R>
void column_sums_as(R* total, const T* x, int64_t rows, int64_t columns, int64_t row_stride,
                    bool first, int threads) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  parallel_for(blocks, 1, useful_threads(rows * columns, threads), [&](int64_t begin, int64_t end) {
    alignas(64) R sum[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kBlock, n = std::min(kBlock, columns - at);
      std::fill(sum, sum + n, R(0));
      for (int64_t row = 0; row < rows; ++row) add(sum, x + row * row_stride + at, n);
      // The chunk's own sum first: less rounding than one long sum.
      if (first) std::fill(total + at, total + at + n, R(0));
      for (int64_t i = 0; i < n; ++i) total[at + i] += sum[i];
    }
  });
}

}  // namespace

void accumulate(void* total, const void* part, DType t, int64_t n, bool first, int threads) {
  switch (t) {
    case DType::kF64:
      return accumulate_as(static_cast<double*>(total), static_cast<const double*>(part), n, first,
                           threads);
    case DType::kBF16:
      return accumulate_as(static_cast<float*>(total), static_cast<const BF16*>(part), n, first,
                           threads);
    case DType::kF16:
      return accumulate_as(static_cast<float*>(total), static_cast<const F16*>(part), n, first,
                           threads);
    default:
      return accumulate_as(static_cast<float*>(total), static_cast<const float*>(part), n, first,
                           threads);
  }
}

void column_sums(void* total, const void* x, DType t, int64_t rows, int64_t columns,
                 int64_t row_stride, bool first, int threads) {
  switch (t) {
    case DType::kF64:
      return column_sums_as(static_cast<double*>(total), static_cast<const double*>(x), rows,
                            columns, row_stride, first, threads);
    case DType::kBF16:
      return column_sums_as(static_cast<float*>(total), static_cast<const BF16*>(x), rows, columns,
                            row_stride, first, threads);
    case DType::kF16:
      return column_sums_as(static_cast<float*>(total), static_cast<const F16*>(x), rows, columns,
                            row_stride, first, threads);
    default:
      return column_sums_as(static_cast<float*>(total), static_cast<const float*>(x), rows, columns,
                            row_stride, first, threads);
  }
}

}  // namespace pyloss::cpu
