// Row softmax, forward. Formulas: common/row_softmax.h; device code of a row: row_softmax.cuh.
//
// Decomposition: a team of threads (one warp for short rows, one block for longer ones) owns a row
// and streams over it once: every thread keeps the mergeable statistics (max, rest, ...) of the
// vectors it has seen, and the team merges them. When rows are too few to fill the device, a row is
// cut into column ranges: grid (row, range), one record per range in scratch memory, and a second
// kernel merges the records in index order. Rows of at most 32 classes, and rows whose classes lie
// far apart (N, C, d1, ...), go to one thread each (row_softmax_alone.cu).
// Two small kernels surround this one: the denominators of 'mean' before it, the sum of the row
// losses after it.
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
constexpr int64_t kSumRows = 16 * kSumThreads;  // of one block
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

int64_t sum_blocks(int64_t n) {
  return std::clamp<int64_t>(ceil_div(n, kSumRows), 1, kMaxSumBlocks);
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

// One column range of a row, on its way to row_softmax_split_kernel.
template <class R>
struct alignas(16) SplitRecord {
  RowState<R> state;
  R zy, zy2;
};

constexpr int64_t kMaxSplits = 128;

// Team per row, or per column range of a row when `records` is not null. `kept_vectors` > 0: shared
// memory holds that many vectors per row.
template <class T, Mode M>
__global__ void __launch_bounds__(kLongTeam, kBlocksPerSm<T, M>)
    row_softmax_fwd_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                           RowSoftmaxForward f, SplitRecord<RealOf<T>>* records, int columns,
                           int kept_vectors) {
  using R = RealOf<T>;
  constexpr int K = kBatch<M>;
  constexpr bool kMore = M != Mode::kPlain;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ TeamSlots<R> slots;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows()) return;  // the whole team returns together, here and below
  T* grad = f.grad ? static_cast<T*>(f.grad) + row_offset(p, f.grad_strides, row) : nullptr;
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);

  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    if (records) return;
    if (threadIdx.x == 0) store_ignored<R>(p, f, row);
    if (grad) {
      for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) {
        grad[c * f.grad_strides.cls] = from_real<T>(R(0));
      }
    }
    return;
  }
  const bool valid = target_in_range(p, t);
  RowView<R> v = make_view(p, t, row, kMore && f.extras != nullptr, kMore && f.index != nullptr);
  const int classes = int(p.classes);
  const int begin = records ? int(blockIdx.y) * columns : 0;
  const int end = records && columns < classes - begin ? begin + columns : classes;
  const RowSpan<T> span = make_span<T>(x, p.x_strides.cls, begin, end, grad, f.grad_strides.cls);
  uint4* kept = kept_vectors > 0 ? shared + int(threadIdx.y) * kept_vectors : nullptr;

  RowResult<R> r;
  if (valid) {
    read_labels(transform, x, &v);
    RowState<R> s = start_state(v);
    for_each_batch<K>(span, kept ? Walk::kKeep : Walk::kPlain, kept,
                      [&](auto width, auto& z, int first, int step, int limit) {
                        constexpr int V = decltype(width)::value;
                        transform_batch<V>(transform, z, first, step, limit);
                        accumulate<M, V>(v, z, first, step, limit, &s);
                      });
    team_merge<M>(v, &s, &slots);
    // A sum that is not a number may come from one: then the first of them is the argmax.
    if (kMore && v.index && (s.part.rest != s.part.rest || v.zy != v.zy)) {
      for (int c = end - 1 - int(threadIdx.x); c >= begin; c -= int(blockDim.x)) {
        const R value = to_real(x[int64_t(c) * p.x_strides.cls]);
        if (value != value) s.first_nan = c;
      }
      s.first_nan = team_reduce(s.first_nan, MinOp{}, kNoClass, slots.integer[2]);
    }
    if (records) {
      if (threadIdx.x == 0) records[row * gridDim.y + blockIdx.y] = {s, v.zy, v.zy2};
      return;
    }
    r = finish_state(v, s);
    if (M == Mode::kSoft && two_pass_soft(p)) {
      SoftSums<R> sums;
      for_each_batch<K>(span, kept ? Walk::kReplay : Walk::kPlain, kept,
                        [&](auto width, auto& z, int first, int step, int limit) {
                          constexpr int V = decltype(width)::value;
                          transform_batch<V>(transform, z, first, step, limit);
                          accumulate_soft<V>(v, r.terms, z, first, step, limit, &sums);
                        });
      r.soft.mass = team_reduce(sums.mass, AddOp{}, R(0), slots.real[5]);
      r.soft.loss = team_reduce(sums.loss, AddOp{}, R(0), slots.real[6]);
    }
  } else {
    if (records) return;
    r = poisoned_result(&v);
  }
  if (threadIdx.x == 0) store_result(f, row, v, r);
  if (!grad) return;

  const R weight_sum = static_cast<const R*>(f.norm)[kNormWeightSum];
  const GradRow<R> g = make_grad_row(
      r.terms,
      row_coeffs(p, t, r.terms, unit_upstream<R>(f.norm, t.token), weight_sum, r.soft.mass), v.zy);
  for_each_batch<K>(span, kept && valid ? Walk::kReplay : Walk::kPlain, kept,
                    [&](auto width, auto& z, int first, int step, int limit) {
                      constexpr int V = decltype(width)::value;
                      transform_batch<V>(transform, z, first, step, limit);
                      gradient_batch<M, V>(v, transform, g, z, first, step, limit);
                      store_batch<T, V>(grad, f.grad_strides.cls, z, first, step, limit);
                    });
}

