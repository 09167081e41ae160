// Kernel launches that also compile without nvcc: tests/cpp/cuda_shim runs the same sources as
// fibers on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

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

// A kernel gets 48 KiB, its static shared memory included, without asking for more.
inline constexpr size_t kDefaultSharedBytes = 32 * 1024;

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Args&... args) {
#if defined(PYLOSS_CUDA_SHIM)
  (void)stream;
  shim::run(grid, block, shared_bytes, [&] { kernel(args...); });
#else
  if (shared_bytes > kDefaultSharedBytes) {
    PYLOSS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  PYLOSS_CUDA_CHECK(cudaGetLastError());
#endif
}

}  // namespace pyloss::cuda
