// The loops over a tile of logits: choice of the instruction set.
#include "cpu/similarity_softmax_math.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "common/compiler.h"
#include "common/math.h"
#include "cpu/instruction_set.h"

namespace pyloss::cpu::similarity_tiles {
namespace {

#define PYLOSS_KERNELS "cpu/similarity_softmax_tiles.h"
#include "cpu/per_instruction_set.h"

}  // namespace

template <class R>
const TileMath<R>& tile_math() {
  static const TileMath<R> base_math = base::math_of<R>();
#if PYLOSS_HAS_TARGET_PRAGMA
  static const TileMath<R> v3_math = v3::math_of<R>(), v4_math = v4::math_of<R>();
  if (instruction_set() == InstructionSet::kV4) return v4_math;
  if (instruction_set() == InstructionSet::kV3) return v3_math;
#endif
  return base_math;
}
template const TileMath<float>& tile_math<float>();
template const TileMath<double>& tile_math<double>();

}  // namespace pyloss::cpu::similarity_tiles
