// Row softmax, forward. Formulas: common/row_softmax.h; device code of a row: row_softmax.cuh.
//
// Decomposition: a team of threads (one warp for short rows, one block for longer ones) takes some
// rows one after the other and streams over each once: every thread keeps the mergeable statistics
// (max, rest, ...) of the vectors it has seen, and the team merges them. The next row is on its way
// while a row is merged. What happens once per row waits until the team has seen all of its rows:
// then each lane of its first warp finishes one. When rows are too few to fill the device, a row is
// cut into column ranges: grid (row, range), one record per range in scratch memory, and a second
// kernel merges the records in index order. Rows of at most 32 classes, and rows whose classes lie
// far apart (N, C, d1, ...), go to one thread each (row_softmax_alone.cu).
// Small kernels surround this one: before it the denominators of a 'mean' over rows that must be
// counted, after it the sum of the row losses.
//
// Memory traffic per logit of b bytes: read b. With the gradient in the forward: read b, write b,
// while the row stays in shared memory between the two walks (up to half of an SM's); longer rows
// are read again, from the second-level cache where it holds the rows in flight.
//
// Numerics: float (double for fp64). A batch is summed as a tree, batches one after the other, so
// the error does not grow with the row. Sums over rows are taken in double in a fixed order. No
// float atomics: a result depends on the shapes and on the device's size, never on timing.
//
// Papers: Mao, Mohri, Zhong, arXiv 2304.07288; the online form of the maximum and the sum is that
// of Milakov, Gimelshein, arXiv 1805.02867.
#include "cuda/row_softmax.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

// ---- Denominators and loss sums ----------------------------------------------------------------

constexpr int kSumThreads = 512;
constexpr int64_t kSumRows = 16 * kSumThreads;  // the most for one block alone
constexpr int64_t kMaxSumBlocks = 256;

struct NormSums {
  double loss, z, weight;
};

__device__ double block_sum(double v, double* slots) {
  return team_reduce(v, AddOp{}, 0.0, slots);
}

__device__ NormSums block_sum(const NormSums& s, double (*slots)[kMaxWarps]) {
  return {block_sum(s.loss, slots[0]), block_sum(s.z, slots[1]), block_sum(s.weight, slots[2])};
}

// Block b sums its own range of rows and of classes; a single block finishes at once.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    row_softmax_norm_kernel(RowSoftmaxProblem p, R* norm, NormSums* partial) {
  __shared__ double slots[3][kMaxWarps];
  NormSums s{0, 0, 0};
  const int64_t blocks = gridDim.x, b = blockIdx.x;
  if (p.options.reduction == Reduction::kMean && p.options.num_items <= 0) {
    const int64_t n = p.rows(), chunk = (n + blocks - 1) / blocks;
    const int64_t end = n < (b + 1) * chunk ? n : (b + 1) * chunk;
#pragma unroll 4
    for (int64_t r = b * chunk + threadIdx.x; r < end; r += blockDim.x) {
      double loss, z;
      mean_weights<R>(p, r, &loss, &z);
      s.loss += loss;
      s.z += z;
    }
  }
  if (p.weight) {
    const int64_t n = p.classes, chunk = (n + blocks - 1) / blocks;
    const int64_t end = n < (b + 1) * chunk ? n : (b + 1) * chunk;
#pragma unroll 4
    for (int64_t c = b * chunk + threadIdx.x; c < end; c += blockDim.x) {
      s.weight += double(static_cast<const R*>(p.weight)[c]);
    }
  }
  s = block_sum(s, slots);
  if (threadIdx.x != 0) return;
  if (blocks > 1) {
    partial[b] = s;
  } else {
    finish_norm(p, s.loss, s.z, p.weight ? s.weight : double(p.classes), norm);
  }
}

template <class R>
__global__ void __launch_bounds__(kSumThreads)
    row_softmax_norm_finish_kernel(RowSoftmaxProblem p, R* norm, const NormSums* partial,
                                   int count) {
  __shared__ double slots[3][kMaxWarps];
  NormSums s{0, 0, 0};
  if (int(threadIdx.x) < count) s = partial[threadIdx.x];
  s = block_sum(s, slots);
  if (threadIdx.x == 0) {
    finish_norm(p, s.loss, s.z, p.weight ? s.weight : double(p.classes), norm);
  }
}

