// A stand-in for the CUDA runtime: kernels run as C++ on the CPU, one fiber per thread, one block
// after the other. It finds wrong indices, missing barriers (by running the threads in several
// orders) and barriers that not every thread reaches (reported, not hung); in a program built with
// -fsanitize=thread it finds races (scheduler.cpp says by which model). It refuses a launch where
// the driver would, with the driver's code. It does not model warp scheduling.
//
// The header is compiled with the kernels. The rest, a library, is never instrumented.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.h"
#include "shim.h"

#define PYLOSS_CUDA_SHIM 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// The bound stands as so many no-operations at the start of the kernel: kernels.cpp counts them.
// (gcc leaves a constant in a template unfolded, but not a size.)
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry(sizeof(char[threads]))))
// A system thread runs one block at a time, and its thread_local variables are these and nothing
// else: one range to fill with something and to watch. AddressSanitizer misses overruns of them.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace shim {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T exchange(T value, int source_lane) {
  const uint64_t bits = exchange_bits(to_bits(value), source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void need_full_mask(unsigned mask) {
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "the shim knows whole-warp shuffles only\n");
    std::abort();
  }
}

// Everything that changes memory at once: old and new value, whatever else happens to the address.
template <class T, class Fn>
T change(T* p, const Fn& next_of) {
  note_atomic(p);
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (;;) {
    T next = next_of(old);
    if (__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace shim

// ---- What kernels call -------------------------------------------------------------------------

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!shim::skipped(file, line)) shim::sync_block();
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  shim::need_full_mask(mask);
  if (!shim::skipped(file, line)) shim::sync_warp();
}

template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  shim::need_full_mask(mask);
  return shim::exchange(v, lane & (shim::kLanes - 1));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  shim::need_full_mask(mask);
  return shim::exchange(v, shim::lane() ^ lane_mask);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta) {
  shim::need_full_mask(mask);
  const int from = shim::lane() - int(delta);
  return shim::exchange(v, from >= 0 ? from : shim::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  shim::need_full_mask(mask);
  uint64_t all[shim::kLanes];
  shim::exchange_all(predicate != 0, all);
  unsigned votes = 0;
  for (int i = 0; i < shim::kLanes; ++i) votes |= unsigned(all[i]) << i;
  return votes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  shim::need_full_mask(mask);
  uint64_t all[shim::kLanes];
  const uint64_t bits = shim::to_bits(v);
  shim::exchange_all(bits, all);
  unsigned equal = 0;
  for (int i = 0; i < shim::kLanes; ++i) equal |= unsigned(all[i] == bits) << i;
  return equal;
}

template <class T>
T atomicAdd(T* p, T v) {
  return shim::change(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return shim::change(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* p, T v) {
  return shim::change(p, [v](T old) { return old < v ? v : old; });
}
inline void __threadfence() {
  shim::fence();
}

inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}

// ---- What the host calls: runtime.h, and what needs to be a template ---------------------------

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const std::function<void()> run = [&] { kernel(args...); };
  return shim::launch(*config, reinterpret_cast<const void*>(kernel), run);
}

namespace shim {

// A kernel of a test.
inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
                unsigned cluster = 1) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr, &attribute, 1};
  const cudaError_t error = launch(config, nullptr, kernel);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace shim
