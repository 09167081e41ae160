// A stand-in for the CUDA runtime: kernels run as C++ on the CPU, one fiber per thread, one block
// after the other. It finds wrong indices, missing barriers (by running the threads in several
// orders) and barriers that not every thread reaches (reported, not hung). It does not model the
// memory model, warp scheduling, or anything newer than shuffles. scheduler.cpp runs the fibers.
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

#define PYLOSS_CUDA_SHIM 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
};

namespace shim {

enum class Order { kForward, kReverse, kRandom };

// What a test sets.
struct Settings {
  Order order = Order::kForward;
  unsigned seed = 0;
  int devices = 1;
  int multiprocessors = 4;
  int shared_bytes = 228 * 1024;
};
extern Settings settings;

inline constexpr int kLanes = 32;

// scheduler.cpp
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared();
void sync_block();
uint64_t exchange_bits(uint64_t bits, int source_lane);
void exchange_all(uint64_t bits, uint64_t (&all)[kLanes]);
int lane();

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

}  // namespace shim

inline void __syncthreads() {
  shim::sync_block();
}

inline void shim_need_full_mask(unsigned mask) {
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "the shim knows whole-warp shuffles only\n");
    std::abort();
  }
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  shim_need_full_mask(mask);
  return shim::exchange(v, lane & (shim::kLanes - 1));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  shim_need_full_mask(mask);
  return shim::exchange(v, shim::lane() ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta) {
  shim_need_full_mask(mask);
  const int from = shim::lane() + int(delta);
  return shim::exchange(v, from < shim::kLanes ? from : shim::lane());
}

template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta) {
  shim_need_full_mask(mask);
  const int from = shim::lane() - int(delta);
  return shim::exchange(v, from >= 0 ? from : shim::lane());
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  shim_need_full_mask(mask);
  shim::exchange(0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  shim_need_full_mask(mask);
  uint64_t all[shim::kLanes];
  shim::exchange_all(predicate != 0, all);
  unsigned votes = 0;
  for (int i = 0; i < shim::kLanes; ++i) votes |= unsigned(all[i]) << i;
  return votes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  shim_need_full_mask(mask);
  uint64_t all[shim::kLanes];
  const uint64_t bits = shim::to_bits(v);
  shim::exchange_all(bits, all);
  unsigned equal = 0;
  for (int i = 0; i < shim::kLanes; ++i) equal |= unsigned(all[i] == bits) << i;
  return equal;
}

// Fibers change places at barriers only, so every read-modify-write is atomic.
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}

using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaSuccess ? "cudaSuccess" : "cudaErrorNoDevice";
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "no CUDA-capable device is detected";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return shim::settings.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = shim::settings.devices;
  return shim::settings.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = shim::settings.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shim::settings.shared_bytes;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
  }
  return cudaSuccess;
}
