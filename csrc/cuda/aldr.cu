// ALDR-KL on the GPU. Formulas: common/aldr.h.
//
// Decomposition: a team (one warp for short rows, one block for longer ones) owns a row. It reads
// it once into shared memory, where every thread goes through its own classes again for each pass
// of the search for lambda and for the gradient: no barrier but those of the sums. Rows that do not
// fit are read again, from the second-level cache. The search itself is the same in all threads:
// sums end with the same bits everywhere.
//
// Memory traffic per score of b bytes: read b, and write b for the gradient in the forward; the
// backward reads b and writes b.
//
// Numerics: float (double for double scores).
// Paper: Zhu, Ying, Yang, arXiv 2112.14869.
#include "cuda/aldr.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {
namespace {

using aldr::Problem;

constexpr int kTeam = 256, kWarpTeams = 4;
constexpr int64_t kWarpClasses = 1024;  // a row of more is a block's

// A row as a team walks it.
template <class T>
struct Walk {
  const T* x;
  T* kept;  // or null
  int classes, label;

  template <class Fn>
  __device__ void read(const Fn& fn) const {
    for (int c = threadIdx.x; c < classes; c += int(blockDim.x)) {
      const T v = x[c];
      if (kept) kept[c] = v;
      fn(c, to_real(v));
    }
  }
  template <class Fn>
  __device__ void again(const Fn& fn) const {
    const T* from = kept ? kept : x;
    for (int c = threadIdx.x; c < classes; c += int(blockDim.x)) fn(c, to_real(from[c]));
  }
};

// Two sets of slots, used in turn: the barrier of one sum parts the two uses of the other's.
template <class R>
struct Slots {
  R sums[2][3][kMaxWarps];
};

template <class R>
__device__ aldr::Moments<R> team_sum(aldr::Moments<R> m, R (&slots)[3][kMaxWarps]) {
  m.s0 = warp_reduce(m.s0, AddOp{});
  m.s1 = warp_reduce(m.s1, AddOp{});
  m.s2 = warp_reduce(m.s2, AddOp{});
  if (blockDim.x <= kWarp) return m;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    slots[0][warp] = m.s0;
    slots[1][warp] = m.s1;
    slots[2][warp] = m.s2;
  }
  __syncthreads();
  const bool mine = lane < int(blockDim.x) / kWarp;
  m.s0 = warp_reduce(mine ? slots[0][lane] : R(0), AddOp{});
  m.s1 = warp_reduce(mine ? slots[1][lane] : R(0), AddOp{});
  m.s2 = warp_reduce(mine ? slots[2][lane] : R(0), AddOp{});
  return m;
}

template <class T, class R>
__device__ aldr::Moments<R> pass_at(const Walk<T>& walk, const aldr::Row<R>& r, R lambda,
                                    R (&slots)[3][kMaxWarps]) {
  const R slope = r.scale / lambda;
  aldr::Moments<R> m;
  walk.again([&](int c, R v) {
    if (c == walk.label) return;
    const R u = (v - r.top) * slope, bounded = fmax_(u, R(-1e4));  // 0 * -inf
    const R e = exp_fast(u), w = e * bounded;
    m.s0 += e;
    m.s1 += w;
    m.s2 += w * bounded;
  });
  return team_sum(m, slots);
}

template <class T>
__device__ void write_gradient(const Walk<T>& walk, const aldr::Coeffs<RealOf<T>>& k, T* out) {
  using R = RealOf<T>;
  walk.again([&](int c, R v) {
    const R g = c == walk.label ? k.l : k.a * exp_fast((v - k.top) * k.slope);
    out[c] = from_real<T>(g - (k.f == 0 ? R(0) : k.f * aldr::sign(v)));
  });
}

template <class T>
__device__ void fill(T* out, int classes, RealOf<T> value) {
  for (int c = threadIdx.x; c < classes; c += int(blockDim.x)) out[c] = from_real<T>(value);
}

