// Row softmax over logits whose classes are not contiguous: (N, C, d1, ..., dk), transposed
// matrices, mixed layouts; and over contiguous rows too narrow for a SIMD loop of their own. Any
// strides; inner stride 1 is the fast one.
#pragma once

#include "common/row_softmax.h"

namespace pyloss::cpu {

// `f.norm` is filled already; the loss is summed by the caller.
template <class R>
void strided_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads);
template <class R>
void strided_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads);

}  // namespace pyloss::cpu