// Without partial sums to read (`partial_in` null) block b sums its range of row losses.
template <class R>
__global__ void __launch_bounds__(kSumThreads)
    row_softmax_loss_kernel(RowSoftmaxProblem p, RowSoftmaxForward f, const double* partial_in,
                            int count, double* partial_out) {
  __shared__ double slots[kMaxWarps];
  double s = 0;
  const int64_t blocks = gridDim.x, b = blockIdx.x;
  if (partial_in) {
    if (int(threadIdx.x) < count) s = partial_in[threadIdx.x];
  } else {
    const int64_t n = p.rows(), chunk = (n + blocks - 1) / blocks;
    const int64_t end = n < (b + 1) * chunk ? n : (b + 1) * chunk;
    const R* losses = static_cast<const R*>(f.stats) + kStatLoss * n;
#pragma unroll 4
    for (int64_t r = b * chunk + threadIdx.x; r < end; r += blockDim.x) s += double(losses[r]);
  }
  s = block_sum(s, slots);
  if (threadIdx.x != 0) return;
  if (blocks > 1) {
    partial_out[b] = s;
  } else {
    store_float(f.loss, f.loss_dtype, 0, finish_sum(p, static_cast<const R*>(f.norm), R(s)));
  }
}

// One block, or enough that no thread waits for more than a load or two.
int64_t sum_blocks(int64_t n) {
  return n <= kSumRows ? 1 : std::min(kMaxSumBlocks, ceil_div(n, kSumThreads));
}

template <class R>
void compute_norm(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch,
                  void* stream) {
  const bool rows = p.options.reduction == Reduction::kMean && p.options.num_items <= 0;
  const int64_t blocks = sum_blocks(std::max(rows ? p.rows() : 0, p.weight ? p.classes : 0));
  R* norm = static_cast<R*>(f.norm);
  NormSums* partial = static_cast<NormSums*>(scratch);
  launch(row_softmax_norm_kernel<R>, dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, p, norm,
         partial);
  if (blocks > 1) {
    launch(row_softmax_norm_finish_kernel<R>, dim3(1), dim3(kSumThreads), 0, stream, p, norm,
           static_cast<const NormSums*>(partial), int(blocks));
  }
}

template <class R>
void sum_losses(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch,
                void* stream) {
  if (p.options.reduction == Reduction::kNone) return;
  const int64_t blocks = sum_blocks(p.rows());
  double* partial = static_cast<double*>(scratch);
  const double* none = nullptr;
  launch(row_softmax_loss_kernel<R>, dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, p, f,
         none, 0, partial);
  if (blocks > 1) {
    launch(row_softmax_loss_kernel<R>, dim3(1), dim3(kSumThreads), 0, stream, p, f,
           static_cast<const double*>(partial), int(blocks), partial);
  }
}

// ---- Rows --------------------------------------------------------------------------------------

constexpr int64_t kMaxSplits = 128;

// The one label of a plain row.
__device__ __forceinline__ int plain_label(const RowSoftmaxProblem& p, int64_t row) {
  const int64_t y = load_index(p.target, p.target_dtype, row);
  if (y == p.options.ignore_index) return kIgnored;
  return in_range(y, p.classes) ? int(y) : kOutOfRange;
}

