#include "cpu/instruction_set.h"

#include <algorithm>
#include <atomic>

#include "common/multiversion.h"

namespace pyloss::cpu {
namespace {

std::atomic<InstructionSet> limit{InstructionSet::kV4};

InstructionSet of_this_cpu() {
#if PYLOSS_HAS_TARGET_PRAGMA
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return InstructionSet::kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kV3;
#endif
  return InstructionSet::kBase;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = of_this_cpu();
  return std::min(best, limit.load(std::memory_order_relaxed));
}

bool is_intel() {
#if PYLOSS_HAS_TARGET_PRAGMA
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

void limit_instruction_set(InstructionSet most) {
  limit = most;
}

}  // namespace pyloss::cpu
