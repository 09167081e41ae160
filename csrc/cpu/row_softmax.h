// CPU kernels of the row-softmax op; see common/row_softmax.h for the formulas and the structs.
#pragma once

#include "common/row_softmax.h"

namespace pyloss::cpu {

// Throws std::out_of_range for a label outside [0, classes).
void row_softmax_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads);
void row_softmax_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads);
void row_softmax_hvp(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, int threads);

// data *= *factor (float, or double for fp64 data); returns at once when it is 1.
void scale_inplace(void* data, DType t, int64_t n, const void* factor, int threads);

}  // namespace pyloss::cpu
