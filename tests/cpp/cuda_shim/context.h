// Switches between stacks: the fibers of the shim. A few instructions on x86-64 and aarch64 Linux;
// elsewhere, and with PYLOSS_SHIM_UCONTEXT, swapcontext, which saves the signal mask by a system
// call at each switch and is 5 to 10 times as slow. AddressSanitizer is told about each switch.
#pragma once

#include <cstddef>

#if !defined(__linux__) || !(defined(__x86_64__) || defined(__aarch64__))
#define PYLOSS_SHIM_UCONTEXT 1
#endif
#if defined(PYLOSS_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define PYLOSS_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PYLOSS_SHIM_ASAN 1
#endif
#endif
#if defined(PYLOSS_SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

// A stack on which something runs, or waits to be resumed.
class Context {
 public:
  // Of the program itself, whose stack is the system's.
  Context() = default;

  // Resumed first, runs entry(), which must not return. What ran on the stack before is forgotten.
  void start(char* stack, size_t size, void (*entry)());

  // From this one, which runs, to `to`, until something resumes this one.
  void resume(Context& to);

  // The last switch away from this one.
  void finish(Context& to);

 private:
  void jump(Context& to);
  void arrived();

#if defined(PYLOSS_SHIM_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void (*entry_)() = nullptr;
#if defined(PYLOSS_SHIM_ASAN)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
  static inline Context* from_ = nullptr;     // of the switch under way
  static inline Context* current_ = nullptr;  // where it goes
  static void begin();
};

}  // namespace shim