// One warp per row merges the records of its column ranges.
template <class R>
__global__ void __launch_bounds__(kWarp)
    row_softmax_split_kernel(RowSoftmaxProblem p, RowSoftmaxForward f,
                             const SplitRecord<R>* records, int splits) {
  __shared__ TeamSlots<R> slots;
  const int64_t row = blockIdx.x;
  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    if (threadIdx.x == 0) store_ignored<R>(p, f, row);
    return;
  }
  RowView<R> v = make_view(p, t, row, f.extras != nullptr, f.index != nullptr);
  RowResult<R> r;
  if (target_in_range(p, t)) {
    const SplitRecord<R>* own = records + row * splits;
    v.zy = own[0].zy;
    v.zy2 = own[0].zy2;
    RowState<R> s = start_state(v);
    for (int i = threadIdx.x; i < splits; i += kWarp) {
      const RowState<R>& next = own[i].state;
      if (v.index) {
        if (next.part.m > s.part.m) s.argmax = kNoClass;
        if (next.part.m >= s.part.m && next.argmax < s.argmax) s.argmax = next.argmax;
        s.rank += next.rank;
        if (next.first_nan < s.first_nan) s.first_nan = next.first_nan;
      }
      s.part = merge(s.part, next.part);
    }
    team_merge<Mode::kSoft>(v, &s, &slots);
    s.first_nan = warp_reduce(s.first_nan, MinOp{});
    r = finish_state(v, s);
  } else {
    r = poisoned_result(&v);
  }
  if (threadIdx.x == 0) store_result(f, row, v, r);
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
  return p.dtype == DType::kF64 ? sizeof(SplitRecord<double>) : sizeof(SplitRecord<float>);
}

// Vectors of one row to keep in shared memory, so that at least two blocks fit on an SM; 0: none.
int64_t kept_vectors(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int teams) {
  if (!(f.grad || two_pass_soft(p)) || p.x_strides.cls != 1) return 0;
  const int64_t vectors = p.classes / (16 / dtype_size(p.dtype));
  const int64_t reserved = 8 * 1024;  // the runtime's share, and the reductions' static memory
  const int64_t available =
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - reserved;
  return vectors * teams * 16 <= available ? vectors : 0;
}

template <class T>
void forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch, void* stream) {
  using R = RealOf<T>;
  compute_norm<R>(p, f, scratch, stream);
  const int64_t vector = 16 / dtype_size(p.dtype);
  const int64_t columns =
      std::max<int64_t>(1, ceil_div(ceil_div(p.classes, split_count(p)), vector)) * vector;
  const int64_t splits = ceil_div(p.classes, columns);
  if (p.rows() == 0) {
    // Only the reduction of nothing is left.
  } else if (use_alone(p)) {
    row_softmax_forward_alone<T>(p, f, stream);
  } else if (!launch_cluster_forward<T>(p, f, stream)) {
    const RowTransform<R> transform(p.options);
    const int threads = splits > 1 ? kLongTeam : team_threads(p), teams = threads == kWarp ? 4 : 1;
    RowSoftmaxForward rows = f;
    if (splits > 1) rows.grad = nullptr;
    SplitRecord<R>* records = splits > 1 ? static_cast<SplitRecord<R>*>(scratch) : nullptr;
    const int64_t kept = splits > 1 ? 0 : kept_vectors(p, rows, teams);
    auto* kernel = row_softmax_fwd_kernel<T, Mode::kSoft>;
    if constexpr (!std::is_same_v<T, double>) {
      const Mode mode = mode_of(p, f.extras || f.index);
      if (mode == Mode::kPlain) kernel = row_softmax_fwd_kernel<T, Mode::kPlain>;
      if (mode == Mode::kOptions) kernel = row_softmax_fwd_kernel<T, Mode::kOptions>;
    }
    launch(kernel, dim3(grid_size(ceil_div(p.rows(), teams)), unsigned(splits)),
           dim3(unsigned(threads), unsigned(teams)), size_t(kept * teams * 16), stream, p,
           transform, rows, records, int(columns), int(kept));
    if (splits > 1) {
      launch(row_softmax_split_kernel<R>, dim3(grid_size(p.rows())), dim3(kWarp), 0, stream, p, f,
             static_cast<const SplitRecord<R>*>(records), int(splits));
      if (f.grad) {
        row_softmax_backward(
            p, {nullptr, nullptr, f.stats, f.norm, nullptr, f.grad, f.grad_strides}, stream);
      }
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
