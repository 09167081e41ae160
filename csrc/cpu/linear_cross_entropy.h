// What linear cross entropy needs on the CPU besides torch's products and the row-softmax kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyloss::cpu {

// total[i] = (first ? 0 : total[i]) + part[i]; total is double for fp64 parts, float for the rest.
void accumulate(void* total, const void* part, DType t, int64_t n, bool first, int threads);

// total[c] = (first ? 0 : total[c]) + sum_r x[r row_stride + c], r < rows, c < columns.
void column_sums(void* total, const void* x, DType t, int64_t rows, int64_t columns,
                 int64_t row_stride, bool first, int threads);

// A whole call on few rows: mean or sum of the cross entropy of x w^T + bias, and its gradients.
struct SmallLinearCrossEntropy {
  int64_t rows, classes, features;
  const float *x, *w, *bias;  // dense; bias may be null
  const void* target;         // [rows]
  DType target_dtype;
  int64_t ignore_index;
  bool mean;
  float *loss, *dx, *dw, *dbias;  // the gradients may be null
};
// Throws std::out_of_range for a label outside [0, classes).
void small_linear_cross_entropy(const SmallLinearCrossEntropy& p);

}  // namespace pyloss::cpu
