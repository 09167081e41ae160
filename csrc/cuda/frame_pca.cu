// Principal axes of clouds of points on the GPU. Formulas: common/frame_pca.h.
//
// Decomposition: a team (one warp for small clouds, one block for large ones) owns a cloud and goes
// through its points twice, the second time in the caches: the centre, then the products around it.
// A block of warps sums kGroup clouds, a few for each warp, and then one warp solves their
// eigenproblems, one to a lane. In the backward every thread of a team works out the slope of its
// cloud, a few products, and takes some of its points; large clouds go to several blocks.
//
// Memory traffic per coordinate of b bytes: forward reads b, backward reads b and writes b.
//
// Numerics: float (double for double points).
// Paper: Puny et al. arXiv 2110.03336.
#include "cuda/frame_pca.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {
namespace {

using namespace frame_pca;

constexpr int kWarps = 8, kTeam = 256;
constexpr int kGroup = kWarp;            // clouds of a block of warps
constexpr int64_t kWarpPoints = 2048;    // a cloud of more, on average, is a block's
constexpr int64_t kSplitPoints = 16384;  // of a large cloud in the backward, to a block

// Points of a cloud, as a team walks them.
template <class T, int D>
struct Walk {
  using R = RealOf<T>;
  const T* x;
  const R* weight;
  int64_t begin, end;

  __device__ Walk(const Problem& p, int64_t cloud)
      : x(static_cast<const T*>(p.x)),
        weight(static_cast<const R*>(p.weight)),
        begin(bound_of(p, cloud)),
        end(bound_of(p, cloud + 1)) {}

  __device__ __forceinline__ R load(int64_t i, R* point) const {
    const R w = weight ? weight[i] : R(1);
#pragma unroll
    for (int k = 0; k < D; ++k) point[k] = counted(R(to_real(x[i * D + k])), w);
    return w;
  }
};

template <int N, class R>
__device__ __forceinline__ void team_sum(R (&v)[N], R (*slots)[kMaxWarps]) {
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = warp_reduce(v[k], AddOp{});
  if (blockDim.x <= kWarp) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < N; ++k) slots[k][warp] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    v[k] = warp_reduce(lane < int(blockDim.x) / kWarp ? slots[k][lane] : R(0), AddOp{});
  }
}

// Clouds [group * blockIdx.x, ...): a team of blockDim.x threads takes every blockDim.y-th.
template <class T, int D>
__global__ void __launch_bounds__(kTeam)
    frame_pca_fwd_kernel(Problem p, RealOf<T>* frames, int group) {
  using R = RealOf<T>;
  using At = Row<D>;
  __shared__ R products[kTriangle<D>][kGroup];
  __shared__ R slots[D + 1 + D + kTriangle<D>][kMaxWarps];
  const int64_t first = int64_t(blockIdx.x) * group;
  const int count = int(p.clouds - first < group ? p.clouds - first : group);
  for (int c = threadIdx.y; c < count; c += int(blockDim.y)) {
    const Walk<T, D> walk(p, first + c);
    R sums[D + 1] = {};
    for (int64_t i = walk.begin + threadIdx.x; i < walk.end; i += blockDim.x) {
      R x[D];
      const R w = walk.load(i, x);
      sums[D] += w;
#pragma unroll
      for (int k = 0; k < D; ++k) sums[k] += w * x[k];
    }
    team_sum(sums, slots);
    const R total = sums[D];
    const bool moved = p.centred && total != 0;
    R centre[D], around[D + kTriangle<D>] = {};
#pragma unroll
    for (int k = 0; k < D; ++k) centre[k] = moved ? sums[k] / total : R(0);
    for (int64_t i = walk.begin + threadIdx.x; i < walk.end; i += blockDim.x) {
      R x[D];
      const R w = walk.load(i, x);
#pragma unroll
      for (int k = 0; k < D; ++k) x[k] -= centre[k];
#pragma unroll
      for (int k = 0; k < D; ++k) {
        around[k] += w * x[k];
#pragma unroll
        for (int j = k; j < D; ++j) around[D + entry<D>(k, j)] += w * x[k] * x[j];
      }
    }
    team_sum(around, slots + D + 1);
    if (threadIdx.x > 0) continue;
    R* row = frames + (first + c) * At::kWidth;
#pragma unroll
    for (int k = 0; k < D; ++k) {
      row[At::kCentre + k] = moved ? centre[k] + around[k] / total : R(0);  // what the mean lost
    }
    row[At::kTotal] = total;
#pragma unroll
    for (int k = 0; k < kTriangle<D>; ++k) products[k][c] = around[D + k];
  }
  __syncthreads();
  if (threadIdx.y > 0 || int(threadIdx.x) >= count) return;
  Axes<R, D, 1> axes;
#pragma unroll
  for (int k = 0; k < kTriangle<D>; ++k) axes.c[k][0] = products[k][threadIdx.x];
  axes.solve();
  R* row = frames + (first + threadIdx.x) * At::kWidth;
#pragma unroll
  for (int i = 0; i < D; ++i) {
#pragma unroll
    for (int j = 0; j < D; ++j) row[At::kAxes + i * D + j] = axes.v[i][j][0];
    row[At::kValues + i] = axes.value[i][0];
  }
}

