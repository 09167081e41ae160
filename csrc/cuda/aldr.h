// ALDR-KL on the GPU. Everything is enqueued on `stream` of the current device.
#pragma once

#include "common/aldr.h"

namespace pyloss::cuda {

// As cpu/aldr.h has it. A label out of range makes its row NaN.
void aldr_forward(const aldr::Problem& p, void* stats, const void* factor, void* grad,
                  void* stream);
void aldr_backward(const aldr::Problem& p, const void* stats, const void* factor, void* grad,
                   void* stream);

}  // namespace pyloss::cuda
