// ALDR-KL on the CPU. Formulas: common/aldr.h.
#pragma once

#include "common/aldr.h"

namespace pyloss::cpu {

// `grad`, where it is not null, is the gradient of the sum of the rows' losses times `factor`.
void aldr_forward(const aldr::Problem& p,
                  void* stats,         // R [kStatCount][rows]
                  const void* factor,  // R [rows]; with grad only
                  void* grad,          // [rows][classes] or null
                  int threads);

void aldr_backward(const aldr::Problem& p, const void* stats, const void* factor, void* grad,
                   int threads);

}  // namespace pyloss::cpu
