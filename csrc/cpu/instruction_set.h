// Which of the copies of code that is compiled once per instruction set (common/compiler.h)
// runs.
#pragma once

namespace pyloss::cpu {

enum class InstructionSet { kBase, kV3, kV4 };  // x86-64-v3: AVX2; v4: AVX-512

// The best that this CPU has and the code is compiled for, at most the limit.
InstructionSet instruction_set();

bool is_intel();

// For tests, which run the lesser ones too.
void limit_instruction_set(InstructionSet most);

}  // namespace pyloss::cpu
