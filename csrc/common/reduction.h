// How losses of items become the result.
#pragma once

#include <cstdint>

namespace pyloss {

enum class Reduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };
inline constexpr int kReductionCount = 3;

}  // namespace pyloss
