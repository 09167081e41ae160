// Soft rank and soft sort on the GPU: formulas in common/permutahedron.h.
//
// Decomposition: one thread owns one row, since pooling is a sequential pass; the sort, which is
// the larger part of the work, is torch's. The stacks of neighbouring threads interleave, so that a
// warp touches neighbouring addresses as long as its rows are pooled alike. No atomics. Memory: 12
// + 8 bytes per float read and written once, 20 bytes of stack per element. Sums and block values
// are double.
#include "cuda/permutahedron.h"

#include <stdexcept>

#include "cuda/launch.h"

namespace pyloss::cuda {
namespace {

using permutahedron::Problem;

constexpr int kThreads = 64;  // few rows must still reach several multiprocessors

template <class R, bool kCentredKl>
__global__ void __launch_bounds__(kThreads)
    permutahedron_fwd_kernel(Problem p, const R* sorted, const int64_t* order, R* y,
                             int32_t* packed, permutahedron::Stack stack) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const R* x = sorted + row * p.n;
  const int64_t* index = order + row * p.n;
  R* out = y + row * p.n;
  int32_t* marks = packed + row * p.n;
  const permutahedron::Stack mine{stack.sum + row, stack.value + row, stack.start + row,
                                  stack.step};
  // torch sorts NaN as the largest.
  const R suspect = x[p.rank ? 0 : p.n - 1];
  permutahedron::forward_row<kCentredKl>(
      p, suspect != suspect, mine, [&](int64_t i) { return double(x[i]); },
      [&](int64_t i) { return int32_t(index[i]); }, [&](int64_t i, double v) { out[i] = R(v); },
      [&](int64_t i, int32_t v) { marks[i] = v; });
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    permutahedron_bwd_kernel(Problem p, const R* g, const R* x, const int32_t* packed, R* dx) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t at = row * p.n;
  permutahedron::backward_row(
      p, [&](int64_t i) { return packed[at + i]; }, [&](int64_t i) { return double(g[at + i]); },
      [&](int64_t i) { return double(x[at + i]); },
      [&](int64_t i, double v) { dx[at + i] = R(v); });
}

template <class Fn>
void for_dtype(const Problem& p, const Fn& fn) {
  if (p.rows == 0 || p.n == 0) return;
  if (p.dtype == DType::kF64) {
    fn(double{});
  } else {
    fn(float{});
  }
}

}  // namespace

int64_t permutahedron_scratch_bytes(const Problem& p) {
  return p.rows * p.n * int64_t(2 * sizeof(double) + sizeof(int32_t));
}

void permutahedron_forward(const Problem& p, const void* sorted, const int64_t* order, void* y,
                           int32_t* packed, void* scratch, int64_t scratch_bytes, void* stream) {
  if (scratch_bytes < permutahedron_scratch_bytes(p)) {
    throw std::invalid_argument("permutahedron: too little scratch memory");
  }
  const int64_t count = p.rows * p.n;
  double* sum = static_cast<double*>(scratch);
  const permutahedron::Stack stack{sum, sum + count, reinterpret_cast<int32_t*>(sum + 2 * count),
                                   p.rows};
  for_dtype(p, [&](auto zero) {
    using R = decltype(zero);
    auto* kernel = permutahedron::is_centred_kl(p) ? permutahedron_fwd_kernel<R, true>
                                                   : permutahedron_fwd_kernel<R, false>;
    launch(kernel, dim3(grid_size(ceil_div(p.rows, kThreads))), dim3(kThreads), 0, stream, p,
           static_cast<const R*>(sorted), order, static_cast<R*>(y), packed, stack);
  });
}

void permutahedron_backward(const Problem& p, const void* g, const void* x, const int32_t* packed,
                            void* dx, void* stream) {
  for_dtype(p, [&](auto zero) {
    using R = decltype(zero);
    launch(permutahedron_bwd_kernel<R>, dim3(grid_size(ceil_div(p.rows, kThreads))), dim3(kThreads),
           0, stream, p, static_cast<const R*>(g), static_cast<const R*>(x), packed,
           static_cast<R*>(dx));
  });
}

}  // namespace pyloss::cuda
