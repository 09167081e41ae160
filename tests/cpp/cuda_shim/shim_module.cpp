// What Python sets and reads of the stand-in, by ctypes: a part of the module that
// tests/shim_device.py loads as pyloss._C.
#include "runtime.h"
#include "shim.h"

#define PYLOSS_SHIM_API extern "C" __attribute__((visibility("default")))

// Order of blocks and threads: 0 forward, 1 reverse, 2 random.
PYLOSS_SHIM_API void shim_configure(int order, unsigned seed, int devices, int poison) {
  shim::settings.order = shim::Order(order);
  shim::settings.seed = seed;
  shim::settings.devices = devices;
  shim::settings.poison = static_cast<unsigned char>(poison);
}

// The call of the runtime that fails, counted from the next; negative: none.
PYLOSS_SHIM_API void shim_fail_after(int calls) {
  shim::settings.fails_after = calls;
}

// Launches since the last question; -1 if one was not on this device and stream.
PYLOSS_SHIM_API int shim_launches(int device, int64_t stream) {
  int launches = 0;
  bool elsewhere = false;
  for (const shim::Call& call : shim::calls()) {
    if (call.what != shim::Asked::kLaunch) continue;
    ++launches;
    elsewhere |= call.device != device || call.stream != reinterpret_cast<cudaStream_t>(stream);
  }
  shim::calls().clear();
  return elsewhere ? -1 : launches;
}