// The second walk over a row whose statistics are complete: the sums of a soft target, then the
// gradient. `grad` may be null.
template <Mode M, class T, int K, int A>
__device__ __forceinline__ void walk_again(const RowSoftmaxProblem& p,
                                           const RowTransform<RealOf<T>>& transform,
                                           RowSoftmaxForward f, int64_t row, const RowSpan<T>& span,
                                           const uint4* kept, T* grad, bool counts, bool valid,
                                           int y, const RowState<RealOf<T>>& s,
                                           Ahead<T, K, A>* ahead) {
  using R = RealOf<T>;
  constexpr bool kMore = M != Mode::kPlain;
  __shared__ GradRow<R> shared_row;
  __shared__ R soft_slots[2][kMaxWarps];
  if (!kMore) {
    f.extras = nullptr;
    f.index = nullptr;
  }
  if (!counts) {
    if (threadIdx.x == 0) store_ignored<R>(p, f, row);
    if (!grad) return;
    const int64_t cls = f.grad_strides.cls;
    return write_zeros(make_span<T>(grad, cls, 0, int(p.classes), grad, cls), grad);
  }
  const uint4* from = kept && valid ? kept : span.vector_data();
  start_row(span, from, ahead);
  // Plain rows are finished by the first warp for all of them.
  const bool finishes = kMore || threadIdx.x < kWarp;
  RowResult<R> result;
  RowTarget<R> t{};
  t.y = y;
  t.y2 = -1;
  RowView<R> v = make_view(p, t, row, false, false);
  if (finishes) {
    load_target(p, row, &t);  // once more: nothing of it is kept over the first walk
    v = make_view(p, t, row, f.extras != nullptr, f.index != nullptr);
    if (valid) {
      read_labels<M>(transform, span.x, &v);
      result = finish_state<M>(v, s);
    } else {
      result = poisoned_result(&v);
    }
  }
  if (M == Mode::kSoft && valid && two_pass_soft(p)) {
    SoftSums<R> sums;
    for_each_batch(span, from, nullptr, ahead,
                   [&](auto width, auto& z, int first, int step, int limit) {
                     constexpr int V = decltype(width)::value;
                     transform_batch<M, V>(transform, z, first, step, limit);
                     accumulate_soft<V>(v, result.terms, z, first, step, limit, &sums);
                   });
    result.soft.mass = team_reduce(sums.mass, AddOp{}, R(0), soft_slots[0]);
    result.soft.loss = team_reduce(sums.loss, AddOp{}, R(0), soft_slots[1]);
    if (grad) start_row(span, from, ahead);
  }
  if (threadIdx.x == 0) store_result(f, row, v, result);
  if (!grad) return;
  GradRow<R> g;
  if (finishes) {
    const R weight_sum = static_cast<const R*>(f.norm)[kNormWeightSum];
    const RowUpstream<R> u = unit_upstream<R>(f.norm, t.token);
    const RowCoeffs<R> c = row_coeffs(p, t, result.terms, u, weight_sum, result.soft.mass);
    g = make_grad_row<M>(transform, result.terms, c, v.zy);
    if (!kMore && threadIdx.x == 0) shared_row = g;
  }
  if (!kMore && blockDim.x > kWarp) {
    __syncthreads();
    g = shared_row;
  }
  for_each_batch(span, from, nullptr, ahead,
                 [&](auto width, auto& z, int first, int step, int limit) {
                   constexpr int V = decltype(width)::value;
                   transform_batch<M, V>(transform, z, first, step, limit);
                   gradient_batch<M, V>(v, transform, g, z, first, step, limit);
                   store_batch<T, V>(grad, f.grad_strides.cls, z, first, step, limit);
                 });
}

