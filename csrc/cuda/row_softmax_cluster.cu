// Row softmax, forward with the gradient, one row per thread-block cluster. Off unless
// PYLOSS_CUDA_CLUSTER=1: no run on a device has confirmed this path yet. Formulas:
// common/row_softmax.h; device code of a row: row_softmax.cuh.
//
// Decomposition: the blocks of a cluster own equal column ranges of a row and keep them in shared
// memory. Each publishes its statistics, all read those of the others through distributed shared
// memory and merge them in rank order, and each writes its range of the gradient.
//
// Memory traffic per logit of b bytes: read b, write b, also for rows that one SM cannot hold.
// Numerics: as row_softmax.cu. Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include <cooperative_groups.h>

#include <cstdlib>
#include <cstring>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax.h"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

constexpr int kMaxCluster = 8;  // larger ones are not portable

template <class T>
__global__ void __launch_bounds__(kLongTeam)
    row_softmax_cluster_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> transform,
                               RowSoftmaxForward f, KnownNorm<RealOf<T>> norm, int columns) {
#if __CUDA_ARCH__ >= 900 || defined(PYLOSS_CUDA_SHIM)
  namespace cg = cooperative_groups;
  using R = RealOf<T>;
  Ahead<T, kBatch<Mode::kPlain, true>, kAhead<Mode::kPlain, true, true>> ahead;
  PYLOSS_DYNAMIC_SHARED(uint4, kept);
  __shared__ TeamSlots<R> slots;
  __shared__ R published[2];
  __shared__ R shared_norm[kNormCount];
  norm.use(shared_norm, &f);
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  const int64_t row = blockIdx.x / blocks;  // all blocks of a cluster return together
  T* grad = static_cast<T*>(f.grad) + row_offset(p, f.grad_strides, row);
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
  const int begin = rank * columns, classes = int(p.classes);
  const int end = columns < classes - begin ? begin + columns : classes;

  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    if (rank == 0 && threadIdx.x == 0) store_ignored<R>(p, f, row);
    for (int c = begin + int(threadIdx.x); c < end; c += int(blockDim.x))
      grad[c] = from_real<T>(R(0));
    return;
  }
  const bool valid = target_in_range(p, t);
  RowView<R> v = make_view(p, t, row, false, false);
  const RowSpan<T> span = make_span<T>(x, 1, begin, end, grad, 1);
  RowResult<R> r;
  if (valid) {
    read_labels<Mode::kPlain>(transform, x, &v);
    RowState<R> s;
    start_row(span, span.vector_data(), &ahead);
    for_each_batch(span, span.vector_data(), kept, &ahead,
                   [&](auto width, auto& z, int first, int step, int limit) {
                     constexpr int V = decltype(width)::value;
                     transform_batch<Mode::kPlain, V>(transform, z, first, step, limit);
                     accumulate<Mode::kPlain, V>(v, z, first, step, limit, &s);
                   });
    team_merge<Mode::kPlain>(v, &s, &slots, false);
    if (threadIdx.x == 0) {
      published[0] = s.part.m;
      published[1] = s.part.rest;
    }
    cluster.sync();
    s.part = RowPart<R>{};
    for (int i = 0; i < blocks; ++i) {
      const R* other = cluster.map_shared_rank(published, i);
      RowPart<R> part;
      part.m = other[0];
      part.rest = other[1];
      s.part = merge(s.part, part);
    }
    cluster.sync();  // nobody leaves while its part may still be read
    r = finish_state<Mode::kPlain>(v, s);
  } else {
    r = poisoned_result(&v);
  }
  if (rank == 0 && threadIdx.x == 0) store_result(f, row, v, r);
  const R weight_sum = static_cast<const R*>(f.norm)[kNormWeightSum];
  const GradRow<R> g = make_grad_row<Mode::kPlain>(
      transform, r.terms,
      row_coeffs(p, t, r.terms, unit_upstream<R>(f.norm, t.token), weight_sum, r.soft.mass), v.zy);
  const uint4* again = valid ? kept : span.vector_data();
  start_row(span, again, &ahead);
  for_each_batch(span, again, nullptr, &ahead,
                 [&](auto width, auto& z, int first, int step, int limit) {
                   constexpr int V = decltype(width)::value;
                   transform_batch<Mode::kPlain, V>(transform, z, first, step, limit);
                   gradient_batch<Mode::kPlain, V>(v, transform, g, z, first, step, limit);
                   store_batch<T, V>(grad, 1, z, first, step, limit);
                 });
#endif
}

bool cluster_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("PYLOSS_CUDA_CLUSTER");
    return value && std::strcmp(value, "1") == 0;
  }();
  return wanted;
}

}  // namespace

template <class T>
bool launch_cluster_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                            const KnownNorm<RealOf<T>>& norm, void* stream) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    if (!cluster_wanted() || !f.grad || mode_of(p, f.extras || f.index) != Mode::kPlain ||
        p.x_strides.cls != 1 || f.grad_strides.cls != 1 ||
        device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) {
      return false;
    }
    const int64_t capacity = shared_bytes_of_half();
    int blocks = 1;
    while (blocks < kMaxCluster && ceil_div(vectors_per_row(p), blocks) * 16 > capacity) {
      blocks *= 2;
    }
    // One block is the ordinary kernel's case.
    const int64_t columns = ceil_div(vectors_per_row(p), blocks) * kVec<T>;
    if (blocks == 1 || columns / kVec<T> * 16 > capacity) return false;

    launch_clusters(row_softmax_cluster_kernel<T>, unsigned(blocks),
                    dim3(grid_size(p.rows() * blocks)), dim3(kLongTeam),
                    size_t(columns / kVec<T> * 16), stream, p, RowTransform<RealOf<T>>(p.options),
                    f, norm, int(columns));
    return true;
  }
}

#define PYLOSS_INSTANTIATE(T)                                                                 \
  template bool launch_cluster_forward<T>(const RowSoftmaxProblem&, const RowSoftmaxForward&, \
                                          const KnownNorm<RealOf<T>>&, void*);
PYLOSS_INSTANTIATE(double)
PYLOSS_INSTANTIATE(float)
PYLOSS_INSTANTIATE(BF16)
PYLOSS_INSTANTIATE(F16)
#undef PYLOSS_INSTANTIATE

}  // namespace pyloss::cuda