template <class T>
__global__ void __launch_bounds__(kTeam, 1)
    aldr_fwd_kernel(Problem p, RealOf<T>* stats, const RealOf<T>* factor, T* grad, int kept) {
  using R = RealOf<T>;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ Slots<R> slots;
  __shared__ R abs_slots[kMaxWarps], top_slots[kMaxWarps];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // the whole team returns together, here and below
  const int classes = int(p.classes);
  T* out = grad ? grad + row * classes : nullptr;
  const int64_t y = p.target[row];
  if (y == p.ignore_index) {
    if (threadIdx.x == 0) aldr::store_ignored(p, stats, row);
    if (out) fill(out, classes, R(0));
    return;
  }
  if (y < 0 || y >= p.classes) {
    if (threadIdx.x < aldr::kStatCount) stats[int(threadIdx.x) * p.rows + row] = nan_<R>();
    if (out) fill(out, classes, nan_<R>());
    return;
  }
  const Walk<T> walk{static_cast<const T*>(p.x) + row * classes,
                     kept ? reinterpret_cast<T*>(shared) + int(threadIdx.y) * kept : nullptr,
                     classes, int(y)};
  R sum_abs = 0, others = -infinity_<R>();
  walk.read([&](int c, R v) {
    sum_abs += v < 0 ? -v : v;
    if (c != walk.label) others = fmax_(others, v);
  });
  sum_abs = team_reduce(sum_abs, AddOp{}, R(0), abs_slots);
  others = team_reduce(others, MaxOp{}, -infinity_<R>(), top_slots);
  const aldr::Row<R> r(p, others, to_real(walk.x[y]), sum_abs);
  const R log_classes = log_(R(classes));

  aldr::Search<R> search(p, log_classes);
  R lambda;
  aldr::Moments<R> m;
  if (p.start) {
    const R before = static_cast<const R*>(p.start)[row];
    const aldr::Pass<R> pass(pass_at(walk, r, before, slots.sums[0]), label_exponent(r, before));
    lambda = search.plain_step(pass.divergence(log_classes));
    m = pass_at(walk, r, lambda, slots.sums[1]);
  } else {
    int turn = 0;
    bool more = true;
    while (more) {
      m = pass_at(walk, r, search.lambda, slots.sums[turn]);
      turn = 1 - turn;
      const R u = label_exponent(r, search.lambda);
      const aldr::Pass<R> pass(m, u);
      more = search.move(pass.divergence(log_classes), pass.variance(m, u));
    }
    lambda = search.lambda;
  }
  R own[aldr::kStatCount];
  aldr::store_row(p, r, m, lambda, log_classes, own, 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < aldr::kStatCount; ++i) stats[i * p.rows + row] = own[i];
  }
  if (out) write_gradient(walk, aldr::Coeffs<R>(p, own, 1, factor[row]), out);
}

template <class T>
__global__ void __launch_bounds__(kTeam)
    aldr_bwd_kernel(Problem p, const RealOf<T>* stats, const RealOf<T>* factor, T* grad) {
  using R = RealOf<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int classes = int(p.classes);
  T* out = grad + row * classes;
  const int64_t y = p.target[row];
  if (y == p.ignore_index) return fill(out, classes, R(0));
  if (y < 0 || y >= p.classes) return fill(out, classes, nan_<R>());
  const Walk<T> walk{static_cast<const T*>(p.x) + row * classes, nullptr, classes, int(y)};
  write_gradient(walk, aldr::Coeffs<R>(p, stats + row, p.rows, factor[row]), out);
}

// How rows are shared out: threads of a team, teams of a block.
struct Shape {
  int threads, teams;

  explicit Shape(const Problem& p)
      : threads(p.classes <= kWarpClasses ? kWarp : kTeam),
        teams(threads == kWarp ? kWarpTeams : 1) {}
  dim3 grid(const Problem& p) const { return dim3(grid_size(ceil_div(p.rows, teams))); }
  dim3 block() const { return dim3(unsigned(threads), unsigned(teams)); }
};

template <class T>
void forward(const Problem& p, void* stats, const void* factor, void* grad, void* stream) {
  using R = RealOf<T>;
  const Shape s(p);
  const int64_t pitch = ceil_div(p.classes, kVec<T>) * kVec<T>, bytes = pitch * s.teams * sizeof(T);
  const bool kept = bytes <= shared_bytes_of_half();
  launch(aldr_fwd_kernel<T>, s.grid(p), s.block(), kept ? size_t(bytes) : 0, stream, p,
         static_cast<R*>(stats), static_cast<const R*>(factor), static_cast<T*>(grad),
         kept ? int(pitch) : 0);
}

template <class T>
void backward(const Problem& p, const void* stats, const void* factor, void* grad, void* stream) {
  using R = RealOf<T>;
  const Shape s(p);
  launch(aldr_bwd_kernel<T>, s.grid(p), s.block(), 0, stream, p, static_cast<const R*>(stats),
         static_cast<const R*>(factor), static_cast<T*>(grad));
}

}  // namespace

void aldr_forward(const Problem& p, void* stats, const void* factor, void* grad, void* stream) {
  if (p.rows == 0) return;
  dispatch_float(p.dtype,
                 [&](auto tag) { forward<decltype(tag)>(p, stats, factor, grad, stream); });
}

void aldr_backward(const Problem& p, const void* stats, const void* factor, void* grad,
                   void* stream) {
  if (p.rows == 0) return;
  dispatch_float(p.dtype,
                 [&](auto tag) { backward<decltype(tag)>(p, stats, factor, grad, stream); });
}

}  // namespace pyloss::cuda
