// CPU kernels of the row-softmax op; see common/row_softmax.h for the formulas and the structs.
#pragma once

#include "common/row_softmax.h"

namespace pyloss::cpu {

// Throws std::out_of_range for a label outside [0, classes).
void row_softmax_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads);
void row_softmax_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads);
void row_softmax_hvp(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, int threads);

// The plain cross entropy of contiguous rows on the calling thread, for callers to whom packed
// arguments and a buffer for the statistics would cost more than the work.
struct SmallRowSoftmax {
  int64_t rows, classes;
  const float* x;
  const void* target;
  DType target_dtype;
  int64_t ignore_index;
  bool mean;  // or the sum
  float* loss;
  float* grad;  // for an upstream 1; null: not wanted
};
void small_row_softmax(const SmallRowSoftmax& p);

// data *= *factor (float, or double for fp64 data); returns at once when it is 1.
void scale_inplace(void* data, DType t, int64_t n, const void* factor, int threads);

}  // namespace pyloss::cpu
