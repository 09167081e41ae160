// Host functions that the files of the CUDA row_softmax share: which kernel takes a call, and in
// what shape it is launched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"

namespace pyloss::cuda {

// The least mode that can do the problem. The double kernels exist in the last one only.
inline Mode mode_of(const RowSoftmaxProblem& p, bool extras) {
  if (p.dtype == DType::kF64 || p.soft()) return Mode::kSoft;
  const RowSoftmaxOptions& o = p.options;
  const bool options = p.kind == TargetKind::kMix || o.softcap > 0 || o.smoothing > 0 ||
                       o.margin != 0 || o.loss > LossKind::kFocal || extras;
  return options ? Mode::kOptions : Mode::kPlain;
}

inline void check_classes(const RowSoftmaxProblem& p) {
  if (p.classes > kMaxClasses) throw std::invalid_argument("row_softmax: too many classes");
}

// Classes that lie far apart, of neighbouring rows that are adjacent in memory.
inline bool transposed(const RowSoftmaxProblem& p) {
  const bool adjacent = (p.inner > 1 ? p.x_strides.inner : p.x_strides.outer) == 1;
  return p.x_strides.cls != 1 && adjacent;
}

// A thread per row where rows are short, or transposed and enough to fill warps; a team per row
// otherwise.
inline bool use_alone(const RowSoftmaxProblem& p) {
  return p.classes <= kWarp || (transposed(p) && p.rows() >= 1024);
}

// Blocks of a team kernel that the device holds at a time.
template <class T, Mode M>
int64_t resident_blocks(int threads) {
  return int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * kBlocksPerSm<T, M> *
         (kLongTeam / threads);
}

inline int64_t vectors_per_row(const RowSoftmaxProblem& p) {
  return (p.classes * dtype_size(p.dtype) + 15) / 16;
}

// A row longer than this is worth splitting among blocks when there are few rows.
inline constexpr int64_t kSplitVectors = 1024;

inline int team_threads(const RowSoftmaxProblem& p) {
  const int64_t vectors = vectors_per_row(p);
  if (vectors <= 256) return kWarp;
  if (vectors <= kSplitVectors) return 128;
  return kLongTeam;
}

// Teams of a block: more than one of them only where each is a warp, so that a team may use the
// block's barrier.
inline constexpr int kMostTeams = 4;
inline int teams_of_block(int threads) {
  return threads == kWarp ? kMostTeams : 1;
}

// Rows that one team takes after the other, so that one wave of blocks is enough.
inline int rows_per_team(const RowSoftmaxProblem& p, int teams, int64_t resident_blocks) {
  return int(std::clamp<int64_t>(ceil_div(p.rows(), teams * resident_blocks), 1, kMostRows));
}

// row_softmax_alone.cu: one thread per row.
template <class T>
void row_softmax_forward_alone(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                               const KnownNorm<RealOf<T>>& norm, void* stream);
template <class T>
void row_softmax_backward_alone(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b,
                                void* stream);

// row_softmax_cluster.cu: a row per thread-block cluster. False: not used for this call.
template <class T>
bool launch_cluster_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f,
                            const KnownNorm<RealOf<T>>& norm, void* stream);

}  // namespace pyloss::cuda
