// Principal axes of clouds of points, and gradients of what depends on them, on the CPU.
#pragma once

#include "common/frame_pca.h"

namespace pyloss::cpu {

void frame_pca_forward(const frame_pca::Problem& p,
                       void* frames,  // [clouds][kWidth], fp32, fp64 for fp64 points
                       int threads);

void frame_pca_backward(const frame_pca::Problem& p, const frame_pca::Backward& b, int threads);

}  // namespace pyloss::cpu
