// Row softmax, backward. Formulas: common/row_softmax.h; device code of a row: row_softmax.cuh.
//
// Decomposition: grid (rows, column range); a team (one warp for short rows, one block for longer
// ones) takes some rows. Each lane of its first warp computes one row's few coefficients from the
// saved statistics, while the first logits are on their way; then the team writes its range of one
// row after the other. One range per row unless rows are few.
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

// What the walk over a row needs; y is kIgnored for a row of zeros.
template <class R>
struct GradLine {
  GradRow<R> g;
  int y, y2;
};

// One lane, one row.
template <Mode M, class R>
__device__ __forceinline__ GradLine<R> make_line(const RowSoftmaxProblem& p,
                                                 const RowTransform<R>& transform,
                                                 const RowSoftmaxBackward& b, int64_t row) {
  GradLine<R> line{};
  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    line.y = kIgnored;
    return line;
  }
  const RowView<R> v = make_view(p, t, row, false, false);
  R zy, soft_mass;
  const RowTerms<R> terms = load_terms<M>(p, b.stats, row, t, &zy, &soft_mass);
  const RowUpstream<R> u =
      b.grad_loss ? load_upstream(p, b, row, t.token) : unit_upstream<R>(b.norm, t.token);
  const R weight_sum = static_cast<const R*>(b.norm)[kNormWeightSum];
  line.g =
      make_grad_row<M>(transform, terms, row_coeffs(p, t, terms, u, weight_sum, soft_mass), zy);
  line.y = v.y;
  line.y2 = v.y2;
  return line;
}

template <class T, Mode M>
__global__ void __launch_bounds__(kLongTeam, kBlocksPerSm<T, M>)
    row_softmax_bwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                           RowSoftmaxBackward b, int columns, int per_team) {
  using R = RealOf<T>;
  constexpr int K = kBatch<M, true>, A = kAhead<M, true, false>;
  __shared__ GradLine<R> lines[kMostTeams][kMostRows];
  const int64_t rows = p.rows(), step = int64_t(gridDim.x) * blockDim.y;
  const int64_t first_row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first_row >= rows) return;
  const int begin = int(blockIdx.y) * columns, classes = int(p.classes);
  const int end = columns < classes - begin ? begin + columns : classes;
  const int64_t cls = b.grad_strides.cls;
  const auto out_of = [&](int64_t row) {
    return static_cast<T*>(b.grad) + row_offset(p, b.grad_strides, row);
  };
  const auto span_of = [&](int64_t row) {
    const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
    return make_span<T>(x, p.x_strides.cls, begin, end, out_of(row), cls);
  };
  RowSpan<T> span = span_of(first_row);
  Ahead<T, K, A> ahead;
  start_row(span, span.vector_data(), &ahead);
  if (threadIdx.x < kWarp && int(threadIdx.x) < per_team) {
    const int64_t row = first_row + int64_t(threadIdx.x) * step;
    if (row < rows) lines[threadIdx.y][threadIdx.x] = make_line<M>(p, transform, b, row);
  }
  if (blockDim.x > kWarp) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  for (int r = 0; r < per_team; ++r) {
    const int64_t row = first_row + r * step;
    if (row >= rows) return;
    const GradLine<R>& line = lines[threadIdx.y][r];
    T* out = out_of(row);
    if (line.y == kIgnored) {
      write_zeros(make_span<T>(out, cls, begin, end, out, cls), out);
    } else {
      RowTarget<R> t{};
      if (M == Mode::kSoft) {
        load_target(p, row, &t);  // of the coefficients of every class
      } else {
        t.y = line.y;
        t.y2 = line.y2;
      }
      const RowView<R> v = make_view(p, t, row, false, false);
      const GradRow<R> g = line.g;
      for_each_batch(span, span.vector_data(), nullptr, &ahead,
                     [&](auto width, auto& z, int first, int step, int limit) {
                       constexpr int V = decltype(width)::value;
                       transform_batch<M, V>(transform, z, first, step, limit);
                       gradient_batch<M, V>(v, transform, g, z, first, step, limit);
                       store_batch<T, V>(out, cls, z, first, step, limit);
                     });
    }
    if (r + 1 < per_team && row + step < rows) {
      span = span_of(row + step);
      start_row(span, span.vector_data(), &ahead);
    }
  }
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

template <class T, Mode M>
void backward_rows(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, void* stream) {
  const int threads = team_threads(p), teams = teams_of_block(threads);
  const int64_t vectors = vectors_per_row(p), vector = 16 / dtype_size(p.dtype);
  const int64_t groups = ceil_div(p.rows(), teams);
  const int64_t resident = resident_blocks<T, M>(threads * teams);
  // Rows fill the device, or their ranges do, each with at least one batch per thread.
  const int per_team = rows_per_team(p, teams, resident);
  const int64_t splits = std::clamp<int64_t>(ceil_div(2 * resident, groups), 1,
                                             ceil_div(vectors, 4 * int64_t(threads)));
  const int64_t columns = ceil_div(ceil_div(p.classes, splits), vector) * vector;
  launch(
      row_softmax_bwd_kernel<T, M>,
      dim3(grid_size(ceil_div(p.rows(), teams * per_team)), unsigned(ceil_div(p.classes, columns))),
      dim3(unsigned(threads), unsigned(teams)), 0, stream, p, RowTransform<RealOf<T>>(p.options), b,
      int(columns), per_team);
}

template <class T>
void backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, void* stream) {
  if (use_alone(p)) return row_softmax_backward_alone<T>(p, b, stream);
  if constexpr (std::is_same_v<T, double>) {
    backward_rows<T, Mode::kSoft>(p, b, stream);
  } else {
    switch (mode_of(p, b.grad_extras != nullptr)) {
      case Mode::kPlain:
        return backward_rows<T, Mode::kPlain>(p, b, stream);
      case Mode::kOptions:
        return backward_rows<T, Mode::kOptions>(p, b, stream);
      default:
        return backward_rows<T, Mode::kSoft>(p, b, stream);
    }
  }
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
