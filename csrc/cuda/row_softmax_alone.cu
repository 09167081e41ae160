// Row softmax with a lane per row, forward and backward. Formulas: common/row_softmax.h; device
// code of a row: row_softmax.cuh.
//
// For rows whose classes lie far apart, (N, C, d1, ...) or a transposed matrix, where neighbouring
// rows are adjacent in memory: the lanes of a warp then read one line per class, and nothing is
// transposed or copied. Where such rows are too few to fill the device, the classes are split among
// the warps of a block, whose states are merged in their order. Also for rows of at most 32
// classes, where a warp per row would idle: those that follow each other without gaps go through
// shared memory, read and written by whole vectors, in rows of an odd number of banks.
//
// Memory traffic per logit of b bytes: forward reads b, backward reads b and writes b. With the
// gradient in the forward the second walk reads again what the caches, or shared memory, still
// hold.
//
// Numerics: float (double for fp64), 8 classes summed as a tree, then one after the other.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax.h"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 128;      // of a block, but with the most splits
constexpr int kMostSplits = 8;     // of the classes, a warp each
constexpr int kMostThreads = 256;  // kMostSplits warps
constexpr int kWalk = 8;

// How a launch shares out its rows: blocks of groups of 32 rows, each split among warps.
struct Shape {
  int splits, groups, pitch;  // pitch: elements between staged rows, 0: not staged

  int64_t rows() const { return int64_t(groups) * kWarp; }
  dim3 block() const { return dim3(kWarp, unsigned(splits), unsigned(groups)); }
};

// ---- Rows in shared memory ---------------------------------------------------------------------

// Copies `count` elements between adjacent rows of `classes` and staged rows `pitch` apart; every
// thread of the block takes part. kIn: from `rows` into `staged`.
template <bool kIn, class T>
__device__ __forceinline__ void stage(T* staged, T* rows, int count, int classes, int pitch) {
  constexpr int V = kVec<T>;
  const int thread = threadIdx.x + kWarp * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = kWarp * blockDim.y * blockDim.z;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows) & 15) == 0;
  const int vectors = aligned ? count / V : 0;
  for (int i = thread; i < vectors; i += threads) {
    T x[V];
    uint4* at = reinterpret_cast<uint4*>(rows) + i;
    if (kIn) {
      const uint4 q = *at;
      memcpy(x, &q, sizeof q);
    }
    int row = i * V / classes, c = i * V - row * classes;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      T& place = staged[row * pitch + c];
      if (kIn) {
        place = x[e];
      } else {
        x[e] = place;
      }
      if (++c == classes) {
        c = 0;
        ++row;
      }
    }
    if (!kIn) {
      uint4 q;
      memcpy(&q, x, sizeof q);
      *at = q;
    }
  }
  for (int i = vectors * V + thread; i < count; i += threads) {
    T& place = staged[i / classes * pitch + i % classes];
    if (kIn) {
      place = rows[i];
    } else {
      rows[i] = place;
    }
  }
}

// Where a lane finds its row, and what part of it is its own.
template <class T>
struct Lane {
  int64_t row;
  bool active;
  const T* x;
  T* out;  // may be null
  int64_t x_cls, out_cls;
  int begin, end;
  bool stages_out;
};

template <class T>
__device__ __forceinline__ Lane<T> make_lane(const RowSoftmaxProblem& p, T* out, const Strides& s,
                                             int pitch, T* staged) {
  Lane<T> l;
  const int local = int(threadIdx.z) * kWarp + int(threadIdx.x), here = int(blockDim.z) * kWarp;
  const int64_t first = int64_t(blockIdx.x) * here, left = p.rows() - first;
  const int classes = int(p.classes), splits = int(blockDim.y);
  l.row = first + local;
  l.active = local < left;
  l.x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, l.row);
  l.out = out ? out + row_offset(p, s, l.row) : nullptr;
  l.x_cls = p.x_strides.cls;
  l.out_cls = s.cls;
  const int chunk = (classes + splits - 1) / splits, begin = int(threadIdx.y) * chunk;
  l.begin = begin < classes ? begin : classes;
  l.end = chunk < classes - l.begin ? l.begin + chunk : classes;
  l.stages_out = pitch > 0 && out && s.cls == 1 && s.outer == p.classes;
  if (pitch > 0) {
    T* rows = const_cast<T*>(static_cast<const T*>(p.x)) + first * classes;
    const int count = int(left < here ? left : here) * classes;
    stage<true>(staged, rows, count, classes, pitch);
    __syncthreads();
    l.x = staged + local * pitch;
    if (l.stages_out) l.out = staged + local * pitch;  // a class is read before it is written
  }
  return l;
}

