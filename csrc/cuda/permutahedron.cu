// Soft rank and soft sort on the GPU: formulas in common/permutahedron.h.
//
// The sort, which is the larger part of the work, is torch's; pooling is a sequential pass.
//
// Decomposition: a warp owns a row that fits in shared memory: its lanes load and write, one of
// them pools on a stack there. Longer rows, and rows so many that the device is full of them, go to
// a thread each; the stacks of neighbouring threads interleave, so that a warp touches neighbouring
// addresses as long as its rows are pooled alike. No atomics. Memory: 12 + 8 bytes per float read
// and written once; 20 bytes of stack per element. Sums and block values are double.
#include "cuda/permutahedron.h"

#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

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

// ---- A warp a row ------------------------------------------------------------------------------

// Of a row of n in shared memory: s, the stack's sums and values, its starts.
constexpr int64_t kRowBytes = 3 * sizeof(double) + sizeof(int32_t);
constexpr int64_t kMostWarpElements = 48 * 1024 / kRowBytes;
constexpr int64_t kMostWarpRows = 16 * 1024;  // beyond them a thread each fills the device

__device__ __forceinline__ int first_lane_of(unsigned votes) {
  return __ffs(int(votes)) - 1;
}

// Positions [begin, end) of the finite values; infinite ones are before and after them.
__device__ __forceinline__ void finite_range(const double* s, int n, int* begin, int* end) {
  const int lane = threadIdx.x;
  int first = n, after = 0;
  for (int i = lane; i < n; i += kWarp) {
    if (permutahedron::is_infinite(s[i])) continue;
    first = i < first ? i : first;
    after = i + 1;
  }
  *begin = warp_reduce(first, MinOp{});
  *end = -warp_reduce(-after, MinOp{});
}

