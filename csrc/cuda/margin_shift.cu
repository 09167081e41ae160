// How far margins moved between two sets of logits, on the GPU. Formulas: common/margin_shift.h.
//
// Decomposition: a team (a warp, or a block for longer rows) owns a row whose classes are
// neighbours, each lane vectors of 16 bytes where all rows begin at one, else single classes. Where
// classes lie apart, a thread owns a row, and neighbouring threads read neighbouring positions. The
// sum that the label's entry of a gradient needs is the forward's, so that a backward waits for
// nothing. No atomics.
//
// Memory traffic per class, b bytes a logit: forward reads 2 b; backward reads 2 b and writes 2 b,
// or b where one gradient alone is wanted.
//
// Numerics: float (double for doubles).
#include "cuda/margin_shift.h"

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {
namespace {

using margin_shift::Backward;
using margin_shift::Problem;

constexpr int kMostThreads = 256;
constexpr int kTeams = 4;  // of a block, where each is a warp
constexpr int kFold = 64;

__device__ __forceinline__ int64_t offset_of(const Problem& p, const Strides& s, int64_t row) {
  if (p.inner == 1) return row * s.outer;
  if (p.outer == 1) return row * s.inner;  // no 64-bit division
  return row / p.inner * s.outer + row % p.inner * s.inner;
}

// A row of both sets of logits, and where its gradients go.
template <class T>
struct Row {
  using R = RealOf<T>;
  int64_t y;
  const T *x, *a;
  int64_t x_step, a_step;
  R ey;

  __device__ __forceinline__ Row(const Problem& p, int64_t row)
      : y(margin_shift::label_of(p, row)),
        x(static_cast<const T*>(p.x) + offset_of(p, p.x_strides, row)),
        a(static_cast<const T*>(p.adv) + offset_of(p, p.adv_strides, row)),
        x_step(p.x_strides.cls),
        a_step(p.adv_strides.cls),
        ey(y < 0 ? R(0) : moved(y)) {}

  __device__ __forceinline__ R moved(int64_t c) const {
    return to_real(a[c * a_step]) - to_real(x[c * x_step]);
  }
};

// e of V neighbouring classes; 0 = e_y - e_y beyond the last one.
template <int V, class T>
__device__ __forceinline__ void moved_of(const Row<T>& row, int64_t c, int64_t classes,
                                         RealOf<T>* e) {
  using R = RealOf<T>;
  if constexpr (V > 1) {
    if (c + V <= classes) {
      R x[V];
      unpack<T>(*reinterpret_cast<const uint4*>(row.x + c), x);
      unpack<T>(*reinterpret_cast<const uint4*>(row.a + c), e);
#pragma unroll
      for (int i = 0; i < V; ++i) e[i] -= x[i];
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) e[i] = c + i < classes ? row.moved(c + i) : row.ey;
}

template <int V, class T>
__device__ __forceinline__ void put(T* out, int64_t c, int64_t classes, const RealOf<T>* v) {
  if constexpr (V > 1) {
    if (c + V <= classes) {
      *reinterpret_cast<uint4*>(out + c) = pack<T>(v);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (c + i < classes) out[c + i] = from_real<T>(v[i]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    margin_shift_fwd_kernel(Problem p, RealOf<T>* shift, RealOf<T>* total) {
  using R = RealOf<T>;
  __shared__ R slots[2][kMaxWarps];
  const int64_t at = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (at >= p.rows()) return;
  const Row<T> row(p, at);
  if (row.y < 0) {
    if (threadIdx.x == 0) shift[at] = total[at] = margin_shift::unlabelled<R>(row.y);
    return;
  }
  R squares = 0, sum = 0;
#pragma unroll 2
  for (int64_t c = int64_t(threadIdx.x) * V; c < p.classes; c += int64_t(blockDim.x) * V) {
    R e[V];
    moved_of<V>(row, c, p.classes, e);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const R d = row.ey - e[i];
      squares += d * d;
      sum += d;
    }
  }
  squares = team_reduce(squares, AddOp{}, R(0), slots[0]);
  sum = team_reduce(sum, AddOp{}, R(0), slots[1]);
  if (threadIdx.x == 0) {
    shift[at] = margin_shift::result_of(p, squares);
    total[at] = sum;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads) margin_shift_bwd_kernel(Problem p, Backward b) {
  using R = RealOf<T>;
  const int64_t at = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (at >= p.rows()) return;
  const Row<T> row(p, at);
  T* dx = b.dx ? static_cast<T*>(b.dx) + offset_of(p, b.dx_strides, at) : nullptr;
  T* da = b.dadv ? static_cast<T*>(b.dadv) + offset_of(p, b.dadv_strides, at) : nullptr;
  const bool labelled = row.y >= 0;  // else the row is not read
  const R c = labelled ? margin_shift::factor_of<R>(p, b, at) : R(0);
  const R label = labelled ? c * static_cast<const R*>(b.total)[at] : R(0);
  const R other = margin_shift::unlabelled<R>(row.y);
#pragma unroll 2
  for (int64_t j = int64_t(threadIdx.x) * V; j < p.classes; j += int64_t(blockDim.x) * V) {
    R e[V];
    if (labelled) moved_of<V>(row, j, p.classes, e);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      e[i] = !labelled ? other : j + i == row.y ? label : c * (e[i] - row.ey);
    }
    if (da) put<V>(da, j, p.classes, e);
    if (dx) {
#pragma unroll
      for (int i = 0; i < V; ++i) e[i] = -e[i];
      put<V>(dx, j, p.classes, e);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    margin_shift_alone_fwd_kernel(Problem p, RealOf<T>* shift, RealOf<T>* total) {
  using R = RealOf<T>;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.rows()) return;
  const Row<T> row(p, at);
  if (row.y < 0) {
    shift[at] = total[at] = margin_shift::unlabelled<R>(row.y);
    return;
  }
  R squares = 0, sum = 0;
  for (int64_t first = 0; first < p.classes; first += kFold) {
    R part = 0, part_sum = 0;
    const int64_t end = first + kFold < p.classes ? first + kFold : p.classes;
#pragma unroll 4
    for (int64_t c = first; c < end; ++c) {
      const R d = row.ey - row.moved(c);
      part += d * d;
      part_sum += d;
    }
    squares += part;
    sum += part_sum;
  }
  shift[at] = margin_shift::result_of(p, squares);
  total[at] = sum;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    margin_shift_alone_bwd_kernel(Problem p, Backward b) {
  using R = RealOf<T>;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.rows()) return;
  const Row<T> row(p, at);
  T* dx = b.dx ? static_cast<T*>(b.dx) + offset_of(p, b.dx_strides, at) : nullptr;
  T* da = b.dadv ? static_cast<T*>(b.dadv) + offset_of(p, b.dadv_strides, at) : nullptr;
  const bool labelled = row.y >= 0;
  const R c = labelled ? margin_shift::factor_of<R>(p, b, at) : R(0);
  const R label = labelled ? c * static_cast<const R*>(b.total)[at] : R(0);
  const R other = margin_shift::unlabelled<R>(row.y);
#pragma unroll 4
  for (int64_t j = 0; j < p.classes; ++j) {
    const R v = !labelled ? other : j == row.y ? label : c * (row.moved(j) - row.ey);
    if (da) da[j * b.dadv_strides.cls] = from_real<T>(v);
    if (dx) dx[j * b.dx_strides.cls] = from_real<T>(-v);
  }
}

// Whether every row of a tensor begins at a multiple of 16 bytes. Absent: nothing stands against
// it.
bool aligned(const void* base, const Strides& s, const Problem& p) {
  if (!base) return true;
  const int64_t vector = 16 / dtype_size(p.dtype);
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (p.outer == 1 || s.outer % vector == 0) &&
         (p.inner == 1 || s.inner % vector == 0);
}

bool neighbours(const void* base, const Strides& s) {
  return !base || s.cls == 1;
}

// fn(vectors, grid, block) with the shape of a launch in which teams own rows.
template <class T, class Fn>
void by_teams(const Problem& p, bool vectors, const Fn& fn) {
  const int64_t steps = ceil_div(p.classes, vectors ? kVec<T> : 1);
  const int threads = steps <= 8 * kWarp ? kWarp : steps <= 32 * kWarp ? 128 : kMostThreads;
  const int teams = threads == kWarp ? kTeams : 1;
  fn(dim3(grid_size(ceil_div(p.rows(), teams))), dim3(unsigned(threads), unsigned(teams)));
}

dim3 grid_alone(const Problem& p) {
  return dim3(grid_size(ceil_div(p.rows(), kMostThreads)));
}

}  // namespace

void margin_shift_forward(const Problem& p, void* shift, void* total, void* stream) {
  if (p.rows() == 0 || p.classes == 0) return;
  const bool vectors = aligned(p.x, p.x_strides, p) && aligned(p.adv, p.adv_strides, p);
  const bool teams = neighbours(p.x, p.x_strides) && neighbours(p.adv, p.adv_strides);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    auto* shifts = static_cast<RealOf<T>*>(shift);
    auto* totals = static_cast<RealOf<T>*>(total);
    if (!teams) {
      launch(margin_shift_alone_fwd_kernel<T>, grid_alone(p), dim3(kMostThreads), 0, stream, p,
             shifts, totals);
      return;
    }
    by_teams<T>(p, vectors, [&](dim3 grid, dim3 block) {
      auto* kernel = vectors ? margin_shift_fwd_kernel<T, kVec<T>> : margin_shift_fwd_kernel<T, 1>;
      launch(kernel, grid, block, 0, stream, p, shifts, totals);
    });
  });
}

void margin_shift_backward(const Problem& p, const Backward& b, void* stream) {
  if (p.rows() == 0 || p.classes == 0) return;
  const bool vectors = aligned(p.x, p.x_strides, p) && aligned(p.adv, p.adv_strides, p) &&
                       aligned(b.dx, b.dx_strides, p) && aligned(b.dadv, b.dadv_strides, p);
  const bool teams = neighbours(p.x, p.x_strides) && neighbours(p.adv, p.adv_strides) &&
                     neighbours(b.dx, b.dx_strides) && neighbours(b.dadv, b.dadv_strides);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (!teams) {
      launch(margin_shift_alone_bwd_kernel<T>, grid_alone(p), dim3(kMostThreads), 0, stream, p, b);
      return;
    }
    by_teams<T>(p, vectors, [&](dim3 grid, dim3 block) {
      auto* kernel = vectors ? margin_shift_bwd_kernel<T, kVec<T>> : margin_shift_bwd_kernel<T, 1>;
      launch(kernel, grid, block, 0, stream, p, b);
    });
  });
}

}  // namespace pyloss::cuda
