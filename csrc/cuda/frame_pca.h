// Principal axes of clouds of points, and gradients of what depends on them, on the GPU.
#pragma once

#include "common/frame_pca.h"

namespace pyloss::cuda {

void frame_pca_forward(const frame_pca::Problem& p,
                       void* frames,  // [clouds][kWidth], fp32, fp64 for fp64 points
                       void* stream);

void frame_pca_backward(const frame_pca::Problem& p, const frame_pca::Backward& b, void* stream);

}  // namespace pyloss::cuda
