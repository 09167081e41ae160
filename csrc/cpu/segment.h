// Folds and maps of the segments of a ragged batch: common/segment.h.
#pragma once

#include "common/segment.h"

namespace pyloss::cpu {

void segment_fold(const segment::Problem& p, segment::Fold f,
                  void* out,  // [results][segments][width], fp32 or fp64; int64 of kArgmax
                  int threads);

void segment_map(const segment::Problem& p, segment::Map f,
                 void* out,  // [rows][width], of the dtype of x
                 int threads);

}  // namespace pyloss::cpu
