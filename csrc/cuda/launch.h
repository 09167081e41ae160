// Kernel launches that also compile without nvcc: tests/cpp/cuda_shim runs the same sources as
// fibers on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "cuda/check.h"

// Dynamic shared memory of a kernel under a name of its own.
#if defined(PYLOSS_CUDA_SHIM)
#define PYLOSS_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(shim::dynamic_shared())
#else
#define PYLOSS_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace pyloss::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The first grid dimension; a problem too large for it is refused, not wrapped around.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("too many rows for one CUDA grid");
  return unsigned(blocks);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  PYLOSS_CUDA_CHECK(cudaGetDevice(&device));
  PYLOSS_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Bytes of dynamic shared memory with which two blocks fit on an SM, beside the runtime's share and
// the static memory of the reductions.
inline int64_t shared_bytes_of_half() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 8 * 1024;
}

// A kernel gets 48 KiB, its static shared memory included, without asking for more.
inline constexpr size_t kDefaultSharedBytes = 32 * 1024;

// Lets every launch of a kernel have as much shared memory as a block of the device can. Once for a
// kernel and a device: a size of its own for every launch could be taken back by another thread
// between the request and the launch.
inline void allow_all_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  int device = 0;
  PYLOSS_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  cudaFuncAttributes own{};
  PYLOSS_CUDA_CHECK(cudaFuncGetAttributes(&own, kernel));
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  PYLOSS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         most - int(own.sharedSizeBytes)));
  done.insert({kernel, device});
}

// Clusters of so many neighbouring blocks along x; 1: none.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), unsigned blocks, dim3 grid, dim3 block,
                     size_t shared_bytes, void* stream, const Args&... args) {
  if (shared_bytes > kDefaultSharedBytes) allow_all_shared(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  PYLOSS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Args&... args) {
  launch_clusters(kernel, 1, grid, block, shared_bytes, stream, args...);
}

}  // namespace pyloss::cuda
