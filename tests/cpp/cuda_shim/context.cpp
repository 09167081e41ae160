#include "context.h"

#include <cstdint>
#include <cstdlib>

#if !defined(PYLOSS_SHIM_UCONTEXT)

// Saves the registers that a function has to keep on its stack and the stack pointer in *save; goes
// on at what an earlier call saved as `load`, or at the start that Context::start lays out.
extern "C" void pyloss_shim_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl pyloss_shim_switch
.hidden pyloss_shim_switch
.type pyloss_shim_switch, @function
pyloss_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyloss_shim_switch, .-pyloss_shim_switch
)");
#else
asm(R"(
.text
.globl pyloss_shim_switch
.hidden pyloss_shim_switch
.type pyloss_shim_switch, %function
pyloss_shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size pyloss_shim_switch, .-pyloss_shim_switch
)");
#endif

#endif  // PYLOSS_SHIM_UCONTEXT

namespace shim {

void Context::begin() {
  Context& self = *current_;
  self.arrived();
  self.entry_();
  std::abort();
}

void Context::start(char* stack, size_t size, void (*entry)()) {
  entry_ = entry;
#if defined(PYLOSS_SHIM_ASAN)
  fake_stack_ = nullptr;
  bottom_ = stack;
  size_ = size;
  __asan_unpoison_memory_region(stack, size);  // of frames that were left and never ended
#endif
#if defined(PYLOSS_SHIM_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size;
  context_.uc_link = nullptr;
  makecontext(&context_, &Context::begin, 0);
#else
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15));
#if defined(__x86_64__)
  constexpr int kSaved = 8, kEntry = 6;  // six registers, where to go on, no return from there
#else
  constexpr int kSaved = 20, kEntry = 11;  // x30 is the twelfth
#endif
  top -= kSaved;
  for (int i = 0; i < kSaved; ++i) top[i] = nullptr;
  top[kEntry] = reinterpret_cast<void*>(&Context::begin);
  stack_pointer_ = top;
#endif
}

void Context::jump(Context& to) {
  from_ = this;
  current_ = &to;
#if defined(PYLOSS_SHIM_UCONTEXT)
  swapcontext(&context_, &to.context_);
#else
  pyloss_shim_switch(&stack_pointer_, to.stack_pointer_);
#endif
}

void Context::arrived() {
#if defined(PYLOSS_SHIM_ASAN)
  // The program's own stack has bounds that only the sanitizer knows.
  __sanitizer_finish_switch_fiber(fake_stack_, &from_->bottom_, &from_->size_);
#endif
}

void Context::resume(Context& to) {
#if defined(PYLOSS_SHIM_ASAN)
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
  jump(to);
  arrived();
}

void Context::finish(Context& to) {
#if defined(PYLOSS_SHIM_ASAN)
  __sanitizer_start_switch_fiber(nullptr, to.bottom_, to.size_);
#endif
  jump(to);
  std::abort();
}

}  // namespace shim