template <class R, bool kCentredKl>
__global__ void __launch_bounds__(kWarp)
    permutahedron_warp_fwd_kernel(Problem p, const R* sorted, const int64_t* order, R* y,
                                  int32_t* packed) {
  using namespace permutahedron;
  if (kCentredKl) p.rank = p.kl = p.centred = true;
  PYLOSS_DYNAMIC_SHARED(double, shared);
  const int n = int(p.n), lane = threadIdx.x;
  double* s = shared;
  const Stack stack{s + n, s + 2 * n, reinterpret_cast<int32_t*>(s + 3 * n), 1};
  const int64_t at = int64_t(blockIdx.x) * n;
  const R* x = sorted + at;
  const auto put = [&](int64_t i, double v) { y[at + i] = R(v); };
  const R suspect = x[p.rank ? 0 : n - 1];
  if (suspect != suspect) {
    for (int i = lane; i < n; i += kWarp) {
      put(i, nan_<double>());
      packed[at + i] = int32_t(kStart | kElement);
    }
    return;
  }
  for (int i = lane; i < n; i += kWarp) s[i] = scaled(p, double(x[i]));
  __syncwarp();
  int begin, end;
  finite_range(s, n, &begin, &end);
  if (begin >= end) begin = end = n;  // what is infinite may change its sign once
  int depth = 0;
  if (lane == 0) depth = int(pool(p, begin, end, [&](int64_t i) { return s[i]; }, stack));
  depth = __shfl_sync(kFullMask, depth, 0);
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) {
    const int32_t element = int32_t(order[at + i]);
    if (i >= begin && i < end) {
      if (kCentredKl) continue;
      int k = 0;  // the last block that starts at i or before
      for (int step = depth; step > 0;) {
        const int half = step / 2;
        if (k + half < depth && half > 0 && stack.start[k + half] <= i) {
          k += half;
          step -= half;
        } else {
          step = half;
        }
      }
      const int a = stack.start[k], b = k + 1 < depth ? stack.start[k + 1] : end;
      put(p.rank ? element : i, output(p, a, b, i, stack.sum[k], s[a], s[i]));
      packed[at + i] = element | (i == a ? kStart : 0);
      continue;
    }
    // Infinite values of one sign make a block.
    int a = i, b = i + 1;
    while (a > 0 && s[a - 1] == s[i]) --a;
    while (b < n && s[b] == s[i]) ++b;
    put(p.rank ? element : i, p.rank ? mean_rank(p, a, b) : -s[i]);
    packed[at + i] = element | kFixed | (i == a ? kStart : 0);
  }
  if constexpr (kCentredKl) {
    for (int k = 0; k < depth; ++k) {
      const int a = stack.start[k], b = k + 1 < depth ? stack.start[k + 1] : end;
      const double top = s[a], m = mean_w(p, a, b), from_middle = mean_rank(p, a, b);
      double mean = 0;
      for (int i = a + lane; i < b; i += kWarp) mean += expm1_(s[i] - top);
      mean = warp_reduce(mean, AddOp{}) / double(b - a);
      const double scale = 1 / (1 + mean), rest = (from_middle - (m - from_middle) * mean) * scale;
      for (int i = a + lane; i < b; i += kWarp) {
        const int32_t element = int32_t(order[at + i]);
        put(element, m * scale * expm1_(s[i] - top) + rest);
        packed[at + i] = element | (i == a ? kStart : 0);
      }
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kWarp)
    permutahedron_warp_bwd_kernel(Problem p, const R* g, const R* x, const int32_t* packed, R* dx) {
  using namespace permutahedron;
  PYLOSS_DYNAMIC_SHARED(double, shared);
  const int n = int(p.n), lane = threadIdx.x;
  double *up = shared, *share = shared + n;  // by position
  int32_t* marks = reinterpret_cast<int32_t*>(shared + 2 * n);
  const int64_t at = int64_t(blockIdx.x) * n;
  if (is_nan_row(packed[at])) {
    for (int i = lane; i < n; i += kWarp) dx[at + i] = nan_<R>();
    return;
  }
  for (int i = lane; i < n; i += kWarp) {
    const int32_t mark = packed[at + i], element = mark & kElement;
    marks[i] = mark;
    up[i] = double(g[at + (p.rank ? element : i)]);
    share[i] = p.kl && (mark & kFixed) == 0 ? scaled(p, double(x[at + element])) : 0.0;
  }
  __syncwarp();
  const double scale = 1 / p.strength;
  for (int a = 0, b; a < n; a = b) {
    unsigned votes = 0;
    for (b = a + 1; b < n && votes == 0; b += kWarp) {
      votes = __ballot_sync(kFullMask, b + lane < n && marks[b + lane] < 0);
      if (votes != 0) b += first_lane_of(votes) - kWarp;
    }
    b = b < n ? b : n;
    const bool fixed = (marks[a] & kFixed) != 0;
    const double top = share[a];
    double mass = 0, sum = 0;
    for (int i = a + lane; i < b; i += kWarp) {
      const double own = p.kl && !fixed ? exp_(share[i] - top) : 1.0;
      mass += own;
      sum += p.rank ? own * up[i] : up[i];
    }
    mass = warp_reduce(mass, AddOp{});
    sum = warp_reduce(sum, AddOp{});
    const double weight = p.rank && p.kl ? sum_w(p, a, b) * scale / mass : scale;
    for (int i = a + lane; i < b; i += kWarp) {
      const double own = p.kl && !fixed ? exp_(share[i] - top) : 1.0;
      const double d =
          p.rank ? weight * (p.kl ? own : 1.0) * (up[i] - sum / mass) : sum * own / mass;
      dx[at + (marks[i] & kElement)] = R(fixed ? 0.0 : d);
    }
  }
}

bool by_warps(const Problem& p) {
  return p.n <= kMostWarpElements && p.rows <= kMostWarpRows;
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
    if (by_warps(p)) {
      auto* kernel = permutahedron::is_centred_kl(p) ? permutahedron_warp_fwd_kernel<R, true>
                                                     : permutahedron_warp_fwd_kernel<R, false>;
      launch(kernel, dim3(grid_size(p.rows)), dim3(kWarp), size_t(p.n * kRowBytes), stream, p,
             static_cast<const R*>(sorted), order, static_cast<R*>(y), packed);
      return;
    }
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
    if (by_warps(p)) {
      launch(permutahedron_warp_bwd_kernel<R>, dim3(grid_size(p.rows)), dim3(kWarp),
             size_t(p.n * kRowBytes), stream, p, static_cast<const R*>(g), static_cast<const R*>(x),
             packed, static_cast<R*>(dx));
      return;
    }
    launch(permutahedron_bwd_kernel<R>, dim3(grid_size(ceil_div(p.rows, kThreads))), dim3(kThreads),
           0, stream, p, static_cast<const R*>(g), static_cast<const R*>(x), packed,
           static_cast<R*>(dx));
  });
}

}  // namespace pyloss::cuda
