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

struct SortingCall {
  SortingTask task;
  sorting::Features features;  // kApply*
  sorting::Loss loss_kind;
  const void* g;         // gradient of out: (items, n, width), or of P: (items, n, n)
  const void* gy;        // (items, n); may be null
  const int32_t* first;  // kLoss, (items, n): the target of element i is uniform over the ranks
  const int32_t* count;  // first[i] <= r < first[i] + count[i]; null: one rank
  void* y;               // (items, n)
  void* out;
  void* loss;             // (items,)
  void* gx;               // (items, n); kLoss: may be null
  void* gf;               // of f's shape; may be null
  int64_t scratch_limit;  // bytes, a wish; 0: 1 GiB
};

int64_t sorting_scratch_bytes(const sorting::Problem& p, const SortingCall& call);

void sorting_run(const sorting::Problem& p, const SortingCall& call, void* scratch,
                 int64_t scratch_bytes, void* stream);

}  // namespace pyloss::cuda
