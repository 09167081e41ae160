// Lion-K, one step of many tensors in one call.
#pragma once

#include "common/lion_k.h"

namespace pyloss::cpu {

void lion_k_step(const lion_k::Problem& p, int threads);

}  // namespace pyloss::cpu
