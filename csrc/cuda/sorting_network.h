// CUDA entry points of sorting_network. Everything is enqueued on `stream` of the current device:
// nothing is allocated, nothing waits for the device, and all calls can be captured in a graph.
// Formulas: common/sorting_network.h; which kernel does what: sorting_network.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/sorting_network.h"

namespace pyloss::cuda {

// The largest n with P and fused losses; values and features go on to kSortingMaxWires.
inline constexpr int64_t kSortingMaxRow = 4096;
inline constexpr int64_t kSortingMaxWires = int64_t{1} << 24;

struct SortingProblem {
  int64_t items, n;
  sorting::Network network;
  sorting::Distribution distribution;
  double steepness, art_lambda;
  DType dtype;             // kF32 or kF64, of every floating array below
  const void* x;           // (items, n)
  const int32_t* table;    // kSplitter: (comparators, 2) wires (lo, hi), on the device
  const int32_t* offsets;  // kSplitter: (layers + 1), on the device
  int64_t table_layers;
  int64_t scratch_limit;  // bytes, a wish; 0: 1 GiB
};

enum class SortingTask : int32_t {
  kSort = 0,          // y
  kSortBackward = 1,  // gx from gy
  kApply = 2,         // out from f
  kApplyBackward = 3,
  kPermutation = 4,  // y and out = P
  kPermutationBackward = 5,
  kLoss = 6,  // loss, and gx if it is wanted
};
inline constexpr int kSortingTaskCount = 7;

enum class SortingLoss : int32_t { kBce = 0, kRow = 1, kColumn = 2 };

struct SortingCall {
  SortingTask task;
  // kApply*: out = P^T f (transpose) or P f, f of shape (items or 1, n, width).
  int64_t width;
  bool transpose, one_f;
  SortingLoss loss_kind;
  const void* f;
  const void* g;         // gradient of out: (items, n, width), or of P: (items, n, n)
  const void* gy;        // (items, n); may be null
  const int32_t* first;  // kLoss, (items, n): the target of element i is uniform over the ranks
  const int32_t* count;  // first[i] <= r < first[i] + count[i]; null: one rank
  void* y;               // (items, n)
  void* out;
  void* loss;  // (items,)
  void* gx;    // (items, n); kLoss: may be null
  void* gf;    // of f's shape; may be null
};

int64_t sorting_scratch_bytes(const SortingProblem& p, const SortingCall& call);

void sorting_run(const SortingProblem& p, const SortingCall& call, void* scratch,
                 int64_t scratch_bytes, void* stream);

}  // namespace pyloss::cuda
