// Linear cross entropy on the CPU: the sums over chunks of rows, kept in full precision.
//
//   accumulate    total += part       the weight's gradient, whose product is in the half dtype
//   column_sums   total += sum_r x_r  the bias's gradient from the logits' gradient
//
// The products themselves are those of gemm.h or torch.mm (pyloss/ops/linear_cross_entropy), the
// rows between them the row-softmax kernel.
//
//   small_linear_cross_entropy   all of it in one call, for problems whose arithmetic takes less
//                                time than the Python around it
//
// Decomposition: threads take columns, in ranges that do not look at the thread count; each column
// is summed in row order. So the bits never depend on the threads.
// Memory traffic: accumulate reads b + 4 and writes 4 bytes per element (b the part's size);
// column_sums reads b per element; `total` stays in cache.
// Accumulator: float, double for fp64.
#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/compiler.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"
#include "cpu/row_softmax.h"

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

void small_linear_cross_entropy(const SmallLinearCrossEntropy& p) {
  using gemm::row_major;
  const auto label = [&](int64_t i) -> int64_t {
    if (p.target_dtype == DType::kI64) return static_cast<const int64_t*>(p.target)[i];
    if (p.target_dtype == DType::kI32) return static_cast<const int32_t*>(p.target)[i];
    return static_cast<const uint8_t*>(p.target)[i];
  };
  // The rows that count, next to each other: what the others hold must not be read.
  std::vector<int64_t> kept, labels;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (label(i) == p.ignore_index) continue;
    kept.push_back(i);
    labels.push_back(label(i));
  }
  const int64_t n = int64_t(kept.size()), v = p.classes, d = p.features;
  const bool all = n == p.rows;
  const gemm::Buffer<float> logits(n * v), rows(all ? 0 : n * d), stats(4 * n);
  for (int64_t i = 0; !all && i < n; ++i) {
    std::copy_n(p.x + kept[i] * d, d, rows.get() + i * d);
  }
  const auto x = row_major(all ? p.x : rows.get(), n, d, d), w = row_major(p.w, v, d, d);
  gemm::multiply(x, w.transposed(), logits.get(), v, false, 1, p.bias);

  float norm[kNormCount];
  RowSoftmaxProblem problem{};
  problem.outer = n;
  problem.classes = v;
  problem.inner = 1;
  problem.dtype = DType::kF32;
  problem.x = logits.get();
  problem.x_strides = {v, 1, 1};
  problem.kind = TargetKind::kIndex;
  problem.target = labels.data();
  problem.target_dtype = DType::kI64;
  RowSoftmaxOptions& o = problem.options;
  o.logit_scale = o.temperature = o.tau = 1;
  o.max_nll = infinity_<double>();
  o.ignore_index = p.ignore_index;
  o.reduction = p.mean ? Reduction::kMean : Reduction::kSum;
  RowSoftmaxForward forward{};
  forward.loss = p.loss;
  forward.loss_dtype = DType::kF32;
  forward.stats = stats.get();
  forward.norm = norm;
  if (p.dx || p.dw || p.dbias) {
    forward.grad = logits.get();
    forward.grad_strides = problem.x_strides;
  }
  row_softmax_forward(problem, forward, 1);

  const auto g = row_major(logits.get(), n, v, v);
  if (p.dx && all) gemm::multiply(g, w, p.dx, d, false, 1);
  if (p.dx && !all) {
    const gemm::Buffer<float> dx(n * d);
    gemm::multiply(g, w, dx.get(), d, false, 1);
    std::fill_n(p.dx, p.rows * d, 0.0f);
    for (int64_t i = 0; i < n; ++i) std::copy_n(dx.get() + i * d, d, p.dx + kept[i] * d);
  }
  if (p.dw) gemm::multiply(g.transposed(), x, p.dw, d, false, 1);
  if (p.dbias) column_sums(p.dbias, logits.get(), DType::kF32, n, v, v, true, 1);
}

}  // namespace pyloss::cpu
