// Runs a check in every instruction set that this CPU has, where the kernels would take the best.
#pragma once

#include "cpu/instruction_set.h"

template <class Fn>
void for_all_instruction_sets(Fn&& check) {
  using pyloss::cpu::InstructionSet;
  static constexpr const char* kNames[] = {"base", "v3", "v4"};
  for (const InstructionSet set :
       {InstructionSet::kBase, InstructionSet::kV3, InstructionSet::kV4}) {
    pyloss::cpu::limit_instruction_set(set);
    if (pyloss::cpu::instruction_set() == set) check(kNames[int(set)]);
  }
}
