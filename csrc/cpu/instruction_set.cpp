#include "cpu/instruction_set.h"

#include <algorithm>
#include <atomic>

#include "common/compiler.h"

namespace pyloss::cpu {
namespace {

std::atomic<InstructionSet> limit{InstructionSet::kV4};

InstructionSet of_this_cpu() {
  const int level = PYLOSS_HAS_TARGET_PRAGMA ? x86_level() : 1;
  return level == 4   ? InstructionSet::kV4
         : level == 3 ? InstructionSet::kV3
                      : InstructionSet::kBase;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = of_this_cpu();
  return std::min(best, limit.load(std::memory_order_relaxed));
}

bool is_intel() {
  return made_by_intel();
}

void limit_instruction_set(InstructionSet most) {
  limit = most;
}

}  // namespace pyloss::cpu
