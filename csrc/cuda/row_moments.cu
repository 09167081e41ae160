// Moments of rows on the GPU: formulas in common/row_moments.h.
//
// Decomposition: a team, a warp or a block, owns a row whose classes are adjacent, and walks it by
// vectors of 16 bytes. A vector has a mean and squares around it; vectors merge into a thread's
// part, parts into the row, in an order that depends on the team's size only. Rows whose classes
// are apart go by tiles: 32 adjacent positions a warp, the classes shared out among the warps of
// the block. The gradient needs no row as a whole: blocks take columns of rows.
//
// Memory traffic per score of b bytes: forward reads b, backward reads b and writes b. No scratch
// memory, no atomics. A few rows of very many classes leave most of the device idle in the forward.
// A label that is no class gives its row NaN. Accumulator: float, double for double scores.
#include "cuda/row_moments.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {
namespace {

using namespace row_moments;

constexpr int kTeamsOfWarps = 4;  // of one warp each, in a block
constexpr int kLongTeam = 512;
constexpr int kTileWarps = 8;
constexpr int kVectorsPerThread = 8;  // of the backward: columns of a block

// Where whole vectors of a row are: after `head` elements, `vectors` of them.
template <class T>
struct Span {
  int64_t head, vectors;

  __device__ Span(const T* x, int64_t n) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(x) % 16);
    head = misaligned == 0 ? 0 : (16 - misaligned) / int64_t(sizeof(T));
    head = head < n ? head : n;
    vectors = (n - head) / kVec<T>;
  }
};

template <class T>
__device__ __forceinline__ void load_vector(const T* x, RealOf<T>* v) {
  unpack<T>(*reinterpret_cast<const uint4*>(x), v);
}

template <class R>
__device__ __forceinline__ Part<R> single(R x) {
  return {R(1), x, R(0)};
}

template <class T, class R = RealOf<T>>
__device__ __forceinline__ Part<R> part_of(const R* v) {
  R sum = 0, m2 = 0;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum += v[i];
  const R mean = sum / R(kVec<T>);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) m2 += (v[i] - mean) * (v[i] - mean);
  return {R(kVec<T>), mean, m2};
}

// Lane 0 gets the part of its warp.
template <class R>
__device__ __forceinline__ Part<R> warp_merge(Part<R> a) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Part<R> b{__shfl_xor_sync(kFullMask, a.n, step), __shfl_xor_sync(kFullMask, a.mean, step),
                    __shfl_xor_sync(kFullMask, a.m2, step)};
    a = merge(a, b);
  }
  return a;
}

// Thread 0 of the team gets the part of the team: that of a warp, or of a whole block.
template <class R>
__device__ __forceinline__ Part<R> team_merge(Part<R> a, R (*slots)[3]) {
  a = warp_merge(a);
  if (blockDim.x <= kWarp) return a;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
    slots[warp][0] = a.n;
    slots[warp][1] = a.mean;
    slots[warp][2] = a.m2;
  }
  __syncthreads();
  if (warp > 0) return a;
  const bool is_there = lane < int(blockDim.x) / kWarp;
  const Part<R> b = is_there ? Part<R>{slots[lane][0], slots[lane][1], slots[lane][2]} : Part<R>{};
  return warp_merge(b);
}

enum class Label { kClass, kIgnored, kNone };

__device__ __forceinline__ Label label_of(const Problem& p, int64_t row, int64_t* y) {
  *y = load_index(p.target, p.target_dtype, row);
  if (*y == p.ignore_index) return Label::kIgnored;
  return in_range(*y, p.classes) ? Label::kClass : Label::kNone;
}

// `x` is the row, whose classes are `step` apart.
template <class T>
__device__ __forceinline__ void store_moments(const Problem& p, void* moments, int64_t row,
                                              const T* x, int64_t step,
                                              const Part<RealOf<T>>& all) {
  using R = RealOf<T>;
  int64_t y;
  const Label label = label_of(p, row, &y);
  if (label == Label::kIgnored) {
    store<R>(moments, p.rows(), row, 0, 0, 0);
  } else if (label == Label::kNone) {
    store<R>(moments, p.rows(), row, nan_<double>(), nan_<double>(), nan_<double>());
  } else {
    store<R>(moments, p.rows(), row, double(to_real(x[y * step])), double(all.mean),
             double(all.m2) / double(p.classes));
  }
}

