// The ranks of a loss's target values, one row at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sorting_network.h"

namespace pyloss {
namespace cpu {

struct SortingRanks {
  std::vector<int32_t> first, count;  // [items][n]; count: empty where all are 1
  std::vector<int64_t> nan_rows;
};

// values: [items][n], float64, float32, int64 or int32. Equal values: each in its place or, shared,
// all with the same ranks. The ranks of a row with a NaN mean nothing.
SortingRanks target_ranks(const void* values, DType dtype, int64_t items, int32_t n,
                          TargetOrder order, int threads);

}  // namespace cpu
}  // namespace pyloss
