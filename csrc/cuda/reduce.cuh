// Reductions over a warp and over a team. A team is all threads of a block with the same
// threadIdx.y: either one warp (several teams share a block) or the whole block.
//
// Partners exchange by xor, so every lane of every warp ends with the same bits, and the order of
// the additions depends on the team's size only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyloss::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

struct AddOp {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
// A NaN loses against a number: rows with NaN are told by their sum.
struct MaxOp {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};
struct MinOp {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

template <class V, class Op>
__device__ __forceinline__ V warp_reduce(V v, Op op) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(kFullMask, v, step));
  return v;
}

// `slots` is shared memory for kMaxWarps values that no other reduction of the kernel uses, which
// saves the second barrier.
template <class V, class Op>
__device__ __forceinline__ V team_reduce(V v, Op op, V identity, V* slots) {
  v = warp_reduce(v, op);
  if (blockDim.x <= kWarp) return v;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) slots[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_reduce(lane < int(blockDim.x) / kWarp ? slots[lane] : identity, op);
}

}  // namespace pyloss::cuda
