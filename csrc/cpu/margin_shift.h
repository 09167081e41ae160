// How far margins moved between two sets of logits, on the CPU.
#pragma once

#include "common/margin_shift.h"

namespace pyloss::cpu {

void margin_shift_forward(const margin_shift::Problem& p,
                          void* shift,  // float, or double for doubles, [rows]
                          void* total,  // the same, sum_j (e_y - e_j)
                          int threads);

void margin_shift_backward(const margin_shift::Problem& p, const margin_shift::Backward& b,
                           int threads);

}  // namespace pyloss::cpu
