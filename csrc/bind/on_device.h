// Calls of the CUDA half of an op, on the device that Python names.
#pragma once

#include <pybind11/pybind11.h>

#include <climits>
#include <cstdint>
#include <string>

#include "bind/args.h"
#include "cuda/device.h"

namespace pyloss {

// fn(args...) with that device as the current one, while other Python threads run.
template <class Fn, class... Args>
auto on_device(int64_t device, const Fn& fn, const Args&... args) {
  if (device < 0 || device > INT_MAX) bad_argument("device", std::to_string(device));
  pybind11::gil_scoped_release nogil;
  const cuda::DeviceGuard guard{int(device)};
  return fn(args...);
}

}  // namespace pyloss