// Statistics of rows: a team takes `per_team` of them, or one column range of one row when
// `records` is not null. kAgain: one row a team, walked again for its gradient or for the sums of a
// soft target; with `kept_vectors` > 0 it stays in shared memory meanwhile.
template <class T, Mode M, bool kAgain>
__global__ void __launch_bounds__(kLongTeam, kBlocksPerSm<T, M>)
    row_softmax_fwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                           RowSoftmaxForward f, KnownNorm<RealOf<T>> norm,
                           RowState<RealOf<T>>* records, int columns, int kept_vectors,
                           int per_team) {
  using R = RealOf<T>;
  constexpr int K = kBatch<M, kAgain>, A = kAhead<M, kAgain, kAgain>;
  constexpr bool kMore = M != Mode::kPlain;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ TeamSlots<R> slots[2];
  __shared__ int nan_slots[kMaxWarps];
  __shared__ R shared_norm[kNormCount];
  norm.use(shared_norm, &f);
  const int64_t rows = p.rows(), step = int64_t(gridDim.x) * blockDim.y;
  const int64_t first_row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (first_row >= rows) return;  // the whole team returns together, here and below
  const int classes = int(p.classes), lane = threadIdx.x % kWarp;
  const int begin = !kAgain && records ? int(blockIdx.y) * columns : 0;
  const int end = !kAgain && records && columns < classes - begin ? begin + columns : classes;
  uint4* kept = kAgain && kept_vectors > 0 ? shared + int(threadIdx.y) * kept_vectors : nullptr;
  T* grad = nullptr;
  if (kAgain && f.grad) grad = static_cast<T*>(f.grad) + row_offset(p, f.grad_strides, first_row);
  const auto span_of = [&](int64_t row) {
    const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
    return make_span<T>(x, p.x_strides.cls, begin, end, grad, f.grad_strides.cls);
  };
  RowSpan<T> span = span_of(first_row);
  Ahead<T, K, A> ahead;
  start_row(span, span.vector_data(), &ahead);
  const int count = kAgain ? 1 : per_team;
  int label = kIgnored;  // lane r: of the team's row r
  if (!kMore && lane < count && first_row + lane * step < rows) {
    label = plain_label(p, first_row + lane * step);
  }

  RowState<R> mine;  // lane r of the first warp: of row r
  int merges = 0;
  for (int r = 0; r < count; ++r) {
    const int64_t row = first_row + r * step;
    if (row >= rows) break;
    RowTarget<R> t{};
    bool counts, valid;
    if constexpr (kMore) {
      counts = load_target(p, row, &t);
      valid = counts && target_in_range(p, t);
    } else {
      const int y = __shfl_sync(kFullMask, label, r);
      counts = y != kIgnored;
      valid = y >= 0;
      t.y = y;
      t.y2 = -1;
    }
    RowView<R> v = make_view(p, t, row, kMore && f.extras != nullptr, kMore && f.index != nullptr);
    RowState<R> s;
    if (valid) {
      if (kMore && v.index) read_labels<M>(transform, span.x, &v);
      for_each_batch(span, span.vector_data(), kept, &ahead,
                     [&](auto width, auto& z, int first, int step, int limit) {
                       constexpr int V = decltype(width)::value;
                       transform_batch<M, V>(transform, z, first, step, limit);
                       accumulate<M, V>(v, z, first, step, limit, &s);
                     });
      if (kMore) team_merge<M>(v, &s, &slots[merges++ & 1], true);
      // A sum that is not a number may come from one: then the first of them is the argmax.
      if (kMore && v.index && (s.part.rest != s.part.rest || v.zy != v.zy)) {
        for (int c = end - 1 - int(threadIdx.x); c >= begin; c -= int(blockDim.x)) {
          const R value = to_real(span.x[int64_t(c) * span.cls]);
          if (value != value) s.first_nan = c;
        }
        s.first_nan = team_reduce(s.first_nan, MinOp{}, kNoClass, nan_slots);
      }
    }
    if (r + 1 < count && row + step < rows) {
      span = span_of(row + step);
      start_row(span, span.vector_data(), &ahead);
    }
    if (!kMore && valid) team_merge<M>(v, &s, &slots[merges++ & 1], false);
    if constexpr (kAgain) {
      walk_again<M, T>(p, transform, f, row, span, kept, grad, counts, valid, v.y, s, &ahead);
    } else if (records) {
      if (valid && threadIdx.x == 0) records[row * gridDim.y + blockIdx.y] = s;
      return;
    } else if (lane == r) {
      mine = s;
    }
  }
  // The team's rows, a lane each.
  const int64_t row = first_row + lane * step;
  if (kAgain || threadIdx.x >= kWarp || lane >= count || row >= rows) return;
  finish_row<M, T>(p, transform, f, row, mine);
}

// One warp per row merges the records of its column ranges.
template <class T, Mode M>
__global__ void __launch_bounds__(kWarp)
    row_softmax_split_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                             RowSoftmaxForward f, const RowState<RealOf<T>>* records, int splits) {
  using R = RealOf<T>;
  const int64_t row = blockIdx.x;
  RowTarget<R> t;
  RowState<R> s;
  if (load_target(p, row, &t) && target_in_range(p, t)) {
    const RowView<R> v = make_view(p, t, row, f.extras != nullptr, f.index != nullptr);
    const RowState<R>* own = records + row * splits;
    for (int i = threadIdx.x; i < splits; i += kWarp) merge_state(&s, own[i], v.index);
    warp_merge<M>(v, &s);
    s.first_nan = warp_reduce(s.first_nan, MinOp{});
  }
  if (threadIdx.x == 0) finish_row<M, T>(p, transform, f, row, s);
}

// ---- Launches ----------------------------------------------------------------------------------

// Column ranges per row; 1 where rows alone fill the device, or a second walk needs the whole row.
int64_t split_count(const RowSoftmaxProblem& p) {
  const int64_t vectors = vectors_per_row(p);
  if (use_alone(p) || vectors <= kSplitVectors || p.rows() == 0) return 1;
  if (two_pass_soft(p)) return 1;
  const int64_t wanted =
      ceil_div(2 * int64_t(device_attribute(cudaDevAttrMultiProcessorCount)), p.rows());
  return std::clamp<int64_t>(wanted, 1, std::min(kMaxSplits, ceil_div(vectors, kSplitVectors)));
}