// ---- Rows of adjacent classes ------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kLongTeam) row_moments_fwd_kernel(Problem p, void* moments) {
  using R = RealOf<T>;
  __shared__ R slots[kMaxWarps][3];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows()) return;  // all of a team
  const T* x = static_cast<const T*>(p.x) + offset_of(p.x_strides, p.inner, row);
  const Span<T> span(x, p.classes);
  const T* vectors = x + span.head;
  Part<R> part{};
  if (threadIdx.x < span.head) part = single(to_real(x[threadIdx.x]));
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < span.vectors; i += blockDim.x) {
    R v[kVec<T>];
    load_vector(vectors + i * kVec<T>, v);
    part = merge(part, part_of<T>(v));
  }
  const int64_t at = span.head + span.vectors * kVec<T> + threadIdx.x;
  if (at < p.classes) part = merge(part, single(to_real(x[at])));
  part = team_merge(part, slots);
  if (threadIdx.x == 0) store_moments(p, moments, row, x, 1, part);
}

// Columns [begin, end) of a row by the team.
template <class T>
__global__ void __launch_bounds__(kLongTeam)
    row_moments_bwd_kernel(Problem p, Backward b, int64_t columns) {
  using R = RealOf<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows()) return;
  const int64_t begin = int64_t(blockIdx.y) * columns;
  const int64_t end = begin + columns < p.classes ? begin + columns : p.classes;
  const T* x = static_cast<const T*>(p.x) + offset_of(p.x_strides, p.inner, row);
  T* out = static_cast<T*>(b.out) + offset_of(b.out_strides, p.inner, row);
  int64_t y;
  const Label label = label_of(p, row, &y);
  if (label == Label::kIgnored) {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) out[i] = T{};
    return;
  }
  const auto c = coeffs<R>(p, b, row);
  const auto one = [&](int64_t i) {
    const R d = gradient(c, R(to_real(x[i])));
    out[i] = from_real<T>(i == y ? d + c.target : d);
  };
  const Span<T> span(x + begin, end - begin);
  const int64_t first = begin + span.head, rest = first + span.vectors * kVec<T>;
  if (reinterpret_cast<uintptr_t>(out + first) % 16 != 0) {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) one(i);
    return;
  }
  if (threadIdx.x < span.head) one(begin + threadIdx.x);
  for (int64_t i = threadIdx.x; i < span.vectors; i += blockDim.x) {
    const int64_t at = first + i * kVec<T>;
    R v[kVec<T>];
    load_vector(x + at, v);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      v[j] = gradient(c, v[j]);
      if (at + j == y) v[j] += c.target;
    }
    *reinterpret_cast<uint4*>(out + at) = pack<T>(v);
  }
  if (rest + threadIdx.x < end) one(rest + threadIdx.x);
}

// ---- Tiles of positions ------------------------------------------------------------------------

// Position of this lane, and its row; false behind the last.
__device__ __forceinline__ bool position(const Problem& p, int64_t* outer, int64_t* inner) {
  const int64_t tiles = (p.inner + kWarp - 1) / kWarp;
  *outer = int64_t(blockIdx.x) / tiles;
  *inner = int64_t(blockIdx.x) % tiles * kWarp + threadIdx.x;
  return *inner < p.inner;
}

template <class T>
__global__ void __launch_bounds__(kWarp* kTileWarps)
    row_moments_tile_fwd_kernel(Problem p, void* moments) {
  using R = RealOf<T>;
  __shared__ R slots[kTileWarps][3][kWarp];
  int64_t outer, inner;
  const bool is_there = position(p, &outer, &inner);
  const int64_t at = is_there ? outer * p.x_strides.outer + inner * p.x_strides.inner : 0;
  const T* x = static_cast<const T*>(p.x) + at;
  Part<R> part{};
  for (int64_t c = threadIdx.y; is_there && c < p.classes; c += kTileWarps) {
    part = merge(part, single(R(to_real(x[c * p.x_strides.cls]))));
  }
  slots[threadIdx.y][0][threadIdx.x] = part.n;
  slots[threadIdx.y][1][threadIdx.x] = part.mean;
  slots[threadIdx.y][2][threadIdx.x] = part.m2;
  __syncthreads();
  if (threadIdx.y > 0 || !is_there) return;
  for (int w = 1; w < kTileWarps; ++w) {
    part = merge(part, Part<R>{slots[w][0][threadIdx.x], slots[w][1][threadIdx.x],
                               slots[w][2][threadIdx.x]});
  }
  store_moments(p, moments, outer * p.inner + inner, x, p.x_strides.cls, part);
}

