// See device.h. No kernels.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace pyloss::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // forget it: the next call must not report it
  return 0;
}

std::string driver_problem() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  // A driver runs every runtime of its own major version, and all older ones. 0: there is none.
  if (driver == 0 || driver / 1000 >= CUDART_VERSION / 1000) return {};
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "pyloss was built with CUDA " + text(CUDART_VERSION) +
         ", but the driver of this machine knows CUDA " + text(driver) +
         " at most: no kernel of pyloss can run on its GPUs. Update the driver, or build pyloss "
         "with a toolkit of CUDA " +
         std::to_string(driver / 1000) + ".";
}

DeviceGuard::DeviceGuard(int device) {
  PYLOSS_CUDA_CHECK(cudaGetDevice(&before_));
  if (device == before_) return;
  PYLOSS_CUDA_CHECK(cudaSetDevice(device));
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
}

}  // namespace pyloss::cuda