int64_t record_bytes(const RowSoftmaxProblem& p) {
  return p.dtype == DType::kF64 ? sizeof(RowState<double>) : sizeof(RowState<float>);
}

// Vectors of one row to keep in shared memory, so that at least two blocks fit on an SM; 0: none.
int64_t kept_vectors(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int teams) {
  if (!(f.grad || two_pass_soft(p)) || p.x_strides.cls != 1) return 0;
  const int64_t vectors = p.classes / (16 / dtype_size(p.dtype));
  return vectors * teams * 16 <= shared_bytes_of_half() ? vectors : 0;
}

template <class T, Mode M>
void forward_rows(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                  const KnownNorm<RealOf<T>>& norm, void* scratch, void* stream) {
  using R = RealOf<T>;
  const RowTransform<R> transform(p.options);
  const int64_t vector = 16 / dtype_size(p.dtype);
  const int64_t columns = ceil_div(ceil_div(p.classes, split_count(p)), vector) * vector;
  const int64_t splits = ceil_div(p.classes, columns);
  const int threads = splits > 1 ? kLongTeam : team_threads(p), teams = teams_of_block(threads);
  RowSoftmaxForward rows = f;
  if (splits > 1) rows.grad = nullptr;
  RowState<R>* records = splits > 1 ? static_cast<RowState<R>*>(scratch) : nullptr;
  const int64_t kept = splits > 1 ? 0 : kept_vectors(p, rows, teams);
  const bool again = splits == 1 && (rows.grad || two_pass_soft(p));
  const int per_team =
      splits > 1 || again ? 1 : rows_per_team(p, teams, resident_blocks<T, M>(threads * teams));
  launch(again ? row_softmax_fwd_kernel<T, M, true> : row_softmax_fwd_kernel<T, M, false>,
         dim3(grid_size(ceil_div(p.rows(), teams * per_team)), unsigned(splits)),
         dim3(unsigned(threads), unsigned(teams)), size_t(kept * teams * 16), stream, p, transform,
         rows, norm, records, int(columns), int(kept), per_team);
  if (splits == 1) return;
  launch(row_softmax_split_kernel<T, M>, dim3(grid_size(p.rows())), dim3(kWarp), 0, stream, p,
         transform, f, static_cast<const RowState<R>*>(records), int(splits));
  if (f.grad) {
    row_softmax_backward(p, {nullptr, nullptr, f.stats, f.norm, nullptr, f.grad, f.grad_strides},
                         stream);
  }
}

template <class T>
void forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch, void* stream) {
  using R = RealOf<T>;
  KnownNorm<R> norm(p);
  if (p.rows() == 0) norm.known = false;  // only the reduction of nothing is left
  if (!norm.known) compute_norm<R>(p, f, scratch, stream);
  if (p.rows() == 0) {
  } else if (use_alone(p)) {
    row_softmax_forward_alone<T>(p, f, norm, stream);
  } else if (launch_cluster_forward<T>(p, f, norm, stream)) {
  } else if constexpr (std::is_same_v<T, double>) {
    forward_rows<T, Mode::kSoft>(p, f, norm, scratch, stream);
  } else {
    switch (mode_of(p, f.extras || f.index)) {
      case Mode::kPlain:
        forward_rows<T, Mode::kPlain>(p, f, norm, scratch, stream);
        break;
      case Mode::kOptions:
        forward_rows<T, Mode::kOptions>(p, f, norm, scratch, stream);
        break;
      default:
        forward_rows<T, Mode::kSoft>(p, f, norm, scratch, stream);
    }
  }
  sum_losses<R>(p, f, scratch, stream);
}

}  // namespace

int64_t row_softmax_scratch_bytes(const RowSoftmaxProblem& p) {
  const int64_t most = std::max(p.rows(), p.weight ? p.classes : 0);
  int64_t bytes = most > kSumRows ? kMaxSumBlocks * int64_t(sizeof(NormSums)) : 0;
  const int64_t splits = split_count(p);
  if (splits > 1) bytes = std::max(bytes, p.rows() * splits * record_bytes(p));
  return bytes;
}

void row_softmax_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch,
                         int64_t scratch_bytes, void* stream) {
  check_classes(p);
  if (scratch_bytes < row_softmax_scratch_bytes(p)) {
    throw std::invalid_argument("row_softmax: the scratch memory is too small");
  }
  dispatch_float(p.dtype, [&](auto tag) { forward<decltype(tag)>(p, f, scratch, stream); });
}

}  // namespace pyloss::cuda
