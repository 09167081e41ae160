// Row softmax, backward. Formulas: common/row_softmax.h; device code of a row: row_softmax.cuh.
//
// Decomposition: grid (row, column range); a team (one warp for short rows, one block for longer
// ones) computes the row's few coefficients from the saved statistics, every warp for itself, which
// needs no barrier, and writes its range. One range per row unless rows are few.
//
// Memory traffic per logit of b bytes: read b, write b; the output may be the input. Ignored rows:
// write b. scale_inplace reads and writes b, or nothing when the factor is 1.
//
// Numerics: float (double for fp64), rounded once.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288 (the gradient of every tau is that of tau = 1 times
// one number per row).
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax.h"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

template <class T, Mode M>
__global__ void __launch_bounds__(kLongTeam, kBlocksPerSm<T, M>)
    row_softmax_bwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                           RowSoftmaxBackward b, int columns) {
  using R = RealOf<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows()) return;
  const int begin = int(blockIdx.y) * columns, classes = int(p.classes);
  const int end = columns < classes - begin ? begin + columns : classes;
  const int64_t cls = b.grad_strides.cls;
  T* out = static_cast<T*>(b.grad) + row_offset(p, b.grad_strides, row);
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);

  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    for (int c = begin + int(threadIdx.x); c < end; c += int(blockDim.x)) {
      out[int64_t(c) * cls] = from_real<T>(R(0));
    }
    return;
  }
  RowView<R> v = make_view(p, t, row, false, false);
  R soft_mass;
  const RowTerms<R> terms = load_terms(p, b.stats, row, t, &v.zy, &soft_mass);
  const RowUpstream<R> u =
      b.grad_loss ? load_upstream(p, b, row, t.token) : unit_upstream<R>(b.norm, t.token);
  const R weight_sum = static_cast<const R*>(b.norm)[kNormWeightSum];
  const GradRow<R> g =
      make_grad_row(terms, row_coeffs(p, t, terms, u, weight_sum, soft_mass), v.zy);
  const RowSpan<T> span = make_span<T>(x, p.x_strides.cls, begin, end, out, cls);
  for_each_batch<kBatch<M>>(span, Walk::kPlain, nullptr,
                            [&](auto width, auto& z, int first, int step, int limit) {
                              constexpr int V = decltype(width)::value;
                              transform_batch<V>(transform, z, first, step, limit);
                              gradient_batch<M, V>(v, transform, g, z, first, step, limit);
                              store_batch<T, V>(out, cls, z, first, step, limit);
                            });
}

constexpr int kScaleThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    row_softmax_scale_kernel(T* data, int64_t n, const RealOf<T>* factor) {
  using R = RealOf<T>;
  const R by = *factor;
  if (by == 1) return;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t head = int64_t((16 - (reinterpret_cast<uintptr_t>(data) & 15)) & 15) / sizeof(T);
  const int64_t count = head < n ? (n - head) / kVec<T> : 0, rest = count * kVec<T>;
  uint4* vectors = reinterpret_cast<uint4*>(data + head);
  for (int64_t i = thread; i < count; i += threads) {
    const uint4 q = vectors[i];
    R x[kVec<T>];
    unpack<T>(q, x);
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) x[e] = scaled_gradient(x[e], by);
    vectors[i] = pack<T>(x);
  }
  for (int64_t i = thread; i < n - rest; i += threads) {
    T* at = data + (i < head ? i : i + rest);
    *at = from_real<T>(scaled_gradient<R>(to_real(*at), by));
  }
}

template <class T>
void backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, void* stream) {
  if (use_alone(p)) return row_softmax_backward_alone<T>(p, b, stream);
  const int threads = team_threads(p), teams = threads == kWarp ? 4 : 1;
  const int64_t vectors = vectors_per_row(p), vector = 16 / dtype_size(p.dtype);
  // Enough blocks for every SM several times over, each with at least one batch per thread.
  const int64_t wanted = ceil_div(8 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount)),
                                  ceil_div(p.rows(), teams));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, ceil_div(vectors, 4 * int64_t(threads)));
  const int64_t columns = ceil_div(ceil_div(p.classes, splits), vector) * vector;
  const RowTransform<RealOf<T>> transform(p.options);
  auto* kernel = row_softmax_bwd_kernel<T, Mode::kSoft>;
  if constexpr (!std::is_same_v<T, double>) {
    const Mode mode = mode_of(p, b.grad_extras != nullptr);
    if (mode == Mode::kPlain) kernel = row_softmax_bwd_kernel<T, Mode::kPlain>;
    if (mode == Mode::kOptions) kernel = row_softmax_bwd_kernel<T, Mode::kOptions>;
  }
  launch(kernel, dim3(grid_size(ceil_div(p.rows(), teams)), unsigned(ceil_div(p.classes, columns))),
         dim3(unsigned(threads), unsigned(teams)), 0, stream, p, transform, b, int(columns));
}

}  // namespace

void row_softmax_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, void* stream) {
  if (p.rows() == 0 || p.classes == 0) return;
  check_classes(p);
  dispatch_float(p.dtype, [&](auto tag) { backward<decltype(tag)>(p, b, stream); });
}

void scale_inplace(void* data, DType dtype, int64_t n, const void* factor, void* stream) {
  if (n == 0) return;
  dispatch_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t blocks =
        std::min<int64_t>(ceil_div(n, kVec<T> * kScaleThreads),
                          8 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount)));
    launch(row_softmax_scale_kernel<T>, dim3(grid_size(blocks)), dim3(kScaleThreads), 0, stream,
           static_cast<T*>(data), n, static_cast<const RealOf<T>*>(factor));
  });
}

}  // namespace pyloss::cuda
