// Accesses to what other threads of the grid change meanwhile: any value that was ever there may be
// seen, never half of one, and nothing is ordered by them.
#pragma once

#include <cuda_runtime.h>

#include <cuda/atomic>

namespace pyloss::cuda {

template <class T>
__device__ __forceinline__::cuda::atomic_ref<T, ::cuda::thread_scope_device> relaxed(T* p) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*p);
}

template <class T>
__device__ __forceinline__ T load_relaxed(const T* p) {
  return relaxed(const_cast<T*>(p)).load(::cuda::memory_order_relaxed);
}

// Also where several threads store the same.
template <class T>
__device__ __forceinline__ void store_relaxed(T* p, T value) {
  relaxed(p).store(value, ::cuda::memory_order_relaxed);
}

}  // namespace pyloss::cuda
