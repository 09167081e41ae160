// Lion-K on the GPU, one step of many tensors.
#pragma once

#include "common/lion_k.h"

namespace pyloss {
namespace cuda {

// Numbers that are on the device, or null: they take the place of those in the options. Where
// found_inf is not 0 nothing is written.
struct LionKScalars {
  const float* lr;
  const float* found_inf;
  const float* step;
};

void lion_k_step(const lion_k::Problem& p, const LionKScalars& scalars, void* stream);

}  // namespace cuda
}  // namespace pyloss
