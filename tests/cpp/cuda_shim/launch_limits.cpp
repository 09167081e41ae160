// The shim's own test: what the driver refuses, what a kernel reads that nobody wrote, and what
// launch.h asks for before a launch.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "runs.h"

namespace {

using namespace pyloss;
int checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed) std::printf("FAILED %s\n", what.c_str());
}

// ---- Launches ----------------------------------------------------------------------------------

__global__ void free_kernel() {}
__global__ void __launch_bounds__(96, 2) bound_kernel() {}
template <class R>
__global__ void __launch_bounds__(256) static_kernel(R* out) {
  __shared__ R kept[1000];
  kept[threadIdx.x] = R(threadIdx.x);
  __syncthreads();
  if (out) out[threadIdx.x] = kept[threadIdx.x ^ 1];
}

template <class... Params, class... Args>
cudaError_t ask(void (*kernel)(Params...), dim3 grid, dim3 block, size_t bytes, unsigned cluster,
                const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{grid, block, bytes, nullptr, &attribute, 1};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  require(cudaGetLastError() == error && cudaGetLastError() == cudaSuccess, "the last error");
  return error;
}

void check_limits() {
  struct {
    const char* what;
    dim3 grid, block;
    size_t bytes;
    unsigned cluster;
    cudaError_t error;
  } const cases[] = {
      {"1024 threads", 1, 1024, 0, 1, cudaSuccess},
      {"1025 threads", 1, 1025, 0, 1, cudaErrorInvalidConfiguration},
      {"64 x 32 threads", 1, {64, 32}, 0, 1, cudaErrorInvalidConfiguration},
      {"65 threads along z", 1, {1, 1, 65}, 0, 1, cudaErrorInvalidConfiguration},
      {"no threads", 1, 0, 0, 1, cudaErrorInvalidConfiguration},
      {"no blocks", 0, 1, 0, 1, cudaErrorInvalidConfiguration},
      {"grid y of 65535", {1, 65535}, 1, 0, 1, cudaSuccess},
      {"grid y of 65536", {1, 65536}, 1, 0, 1, cudaErrorInvalidConfiguration},
      {"grid z of 65536", {1, 1, 65536}, 1, 0, 1, cudaErrorInvalidConfiguration},
      {"48 KiB", 1, 32, 48 * 1024, 1, cudaSuccess},
      {"48 KiB and a byte", 1, 32, 48 * 1024 + 1, 1, cudaErrorInvalidValue},
      {"clusters of 4", 8, 32, 0, 4, shim::kClusters ? cudaSuccess : cudaErrorInvalidClusterSize},
      {"clusters that do not fill the grid", 6, 32, 0, 4, cudaErrorInvalidClusterSize},
      {"clusters of 16", 16, 32, 0, 16, cudaErrorInvalidClusterSize},
  };
  for (const auto& c : cases) {
    require(ask(free_kernel, c.grid, c.block, c.bytes, c.cluster) == c.error, c.what);
  }
  shim::settings.capability = 8;
  require(ask(free_kernel, 8, 32, 0, 4) == cudaErrorInvalidClusterSize, "clusters on sm_80");
  shim::settings.capability = 9;
  require(ask(bound_kernel, 1, 96, 0, 1) == cudaSuccess, "as many threads as the bound");
  require(ask(bound_kernel, 1, 97, 0, 1) == cudaErrorInvalidValue, "more than the bound");
  double* none = nullptr;
  require(ask(static_kernel<double>, 1, 256, 0, 1, none) == cudaSuccess, "a template's bound");
  require(ask(static_kernel<double>, 1, 257, 0, 1, none) == cudaErrorInvalidValue, "beyond it");
  if (!shim::kClusters) return;  // `__shared__` is found among the thread_local variables only
  const size_t rest = 48 * 1024 - 8000;
  require(ask(static_kernel<double>, 1, 32, rest, 1, none) == cudaSuccess, "static and dynamic");
  require(ask(static_kernel<double>, 1, 32, rest + 1, 1, none) == cudaErrorInvalidValue,
          "static and dynamic over 48 KiB");
  require(
      ask(static_kernel<float>, 1, 32, rest + 4000, 1, static_cast<float*>(nullptr)) == cudaSuccess,
      "each kernel's own");
}

