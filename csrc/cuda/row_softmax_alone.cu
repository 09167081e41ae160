// Row softmax with one thread per row, forward and backward. Formulas: common/row_softmax.h; device
// code of a row: row_softmax.cuh.
//
// For rows whose classes lie far apart, (N, C, d1, ...) or a transposed matrix, where neighbouring
// rows are adjacent in memory: the threads of a warp then read one line per class, and nothing is
// transposed or copied. Also for rows of at most 32 classes, where a warp per row would idle; there
// the first-level cache gathers the lines.
//
// Memory traffic per logit of b bytes: forward reads b, backward reads b and writes b. With the
// gradient in the forward the second walk reads again what the caches still hold.
//
// Numerics: float (double for fp64), 8 classes summed as a tree, then one after the other.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax.h"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;
template <class T>
constexpr int kBlocksWanted = sizeof(T) == 8 ? 2 : 5;

template <class T>
__device__ void write_zeros_alone(T* out, int64_t cls, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) out[c * cls] = from_real<T>(RealOf<T>(0));
}

template <class T, class R>
__device__ void write_gradient(const RowSoftmaxProblem& p, const RowTransform<R>& transform,
                               const RowView<R>& v, const GradRow<R>& g, const T* x, T* out,
                               int64_t cls) {
  for_each_alone<kBatch>(x, p.x_strides.cls, p.classes,
                         [&](auto, auto& z, int first, int step, int limit) {
                           transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                           gradient_batch<Mode::kSoft, 1>(v, transform, g, z, first, step, limit);
                           store_batch<T, 1>(out, cls, z, first, step, limit);
                         });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksWanted<T>)
    row_softmax_alone_fwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                                 RowSoftmaxForward f, KnownNorm<RealOf<T>> norm) {
  using R = RealOf<T>;
  __shared__ R shared_norm[kNormCount];
  norm.use(shared_norm, &f);
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows()) return;
  T* grad = f.grad ? static_cast<T*>(f.grad) + row_offset(p, f.grad_strides, row) : nullptr;
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    store_ignored<R>(p, f, row);
    if (grad) write_zeros_alone(grad, f.grad_strides.cls, p.classes);
    return;
  }
  const bool valid = target_in_range(p, t);
  RowView<R> v = make_view(p, t, row, f.extras != nullptr, f.index != nullptr);
  RowResult<R> r;
  if (valid) {
    read_labels<Mode::kSoft>(transform, x, &v);
    RowState<R> s;
    for_each_alone<kBatch>(x, p.x_strides.cls, p.classes,
                           [&](auto, auto& z, int first, int step, int limit) {
                             transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                             accumulate<Mode::kSoft, 1>(v, z, first, step, limit, &s);
                           });
    if (v.index && (s.part.rest != s.part.rest || v.zy != v.zy)) {
      for (int64_t c = p.classes - 1; c >= 0; --c) {
        const R value = to_real(x[c * p.x_strides.cls]);
        if (value != value) s.first_nan = c;
      }
    }
    r = finish_state<Mode::kSoft>(v, s);
    if (two_pass_soft(p)) {
      for_each_alone<kBatch>(x, p.x_strides.cls, p.classes,
                             [&](auto, auto& z, int first, int step, int limit) {
                               transform_batch<Mode::kSoft, 1>(transform, z, first, step, limit);
                               accumulate_soft<1>(v, r.terms, z, first, step, limit, &r.soft);
                             });
    }
  } else {
    r = poisoned_result(&v);
  }
  store_result(f, row, v, r);
  if (!grad) return;
  const R weight_sum = static_cast<const R*>(f.norm)[kNormWeightSum];
  const GradRow<R> g = make_grad_row<Mode::kSoft>(
      transform, r.terms,
      row_coeffs(p, t, r.terms, unit_upstream<R>(f.norm, t.token), weight_sum, r.soft.mass), v.zy);
  write_gradient(p, transform, v, g, x, grad, f.grad_strides.cls);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksWanted<T>)
    row_softmax_alone_bwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                                 RowSoftmaxBackward b) {
  using R = RealOf<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows()) return;
  T* out = static_cast<T*>(b.grad) + row_offset(p, b.grad_strides, row);
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
  RowTarget<R> t;
  if (!load_target(p, row, &t)) return write_zeros_alone(out, b.grad_strides.cls, p.classes);
  RowView<R> v = make_view(p, t, row, false, false);
  R soft_mass;
  const RowTerms<R> terms = load_terms(p, b.stats, row, t, &v.zy, &soft_mass);
  const RowUpstream<R> u =
      b.grad_loss ? load_upstream(p, b, row, t.token) : unit_upstream<R>(b.norm, t.token);
  const R weight_sum = static_cast<const R*>(b.norm)[kNormWeightSum];
  const GradRow<R> g = make_grad_row<Mode::kSoft>(
      transform, terms, row_coeffs(p, t, terms, u, weight_sum, soft_mass), v.zy);
  write_gradient(p, transform, v, g, x, out, b.grad_strides.cls);
}

dim3 grid_of(const RowSoftmaxProblem& p) {
  return dim3(grid_size(ceil_div(p.rows(), kThreads)));
}

}  // namespace

template <class T>
void row_softmax_forward_alone(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                               const KnownNorm<RealOf<T>>& norm, void* stream) {
  launch(row_softmax_alone_fwd_kernel<T>, grid_of(p), dim3(kThreads), 0, stream, p,
         RowTransform<RealOf<T>>(p.options), f, norm);
}

template <class T>
void row_softmax_backward_alone(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b,
                                void* stream) {
  launch(row_softmax_alone_bwd_kernel<T>, grid_of(p), dim3(kThreads), 0, stream, p,
         RowTransform<RealOf<T>>(p.options), b);
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
