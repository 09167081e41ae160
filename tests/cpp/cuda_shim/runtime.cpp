#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "shim.h"

namespace {

constexpr size_t kWithoutAsking = 48 * 1024;  // of shared memory, static and dynamic together
constexpr size_t kReserved = 1024;            // of a multiprocessor's for each block

struct Known {
  cudaError_t error;
  const char *name, *text;
};
constexpr Known kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "invalid cluster size"},
};

int current_device = 0;
cudaError_t last_error = cudaSuccess;

// Dynamic shared memory that kernels may have, by device. Where all of the device was asked for, it
// stays all, since tests change how much the device has.
struct Allowance {
  size_t bytes;
  bool all;
};
std::map<std::pair<const void*, int>, Allowance> allowed;

size_t most_shared() {
  return std::max(kWithoutAsking, size_t(shim::settings.shared_bytes) - kReserved);
}

cudaError_t finish(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The start of every call that can fail.
cudaError_t begin(shim::Asked what, cudaStream_t stream = nullptr, const void* kernel = nullptr) {
  shim::calls().push_back({what, current_device, stream, kernel});
  if (shim::settings.devices == 0) return finish(cudaErrorNoDevice);
  if (shim::settings.driver < CUDART_VERSION) return finish(cudaErrorInsufficientDriver);
  int& left = shim::settings.fails_after;
  if (left >= 0 && left-- == 0) return finish(cudaErrorMemoryAllocation);
  return cudaSuccess;
}

int device_of(cudaStream_t stream) {
  const auto handle = reinterpret_cast<intptr_t>(stream);
  return handle == 0 ? current_device : int((handle - 1) / 16);
}

cudaError_t refusal(const shim::Launch& l, const void* kernel, cudaStream_t stream) {
  const unsigned* b = l.block;
  const unsigned* g = l.grid;
  const uint64_t threads = uint64_t(b[0]) * b[1] * b[2];
  if (threads == 0 || threads > shim::kMaxThreads || b[2] > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (g[0] == 0 || g[1] == 0 || g[2] == 0 || g[0] > 0x7fffffffu || g[1] > 65535 || g[2] > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (device_of(stream) != current_device) return cudaErrorInvalidResourceHandle;
  const bool clusters = shim::kClusters && shim::settings.capability >= 9;
  if (l.cluster == 0 || l.cluster > (clusters ? shim::kMaxCluster : 1) || g[0] % l.cluster != 0) {
    return cudaErrorInvalidClusterSize;
  }
  const shim::Kernel known = shim::kernel_at(kernel);
  if (threads > known.most_threads) return cudaErrorInvalidValue;
  const auto found = allowed.find({kernel, current_device});
  size_t most = kWithoutAsking - std::min(kWithoutAsking, known.shared_bytes);
  if (found != allowed.end()) {
    most = found->second.all ? most_shared() - known.shared_bytes : found->second.bytes;
  }
  return l.shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  for (const Known& k : kErrors) {
    if (k.error == error) return k.name;
  }
  return "?";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const Known& k : kErrors) {
    if (k.error == error) return k.text;
  }
  return "?";
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = shim::settings.driver;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return begin(shim::Asked::kAttribute);
}
cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = begin(shim::Asked::kAttribute)) return error;
  if (device < 0 || device >= shim::settings.devices) return finish(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = shim::settings.devices;
  return begin(shim::Asked::kAttribute);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = begin(shim::Asked::kAttribute)) return error;
  if (device < 0 || device >= shim::settings.devices) return finish(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = shim::settings.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shim::settings.shared_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(most_shared());
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = shim::kClusters ? shim::settings.capability : 8;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (const cudaError_t error = begin(shim::Asked::kFunction, nullptr, kernel)) return error;
  const shim::Kernel known = shim::kernel_at(kernel);
  *attributes = {known.shared_bytes, int(known.most_threads)};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (const cudaError_t error = begin(shim::Asked::kFunction, nullptr, kernel)) return error;
  const size_t most = most_shared() - shim::kernel_at(kernel).shared_bytes;
  if (value < 0 || size_t(value) > most) return finish(cudaErrorInvalidValue);
  allowed[{kernel, current_device}] = {size_t(value), size_t(value) == most};
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (const cudaError_t error = begin(shim::Asked::kMemory)) return error;
  *p = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (const cudaError_t error = begin(shim::Asked::kMemory)) return error;
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (const cudaError_t error = begin(shim::Asked::kCopy, stream)) return error;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return begin(shim::Asked::kWait, stream);
}
cudaError_t cudaDeviceSynchronize() {
  return begin(shim::Asked::kWait);
}

namespace shim {

std::vector<Call>& calls() {
  static std::vector<Call> all;
  return all;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& run_thread) {
  if (settings.before_launch) {
    auto* turn = settings.before_launch;
    settings.before_launch = nullptr;  // its own launches are not interrupted
    turn();
    settings.before_launch = turn;
  }
  if (const cudaError_t error = begin(Asked::kLaunch, config.stream, kernel)) return error;
  const dim3 &g = config.gridDim, &b = config.blockDim;
  Launch l{{g.x, g.y, g.z}, {b.x, b.y, b.z}, config.dynamicSmemBytes, 1, nullptr, nullptr};
  for (unsigned i = 0; i < config.numAttrs; ++i) l.cluster = config.attrs[i].val.clusterDim.x;
  if (const cudaError_t error = refusal(l, kernel, config.stream)) return finish(error);
  l.call = [](const void* f) { (*static_cast<const std::function<void()>*>(f))(); };
  l.kernel = &run_thread;
  if (const char* wrong = run(l)) throw std::runtime_error(wrong);
  return cudaSuccess;
}

}  // namespace shim
