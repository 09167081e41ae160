#include "race.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "shim.h"

#if defined(__SANITIZE_THREAD__)
#error "the shim itself must not be instrumented"
#endif

// Of ThreadSanitizer's library; null in a program without it.
extern "C" {
#define PYLOSS_WEAK __attribute__((weak))
void* __tsan_get_current_fiber() PYLOSS_WEAK;
void* __tsan_create_fiber(unsigned flags) PYLOSS_WEAK;
void __tsan_destroy_fiber(void*) PYLOSS_WEAK;
void __tsan_switch_to_fiber(void*, unsigned flags) PYLOSS_WEAK;
void __tsan_set_fiber_name(void*, const char*) PYLOSS_WEAK;
void __tsan_acquire(void*) PYLOSS_WEAK;
void __tsan_release(void*) PYLOSS_WEAK;
void __tsan_write_range(void*, unsigned long) PYLOSS_WEAK;
// Made for the heaps of Java: memory that is there anew, and memory that is no more.
void __tsan_java_alloc(unsigned long address, unsigned long bytes) PYLOSS_WEAK;
void __tsan_java_free(unsigned long address, unsigned long bytes) PYLOSS_WEAK;
#undef PYLOSS_WEAK
}

namespace {
int reports = 0;
}

// The library calls it for every race that it reports.
extern "C" __attribute__((visibility("default"))) void __tsan_on_report(void*) {
  ++reports;
}

namespace shim {

int races() {
  return reports;
}

namespace race {
namespace {

constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing
constexpr size_t kClockBytes = 8, kClocks = size_t(1) << 22;

char* clocks = nullptr;
size_t used = 0;

}  // namespace

bool on() {
  return __tsan_create_fiber != nullptr;
}

void start() {
  if (!on() || clocks) return;
  void* p = mmap(nullptr, kClocks * kClockBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  clocks = static_cast<char*>(p);
}

Clock new_clock() {
  if (!on()) return nullptr;
  if (used == kClocks) {
    std::fprintf(stderr, "shim: a launch with too many blocks for the race detector\n");
    std::abort();
  }
  return clocks + kClockBytes * used++;
}

void forget_clocks() {
  if (used > 0) __tsan_java_free(reinterpret_cast<uintptr_t>(clocks), used * kClockBytes);
  used = 0;
}

void* current() {
  return on() ? __tsan_get_current_fiber() : nullptr;
}
void become(void* fiber) {
  if (on()) __tsan_switch_to_fiber(fiber, kNoOrder);
}

void* Pool::fiber(size_t i, const char* name) {
  if (!fibers[i]) fibers[i] = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fibers[i], name);
  return fibers[i];
}
void Pool::drop(size_t i) {
  __tsan_destroy_fiber(fibers[i]);
  fibers[i] = nullptr;
}

void publish(Clock clock) {
  if (on()) __tsan_release(clock);
}
void learn(Clock clock) {
  if (on()) __tsan_acquire(clock);
}

// By a fiber that knows nothing else but what the host did before the launch. One is made for it,
// which is slow, but fences are rare.
void pass_on(Clock from, Clock to, void* host) {
  if (!on()) return;
  void* self = current();
  become(host);
  void* courier = __tsan_create_fiber(0);
  become(courier);
  learn(from);
  publish(to);
  become(self);
  __tsan_destroy_fiber(courier);
}

void forget(void* begin, size_t bytes) {
  if (!on() || bytes == 0) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) & ~uintptr_t(7);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes + 7) & ~uintptr_t(7);
  __tsan_java_free(first, last - first);
  __tsan_java_alloc(first, last - first);
}
void overwrite(void* begin, size_t bytes) {
  if (on() && bytes > 0) __tsan_write_range(begin, bytes);
}

}  // namespace race
}  // namespace shim
