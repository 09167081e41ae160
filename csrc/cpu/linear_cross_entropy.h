// What linear cross entropy needs on the CPU besides torch's products and the row-softmax kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyloss::cpu {

// total[i] = (first ? 0 : total[i]) + part[i]; total is double for fp64 parts, float for the rest.
void accumulate(void* total, const void* part, DType t, int64_t n, bool first, int threads);

// total[c] = (first ? 0 : total[c]) + sum_r x[r row_stride + c], r < rows, c < columns.
void column_sums(void* total, const void* x, DType t, int64_t rows, int64_t columns,
                 int64_t row_stride, bool first, int threads);

}  // namespace pyloss::cpu