template <class T>
__device__ __forceinline__ void finish_lane(const RowSoftmaxProblem& p, const Lane<T>& l, T* out,
                                            int pitch, T* staged) {
  if (!l.stages_out) return;
  __syncthreads();
  const int here = int(blockDim.z) * kWarp, classes = int(p.classes);
  const int64_t first = int64_t(blockIdx.x) * here, left = p.rows() - first;
  stage<false>(staged, out + first * classes, int(left < here ? left : here) * classes, classes,
               pitch);
}

template <class T>
__device__ void write_zeros_alone(const Lane<T>& l) {
  for (int c = l.begin; c < l.end; ++c) l.out[c * l.out_cls] = from_real<T>(RealOf<T>(0));
}

template <class T, class R>
__device__ void write_gradient(const Lane<T>& l, const RowTransform<R>& transform,
                               const RowView<R>& v, const GradRow<R>& g) {
  for_each_alone<kWalk>(l.x, l.x_cls, l.begin, l.end,
                        [&](auto, auto& z, int first, int step, int limit) {
                          transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                          gradient_batch<Mode::kSoft, 1>(v, transform, g, z, first, step, limit);
                          store_batch<T, 1>(l.out, l.out_cls, z, first, step, limit);
                        });
}

// ---- Kernels -----------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kMostThreads, sizeof(T) == 8 ? 1 : 2)
    row_softmax_alone_fwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                                 RowSoftmaxForward f, KnownNorm<RealOf<T>> norm, int pitch) {
  using R = RealOf<T>;
  __shared__ R shared_norm[kNormCount];
  PYLOSS_DYNAMIC_SHARED(uint4, shared);  // staged rows, or a state for every thread
  T* staged = reinterpret_cast<T*>(shared);
  norm.use(shared_norm, &f);
  T* grad = static_cast<T*>(f.grad);
  const Lane<T> l = make_lane<T>(p, grad, f.grad_strides, pitch, staged);
  const bool first = threadIdx.y == 0;
  RowTarget<R> t{};
  const bool counts = l.active && load_target(p, l.row, &t);
  const bool valid = counts && target_in_range(p, t);
  RowView<R> v = make_view(p, t, l.row, f.extras != nullptr, f.index != nullptr);
  RowState<R> s;
  if (valid) {
    read_labels<Mode::kSoft>(transform, l.x, &v);
    for_each_alone<kWalk>(l.x, l.x_cls, l.begin, l.end,
                          [&](auto, auto& z, int first, int step, int limit) {
                            transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                            accumulate<Mode::kSoft, 1>(v, z, first, step, limit, &s);
                          });
    if (v.index && (s.part.rest != s.part.rest || v.zy != v.zy)) {
      for (int c = l.end - 1; c >= l.begin; --c) {
        const R value = to_real(l.x[c * l.x_cls]);
        if (value != value) s.first_nan = c;
      }
    }
  }
  if (blockDim.y > 1) {
    RowState<R>* states = reinterpret_cast<RowState<R>*>(shared);
    RowState<R>* own = states + int(threadIdx.z * blockDim.y) * kWarp + threadIdx.x;
    own[threadIdx.y * kWarp] = s;
    __syncthreads();
    s = own[0];
    for (int i = 1; i < int(blockDim.y); ++i) merge_state(&s, own[i * kWarp], v.index);
  }
  if (counts) {
    RowResult<R> r;
    if (valid) {
      r = finish_state<Mode::kSoft>(v, s);
      if (two_pass_soft(p)) {
        for_each_alone<kWalk>(l.x, l.x_cls, l.begin, l.end,
                              [&](auto, auto& z, int first, int step, int limit) {
                                transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                                accumulate_soft<1>(v, r.terms, z, first, step, limit, &r.soft);
                              });
      }
    } else {
      r = poisoned_result(&v);
    }
    if (first) store_result(f, l.row, v, r);
    if (grad) {
      const R weight_sum = static_cast<const R*>(f.norm)[kNormWeightSum];
      const RowUpstream<R> u = unit_upstream<R>(f.norm, t.token);
      const RowCoeffs<R> c = row_coeffs(p, t, r.terms, u, weight_sum, r.soft.mass);
      write_gradient(l, transform, v, make_grad_row<Mode::kSoft>(transform, r.terms, c, v.zy));
    }
  } else if (l.active) {
    if (first) store_ignored<R>(p, f, l.row);
    if (grad) write_zeros_alone(l);
  }
  finish_lane(p, l, grad, pitch, staged);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, sizeof(T) == 8 ? 1 : 2)
    row_softmax_alone_bwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                                 RowSoftmaxBackward b, int pitch) {
  using R = RealOf<T>;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  T* staged = reinterpret_cast<T*>(shared);
  T* grad = static_cast<T*>(b.grad);
  const Lane<T> l = make_lane<T>(p, grad, b.grad_strides, pitch, staged);
  RowTarget<R> t;
  if (l.active && load_target(p, l.row, &t)) {
    RowView<R> v = make_view(p, t, l.row, false, false);
    R soft_mass;
    const RowTerms<R> terms = load_terms<Mode::kSoft>(p, b.stats, l.row, t, &v.zy, &soft_mass);
    const RowUpstream<R> u =
        b.grad_loss ? load_upstream(p, b, l.row, t.token) : unit_upstream<R>(b.norm, t.token);
    const R weight_sum = static_cast<const R*>(b.norm)[kNormWeightSum];
    const RowCoeffs<R> c = row_coeffs(p, t, terms, u, weight_sum, soft_mass);
    write_gradient(l, transform, v, make_grad_row<Mode::kSoft>(transform, terms, c, v.zy));
  } else if (l.active) {
    write_zeros_alone(l);
  }
  finish_lane(p, l, grad, pitch, staged);
}

