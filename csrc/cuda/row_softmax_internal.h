// Host functions that the files of the CUDA row_softmax share.
#pragma once

#include "cuda/row_softmax.cuh"

namespace pyloss::cuda {

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
