// The k largest inner products of each query with the keys, on the CPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyloss::cpu {

struct SimilarityTopk {
  DType dtype;                   // float64 or float32
  int64_t rows, columns, depth;  // queries, keys, their length
  const void *queries, *keys;    // rows of `stride` elements
  int64_t query_stride, key_stride;
  int64_t k;      // at most columns
  int64_t first;  // query i leaves out key first + i; below 0: none
  void* values;   // (rows x k), largest first
  int64_t* indices;
};

void similarity_topk(const SimilarityTopk& p, int threads);

}  // namespace pyloss::cpu
