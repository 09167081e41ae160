// A stand-in for the CUDA runtime: kernels run as C++ on the CPU, one fiber per thread, one block
// after the other. It finds wrong indices, missing barriers (by running the threads in several
// orders) and barriers that not every thread reaches (reported, not hung). It does not model the
// memory model, warp scheduling, or anything newer than shuffles.
#pragma once

#include <ucontext.h>

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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

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
inline Settings settings;

inline constexpr int kLanes = 32;
inline constexpr size_t kStackBytes = 256 * 1024;

enum class Wait { kReady, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  Wait wait;
  int shuffles;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> lanes[2];  // values under exchange, by parity of the exchange
  std::vector<char> shared;
  const std::function<void()>* kernel = nullptr;
  size_t current = 0, live = 0;
};
inline Machine machine;

inline void fiber_main() {
  (*machine.kernel)();
  machine.fibers[machine.current].wait = Wait::kDone;
  // Never resumed; uc_link would return to the same place.
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

inline void wait_for(Wait what) {
  Fiber& f = machine.fibers[machine.current];
  f.wait = what;
  swapcontext(&f.context, &machine.scheduler);
}

// Wakes a group if every fiber of it that has not ended waits for `what`.
inline bool release(size_t begin, size_t end, Wait what, bool ended_may_miss) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    const Wait w = machine.fibers[i].wait;
    if (w == Wait::kDone && ended_may_miss) continue;
    if (w != what) return false;
    any = true;
  }
  for (size_t i = begin; any && i < end; ++i) {
    if (machine.fibers[i].wait == what) machine.fibers[i].wait = Wait::kReady;
  }
  return any;
}

inline void run_block(std::mt19937& random) {
  const size_t n = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (machine.fibers.size() < n) machine.fibers.resize(n);
  for (auto& l : machine.lanes) l.assign(n, 0);
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = machine.fibers[i];
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
    f.thread = dim3(unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                    unsigned(i / blockDim.x / blockDim.y));
    f.wait = Wait::kReady;
    f.shuffles = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = settings.order == Order::kReverse ? n - 1 - i : i;
  for (;;) {
    if (settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    size_t done = 0;
    bool ran = false;
    for (size_t i : order) {
      Fiber& f = machine.fibers[i];
      if (f.wait == Wait::kReady) {
        machine.current = i;
        threadIdx = f.thread;
        ran = true;
        swapcontext(&machine.scheduler, &f.context);
      }
      done += f.wait == Wait::kDone;
    }
    if (done == n) return;
    bool woke = release(0, n, Wait::kBlock, true);
    for (size_t w = 0; w < n; w += kLanes) {
      woke |= release(w, w + kLanes < n ? w + kLanes : n, Wait::kWarp, false);
    }
    if (!ran && !woke) {
      size_t block = 0, warp = 0;
      for (size_t i = 0; i < n; ++i) {
        block += machine.fibers[i].wait == Wait::kBlock;
        warp += machine.fibers[i].wait == Wait::kWarp;
      }
      throw std::runtime_error("divergent barrier: " + std::to_string(block) +
                               " threads in __syncthreads, " + std::to_string(warp) +
                               " in a shuffle, " + std::to_string(done) + " ended, of " +
                               std::to_string(n));
    }
  }
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.x * block.y * block.z > 1024 || shared_bytes > size_t(settings.shared_bytes)) {
    throw std::runtime_error("launch configuration out of range");
  }
  gridDim = grid;
  blockDim = block;
  machine.kernel = &kernel;
  std::mt19937 random(settings.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t b = settings.order == Order::kReverse ? blocks - 1 - k : k;
    blockIdx =
        dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    // Exactly the size asked for, so that a sanitizer sees an overrun; never zeros.
    machine.shared = std::vector<char>(shared_bytes, char(0xcd));
    run_block(random);
  }
}

inline void* dynamic_shared() {
  return machine.shared.data();
}

template <class T>
T exchange(T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const size_t self = machine.current;
  auto& lanes = machine.lanes[machine.fibers[self].shuffles++ % 2];
  std::memcpy(&lanes[self], &value, sizeof value);
  wait_for(Wait::kWarp);
  const size_t warp = self / kLanes * kLanes;
  T result;
  std::memcpy(&result, &lanes[warp + size_t(source_lane)], sizeof result);
  return result;
}

inline int lane() {
  return int(machine.current % kLanes);
}

}  // namespace shim

inline void __syncthreads() {
  shim::wait_for(shim::Wait::kBlock);
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
// What the lanes of the warp passed to one exchange.
template <class T>
std::vector<T> shim_all_lanes(unsigned mask, T v) {
  shim_need_full_mask(mask);
  auto& lanes = shim::machine.lanes[shim::machine.fibers[shim::machine.current].shuffles % 2];
  shim::exchange(v, 0);
  std::vector<T> all(shim::kLanes);
  const size_t warp = shim::machine.current / shim::kLanes * shim::kLanes;
  for (size_t i = 0; i < all.size(); ++i) std::memcpy(&all[i], &lanes[warp + i], sizeof(T));
  return all;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = shim_all_lanes(mask, predicate);
  unsigned votes = 0;
  for (size_t i = 0; i < all.size(); ++i) votes |= unsigned(all[i] != 0) << i;
  return votes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  const auto all = shim_all_lanes(mask, v);
  unsigned equal = 0;
  for (size_t i = 0; i < all.size(); ++i) equal |= unsigned(all[i] == v) << i;
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