// Points of a cloud by a team, and by all blocks along y.
template <class T, int D>
__global__ void __launch_bounds__(kTeam) frame_pca_bwd_kernel(Problem p, Backward b) {
  using R = RealOf<T>;
  const int64_t cloud = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (cloud >= p.clouds) return;
  const Walk<T, D> walk(p, cloud);
  const Slope<R, D> slope(static_cast<const R*>(b.frames) + cloud * Row<D>::kWidth,
                          static_cast<const R*>(b.grad) + cloud * Row<D>::kWidth, p.centred,
                          b.tolerance);
  T* dx = static_cast<T*>(b.dx);
  R* dw = static_cast<R*>(b.dw);
  const int64_t step = int64_t(gridDim.y) * blockDim.x;
  for (int64_t i = walk.begin + int64_t(blockIdx.y) * blockDim.x + threadIdx.x; i < walk.end;
       i += step) {
    R x[D], found[D];
    const R w = walk.load(i, x), of_weight = slope.point(x, w, found);
#pragma unroll
    for (int k = 0; k < D; ++k) dx[i * D + k] = from_real<T>(found[k]);
    if (dw) dw[i] = of_weight;
  }
}

// How clouds are shared out. Offsets are on the device, so the average decides.
struct Shape {
  int64_t each;
  bool small;

  explicit Shape(const Problem& p) : each(p.points / p.clouds), small(each <= kWarpPoints) {}
  dim3 block() const { return small ? dim3(kWarp, kWarps) : dim3(kTeam, 1); }
};

}  // namespace

void frame_pca_forward(const Problem& p, void* frames, void* stream) {
  if (p.clouds == 0) return;
  const Shape s(p);
  const int group = s.small ? kGroup : 1;
  dispatch(p, [&](auto zero, auto dim) {
    using T = decltype(zero);
    launch(frame_pca_fwd_kernel<T, dim()>, dim3(grid_size(ceil_div(p.clouds, group))), s.block(), 0,
           stream, p, static_cast<RealOf<T>*>(frames), group);
  });
}

void frame_pca_backward(const Problem& p, const Backward& b, void* stream) {
  if (p.clouds == 0 || p.points == 0) return;
  constexpr int64_t kMostSplits = 65535;  // of the second grid dimension
  const Shape s(p);
  const unsigned blocks = grid_size(s.small ? ceil_div(p.clouds, kWarps) : p.clouds);
  const unsigned splits =
      s.small ? 1 : unsigned(std::min(ceil_div(s.each, kSplitPoints), kMostSplits));
  dispatch(p, [&](auto zero, auto dim) {
    launch(frame_pca_bwd_kernel<decltype(zero), dim()>, dim3(blocks, splits), s.block(), 0, stream,
           p, b);
  });
}

}  // namespace pyloss::cuda
