// Lion-K, one step of many tensors in one call.
#pragma once

#include <cstdint>

#include "common/lion_k.h"

namespace pyloss::cpu {

// One parameter; all arrays have n elements in the same order.
struct LionKTensor {
  void* x;
  const void* g;
  void* m;
  const void* given;   // dK(c) as float or double; Kappa::kGiven only
  void* compensation;  // dtype of x; Rounding::kCompensated only
  int64_t n;
  int64_t position;  // tells the random numbers of tensors apart
};

struct LionKProblem {
  const LionKTensor* tensors;
  const int64_t* first;  // [count + 1], padded elements before each tensor (lion_k_padded)
  int64_t count;
  DType x_dtype, g_dtype, m_dtype;
  lion_k::Options options;
};

// Elements of a tensor, rounded up so that ranges of elements begin at whole vectors.
inline int64_t lion_k_padded(int64_t n) {
  return (n + 63) / 64 * 64;
}

void lion_k_step(const LionKProblem& p, int threads);

}  // namespace pyloss::cpu
