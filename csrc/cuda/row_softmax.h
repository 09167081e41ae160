// CUDA entry points of row_softmax. Everything is enqueued on `stream` of the current device:
// nothing is allocated, nothing waits for the device, and all calls can be captured in a graph.
#pragma once

#include <cstdint>

#include "common/row_softmax.h"

namespace pyloss::cuda {

// Bytes of device memory, aligned to 16, that the forward pass needs besides its outputs. Depends
// on the current device.
int64_t row_softmax_scratch_bytes(const RowSoftmaxProblem& p);

void row_softmax_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, void* scratch,
                         int64_t scratch_bytes, void* stream);

// A null grad_loss stands for an upstream gradient of 1.
void row_softmax_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, void* stream);

// Labels only: soft targets (RowSoftmaxProblem::soft) are refused.
void row_softmax_hvp(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, void* stream);

// data *= *factor (R, on the device). The kernel returns at once when the factor is 1.
void scale_inplace(void* data, DType dtype, int64_t n, const void* factor, void* stream);

}  // namespace pyloss::cuda
