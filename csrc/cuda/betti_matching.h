// CUDA entry points of betti_matching, for 1D (cols = 1) and 2D images. Everything is enqueued on
// `stream` of the current device: nothing is allocated, nothing waits for the device, and all calls
// can be captured in a graph. The algorithm: betti_matching.cu.
//
// The images may be of any dtypes, also of two: they are compared as float, or as double next to
// f64, i32 or i64. How an op calls it:
//   scratch = torch.empty(betti_scratch_bytes(p), dtype=uint8), then
//   betti_loss   loss terms and gradients in one go, all shapes static
//   betti_pairs  barcodes and matching as tables with one slot per cell
// Python has no betti_pairs: its tables also name edges, and cells of the minimum of both images.
// The tests see the pairs through it, of which the loss shows sums only.
// `birth >= 0` marks a bar in a table. One torch.nonzero compacts it; that waits for the device, as
// every result of unknown size must.
#pragma once

#include <cstdint>

#include "common/betti_matching.h"
#include "common/dtype.h"

namespace pyloss::cuda {

struct BettiLoss {
  betti::Options options;
  double target_weight;  // of unmatched bars in the target's gradient
  void* loss;            // (items, dims, kTerms), not weighted, 0 for dimensions not wanted:
                         // float, or double where values are compared as double
  void* grad_input;      // (items, rows, cols) in the input's dtype: gradient of the weighted sum
  void* grad_target;     // of all terms; the same for a floating target; either may be null
};

// Slots: birth vertex in dimension 0, lowest corner of the dying square in dimension 1. Tables have
// the shape (images, items, dims, rows * cols), images = 2 with a target, the input's first.
struct BettiTables {
  int32_t* birth;      // voxel of the birth cell, -1: no bar here
  int32_t* death;      // voxel of the death cell, -1: no bar here
  int32_t* mate;       // slot of the matched bar of the other image, -1: none; null without target
  int32_t* essential;  // (images, items): the vertex that never dies; -1 without dimension 0
};

// Whether values are compared as double.
bool betti_in_double(const betti::Problem& p);

// Bytes of device memory, aligned to 256, for either call. Items are worked off in groups if all of
// them would need more than scratch_limit. One item, the least possible, needs about 100 bytes per
// voxel, dimension and image (of input, target and their minimum): 157 MB for 512^2.
int64_t betti_scratch_bytes(const betti::Problem& p);

// NaN in either image of an item makes its loss and gradients NaN.
void betti_loss(const betti::Problem& p, const BettiLoss& l, void* scratch, int64_t scratch_bytes,
                void* stream);

// NaN sorts above everything else; an op that must refuse it looks for it first.
void betti_pairs(const betti::Problem& p, const BettiTables& t, void* scratch,
                 int64_t scratch_bytes, void* stream);

}  // namespace pyloss::cuda
