// Differentiable sorting networks on batches of rows: values, features, permutation, fused loss.
// Formulas: common/sorting_network.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"
#include "common/sorting_network.h"

namespace pyloss {
namespace cpu {

void sorting_sort(const sorting::Problem& p, void* y, int threads);
void sorting_sort_backward(const sorting::Problem& p, const void* gy, void* gx, int threads);

// out = P^T f or P f.
void sorting_apply(const sorting::Problem& p, const sorting::Features& f,
                   void* out,  // [items][n][width]
                   int threads);
void sorting_apply_backward(const sorting::Problem& p, const sorting::Features& f,
                            const void* g,       // [items][n][width]
                            void* gx, void* gf,  // gf: of f's shape, or null
                            int threads);

void sorting_permutation(const sorting::Problem& p, void* y, void* permutation, int threads);
void sorting_permutation_backward(const sorting::Problem& p, const void* gy,  // or null
                                  const void* gp, void* gx, int threads);

enum class TargetOrder : int32_t {
  kRanks = 0,
  kValues = 1,
  kDescending = 2,
  kShared = 3,
  kSharedDescending = 4
};
inline constexpr int kTargetOrderCount = 5;
// The target of element i is uniform over the ranks first[i] <= r < first[i] + count[i]. They are
// given, or those of values; a row of values with a NaN has the loss and the gradient NaN.
struct SortingTargets {
  TargetOrder order;
  const void* target;    // [items][n]: first, or values of float64, float32, int64 or int32
  DType dtype;           // of values
  const int32_t* count;  // [items][n], null for one rank each; of no meaning for values
  sorting::Loss kind;
};
void sorting_loss(const sorting::Problem& p, const SortingTargets& targets, Reduction reduction,
                  void* loss,  // [items], or one reduced over the items
                  void* gx,    // [items][n], the gradient of the loss (of each item of its own)
                  int threads);

}  // namespace cpu
}  // namespace pyloss