// ---- Launches ----------------------------------------------------------------------------------

// An odd number of banks of 4 bytes (8 for double).
int staged_pitch(const RowSoftmaxProblem& p) {
  const int64_t size = dtype_size(p.dtype), bank = size == 8 ? 8 : 4;
  return int((ceil_div(p.classes * size, bank) | 1) * bank / size);
}

Shape shape_of(const RowSoftmaxProblem& p) {
  const bool rows_adjacent = p.x_strides.cls == 1 && p.inner == 1 && p.x_strides.outer == p.classes;
  if (rows_adjacent && p.classes > 1) {
    // Four groups of rows in at most 18 KiB of shared memory; two of doubles.
    return {1, kThreads / kWarp / (p.dtype == DType::kF64 ? 2 : 1), staged_pitch(p)};
  }
  // 16 warps on every multiprocessor, none with less than two walks of classes.
  int splits = 1;
  if (transposed(p) && !two_pass_soft(p)) {
    const int64_t wanted =
        ceil_div(512 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount)), p.rows());
    while (splits < wanted && splits < kMostSplits && p.classes >= 4 * kWalk * splits) splits *= 2;
  }
  return {splits, std::max(1, kThreads / kWarp / splits), 0};
}

dim3 grid_of(const RowSoftmaxProblem& p, const Shape& s) {
  return dim3(grid_size(ceil_div(p.rows(), s.rows())));
}

size_t staged_bytes(const RowSoftmaxProblem& p, const Shape& s) {
  return size_t(s.rows() * s.pitch * dtype_size(p.dtype));
}

}  // namespace

template <class T>
void row_softmax_forward_alone(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                               const KnownNorm<RealOf<T>>& norm, void* stream) {
  const Shape s = shape_of(p);
  const size_t states =
      s.splits > 1 ? size_t(s.rows()) * s.splits * sizeof(RowState<RealOf<T>>) : 0;
  launch(row_softmax_alone_fwd_kernel<T>, grid_of(p, s), s.block(),
         std::max(states, staged_bytes(p, s)), stream, p, RowTransform<RealOf<T>>(p.options), f,
         norm, s.pitch);
}

template <class T>
void row_softmax_backward_alone(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b,
                                void* stream) {
  const Shape s = shape_of(p);
  launch(row_softmax_alone_bwd_kernel<T>, grid_of(p, s), s.block(), staged_bytes(p, s), stream, p,
         RowTransform<RealOf<T>>(p.options), b, s.pitch);
}

#define PYLOSS_INSTANTIATE(T)                                                                      \
  template void row_softmax_forward_alone<T>(const RowSoftmaxProblem&, const RowSoftmaxForward&,   \
                                             const KnownNorm<RealOf<T>>&, void*);                  \
  template void row_softmax_backward_alone<T>(const RowSoftmaxProblem&, const RowSoftmaxBackward&, \
                                              void*);
PYLOSS_INSTANTIATE(double)
PYLOSS_INSTANTIATE(float)
PYLOSS_INSTANTIATE(BF16)
PYLOSS_INSTANTIATE(F16)
#undef PYLOSS_INSTANTIATE

}  // namespace pyloss::cuda
