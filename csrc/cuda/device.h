// The devices as pyloss's own CUDA runtime sees them. It is linked statically: torch has another,
// whose current device need not be this one's.
#pragma once

#include <string>

namespace pyloss::cuda {

// 0 where there is no device, no driver, or none that this runtime can use.
int device_count();

// Empty, or why the driver of this machine cannot run what pyloss was built with. Does not wake a
// device.
std::string driver_problem();

// Makes a device the current one of this thread as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace pyloss::cuda