template <class T>
__global__ void __launch_bounds__(kWarp* kTileWarps)
    row_moments_tile_bwd_kernel(Problem p, Backward b) {
  using R = RealOf<T>;
  int64_t outer, inner;
  if (!position(p, &outer, &inner)) return;
  const int64_t row = outer * p.inner + inner, step = int64_t(gridDim.y) * kTileWarps;
  const T* x = static_cast<const T*>(p.x) + outer * p.x_strides.outer + inner * p.x_strides.inner;
  T* out = static_cast<T*>(b.out) + outer * b.out_strides.outer + inner * b.out_strides.inner;
  int64_t y;
  const bool ignored = label_of(p, row, &y) == Label::kIgnored;
  const auto k = coeffs<R>(p, b, row);
  for (int64_t c = int64_t(blockIdx.y) * kTileWarps + threadIdx.y; c < p.classes; c += step) {
    R d = gradient(k, R(to_real(x[c * p.x_strides.cls])));
    if (c == y) d += k.target;
    out[c * b.out_strides.cls] = ignored ? T{} : from_real<T>(d);
  }
}

// ---- Launches ----------------------------------------------------------------------------------

bool adjacent(const Problem& p, const Strides& s) {
  return p.classes == 1 || s.cls == 1;
}

// A row to a team of `threads`, `teams` teams a block.
struct Shape {
  int threads, teams;
};
Shape shape_of(const Problem& p) {
  if (p.classes <= 1024) return {kWarp, kTeamsOfWarps};
  return {p.classes <= 4096 ? 128 : p.classes <= 16384 ? 256 : kLongTeam, 1};
}

unsigned tiles_of(const Problem& p) {
  return grid_size(p.outer * ceil_div(p.inner, kWarp));
}

}  // namespace

void row_moments_forward(const Problem& p, void* moments, void* stream) {
  if (p.rows() == 0) return;
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!adjacent(p, p.x_strides)) {
      launch(row_moments_tile_fwd_kernel<T>, dim3(tiles_of(p)), dim3(kWarp, kTileWarps), 0, stream,
             p, moments);
      return;
    }
    const Shape s = shape_of(p);
    launch(row_moments_fwd_kernel<T>, dim3(grid_size(ceil_div(p.rows(), s.teams))),
           dim3(unsigned(s.threads), unsigned(s.teams)), 0, stream, p, moments);
  });
}

void row_moments_backward(const Problem& p, const Backward& b, void* stream) {
  if (p.rows() == 0) return;
  constexpr int64_t kMostSplits = 65535;  // of the second grid dimension
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!adjacent(p, p.x_strides) || !adjacent(p, b.out_strides)) {
      const int64_t splits = std::min<int64_t>(ceil_div(p.classes, kTileWarps * 8), kMostSplits);
      launch(row_moments_tile_bwd_kernel<T>, dim3(tiles_of(p), unsigned(splits)),
             dim3(kWarp, kTileWarps), 0, stream, p, b);
      return;
    }
    const Shape s = shape_of(p);
    int64_t columns = int64_t(s.threads) * kVec<T> * kVectorsPerThread;
    columns = std::max(columns, ceil_div(p.classes, kMostSplits));
    launch(row_moments_bwd_kernel<T>,
           dim3(grid_size(ceil_div(p.rows(), s.teams)), unsigned(ceil_div(p.classes, columns))),
           dim3(unsigned(s.threads), unsigned(s.teams)), 0, stream, p, b, columns);
  });
}

}  // namespace pyloss::cuda
