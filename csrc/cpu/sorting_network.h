// Differentiable sorting networks on batches of rows: values, features, permutation, fused loss.
// Formulas: common/sorting_network.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/sorting_network.h"

namespace pyloss {
namespace cpu {

struct SortingProblem {
  const void* x;  // [items][n], float32 or float64, as are all arrays without a type here
  DType dtype;
  int64_t items;
  int32_t n;
  sorting::Network network;
  sorting::Distribution distribution;
  double steepness, art_lambda;
  // Of a network without a formula: pairs (lo, hi) of wires, and where each layer starts.
  const int32_t* table;    // [first[layers]][2]
  const int32_t* offsets;  // [layers + 1]
  int32_t layers;
};

void sorting_sort(const SortingProblem& p, void* y, int threads);
void sorting_sort_backward(const SortingProblem& p, const void* gy, void* gx, int threads);

// out = P^T f (transpose) or P f. f is [items][n][d], or [n][d] where it is shared.
struct SortingFeatures {
  const void* f;
  bool shared, transpose;
  int64_t d;
};
void sorting_apply(const SortingProblem& p, const SortingFeatures& f,
                   void* out,  // [items][n][d]
                   int threads);
void sorting_apply_backward(const SortingProblem& p, const SortingFeatures& f,
                            const void* g,       // [items][n][d]
                            void* gx, void* gf,  // gf: of f's shape, or null
                            int threads);

void sorting_permutation(const SortingProblem& p, void* y, void* permutation, int threads);
void sorting_permutation_backward(const SortingProblem& p, const void* gy,  // or null
                                  const void* gp, void* gx, int threads);

enum class SortingLoss : int32_t { kBce = 0, kRowCe = 1, kColCe = 2 };
enum class TargetOrder : int32_t {
  kRanks = 0,
  kValues = 1,
  kDescending = 2,
  kShared = 3,
  kSharedDescending = 4
};
// The target of element i is uniform over the ranks first[i] <= r < first[i] + count[i]. They are
// given, or those of values; a row of values with a NaN has the loss and the gradient NaN.
struct SortingTargets {
  TargetOrder order;
  const void* target;    // [items][n]: first, or values of float64, float32, int64 or int32
  DType dtype;           // of values
  const int32_t* count;  // [items][n], null for one rank each; of no meaning for values
  SortingLoss kind;
};
enum class Reduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };
void sorting_loss(const SortingProblem& p, const SortingTargets& targets, Reduction reduction,
                  void* loss,  // [items], or one reduced over the items
                  void* gx,    // [items][n], the gradient of the loss (of each item of its own)
                  int threads);

}  // namespace cpu
}  // namespace pyloss
