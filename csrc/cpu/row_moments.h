// Moments of rows of class scores, and gradients of what depends on them: common/row_moments.h.
#pragma once

#include "common/row_moments.h"

namespace pyloss::cpu {

void row_moments_forward(const row_moments::Problem& p,
                         void* moments,  // [kCount][rows], fp32, fp64 for fp64 input
                         int threads);

void row_moments_backward(const row_moments::Problem& p, const row_moments::Backward& b,
                          int threads);

}  // namespace pyloss::cpu