void check_attribute() {
  const auto allow = [](int bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(free_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaGetLastError();
    return error;
  };
  require(allow(227 * 1024 + 1) == cudaErrorInvalidValue, "more than a block can have");
  require(allow(60000) == cudaSuccess && ask(free_kernel, 1, 32, 60000, 1) == cudaSuccess, "60000");
  require(ask(free_kernel, 1, 32, 60001, 1) == cudaErrorInvalidValue, "60001 of 60000");
  require(ask(bound_kernel, 1, 32, 60000, 1) == cudaErrorInvalidValue, "another kernel's");
  shim::settings.devices = 2;
  cudaSetDevice(1);
  require(ask(free_kernel, 1, 32, 60000, 1) == cudaErrorInvalidValue, "another device's");
  cudaSetDevice(0);
  const cudaLaunchConfig_t config{1, 32, 0, shim::stream(1, 0), nullptr, 0};
  require(cudaLaunchKernelEx(&config, free_kernel) == cudaErrorInvalidResourceHandle,
          "another device's stream");
  cudaGetLastError();
  require(cudaSetDevice(2) == cudaErrorInvalidDevice, "no such device");
  cudaGetLastError();
  shim::settings = {};
}

// ---- launch.h ----------------------------------------------------------------------------------

__global__ void large_kernel() {}

template <class Fn>
std::string error_of(const Fn& fn) {
  try {
    fn();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return {};
}
void launch_large(size_t bytes) {
  cuda::launch(large_kernel, 1, 32, bytes, nullptr);
}
int attribute_calls() {
  int count = 0;
  for (const auto& call : shim::calls()) {
    count += call.what == shim::Asked::kFunction &&
             call.kernel == reinterpret_cast<const void*>(large_kernel);
  }
  return count;
}

// Another thread's launch of less, between what a launch asked for and the launch itself.
void check_two_threads() {
  shim::settings.before_launch = [] { launch_large(40000); };
  require(error_of([] { launch_large(100000); }).empty(), "a smaller launch takes nothing back");
  shim::settings.before_launch = nullptr;
  shim::calls().clear();
  launch_large(200000);
  require(attribute_calls() == 0, "asked for once");
  require(
      error_of([] { launch_large(228 * 1024); }).find("cudaErrorInvalidValue") != std::string::npos,
      "what no block can have is an error");
}

void check_device() {
  require(cuda::device_count() == 1, "one device");
  shim::settings.devices = 0;
  require(cuda::device_count() == 0 && cudaGetLastError() == cudaSuccess, "no device");
  shim::settings.devices = 1;
  require(cuda::driver_problem().empty(), "a driver that fits");
  shim::settings.driver = 12040;
  const std::string text = cuda::driver_problem();
  require(text.find("13.0") != std::string::npos && text.find("12.4") != std::string::npos,
          "an old driver is named");
  require(cuda::device_count() == 0, "an old driver has no devices");
  shim::settings.driver = 0;
  require(cuda::driver_problem().empty(), "no driver, no problem");
  shim::settings = {};
  shim::settings.devices = 2;
  int device = -1;
  {
    const cuda::DeviceGuard guard(1);
    cudaGetDevice(&device);
    require(device == 1, "the device asked for");
  }
  cudaGetDevice(&device);
  require(device == 0, "and the one before it again");
  require(error_of([] { cuda::DeviceGuard guard(5); }).find("invalid device") != std::string::npos,
          "a device that is not there");
  shim::settings = {};
}

// ---- What nobody wrote -------------------------------------------------------------------------

__global__ void unwritten_static_kernel(bool repaired, int* out) {
  __shared__ int v[64];
  if (repaired || threadIdx.x < 63) v[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = v[63 - threadIdx.x];
}
__global__ void unwritten_dynamic_kernel(bool repaired, int* out) {
  PYLOSS_DYNAMIC_SHARED(int, v);
  if (repaired || threadIdx.x < 63) v[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = v[63 - threadIdx.x];
}
__global__ void unwritten_scratch_kernel(bool repaired, int* out) {
  if (repaired) out[64 + threadIdx.x] = 0;
  out[threadIdx.x] = ++out[64 + threadIdx.x];
}
__global__ void unwritten_output_kernel(bool repaired, int* out) {
  if (repaired || threadIdx.x != 5) out[threadIdx.x] = 1;
}

// Whether two runs leave something else in the 64 outputs.
bool differs(void (*kernel)(bool, int*), bool repaired) {
  std::vector<int> out[2];
  for (int run = 0; run < 2; ++run) {
    shim::start_run(run);
    out[run].resize(128);
    std::memset(out[run].data(), shim::settings.poison, 512);
    shim::run(1, 64, 256, [&] { kernel(repaired, out[run].data()); });
  }
  return std::memcmp(out[0].data(), out[1].data(), 256) != 0;
}

void check_poison() {
  struct {
    const char* what;
    void (*kernel)(bool, int*);
  } const cases[] = {
      {"static shared memory that nobody wrote", unwritten_static_kernel},
      {"dynamic shared memory that nobody wrote", unwritten_dynamic_kernel},
      {"scratch that nobody cleared", unwritten_scratch_kernel},
      {"an output that nobody wrote", unwritten_output_kernel},
  };
  for (const auto& c : cases) {
    const bool seen = shim::kClusters || c.kernel != unwritten_static_kernel;
    require(differs(c.kernel, false) == seen, c.what);
    require(!differs(c.kernel, true), std::string(c.what) + ", repaired");
  }
}

}  // namespace

int main() {
  check_limits();
  check_attribute();
  check_two_threads();
  check_device();
  check_poison();
  std::printf("%d checks, %d failed\n", checked, failed);
  return failed != 0;
}
