// Errors of the CUDA runtime as C++ exceptions (RuntimeError in Python).
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pyloss::cuda {

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* expression,
                                          const char* file, int line) {
  cudaGetLastError();  // a recoverable error must not be reported again by the next call
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + expression +
                           " failed: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

}  // namespace pyloss::cuda

#define PYLOSS_CUDA_CHECK(expression)                                                       \
  do {                                                                                      \
    const cudaError_t pyloss_cuda_error = (expression);                                     \
    if (pyloss_cuda_error != cudaSuccess)                                                   \
      ::pyloss::cuda::throw_cuda_error(pyloss_cuda_error, #expression, __FILE__, __LINE__); \
  } while (0)
