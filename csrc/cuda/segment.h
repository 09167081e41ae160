// Folds and maps of the segments of a ragged batch on the GPU: common/segment.h.
#pragma once

#include "common/segment.h"

namespace pyloss::cuda {

void segment_fold(const segment::Problem& p, segment::Fold f,
                  void* out,      // [results][segments][width], fp32 or fp64; int64 of kArgmax
                  void* scratch,  // [2 windows][width][kPartNumbers], all NaN; null if rows <= part_rows
                  void* stream);

void segment_map(const segment::Problem& p, segment::Map f,
                 void* out,  // [rows][width], of the dtype of x
                 void* stream);

}  // namespace pyloss::cuda
