// CUDA entry points of betti_matching, for 1D (cols = 1) and 2D images, and for the first and the
// last homology dimension of volumes (dimension 1 is the host's). Everything is enqueued on
// `stream` of the current device: nothing is allocated, nothing waits for the device, and all calls
// can be captured in a graph. The algorithm: betti_matching.cu.
//
// The images may be of any dtypes, also of two: they are compared as float, or as double next to
// f64, i32 or i64. How an op calls it:
//   scratch = torch.empty(betti_scratch_bytes(p), dtype=uint8), then
//   betti_loss   loss terms and gradients in one go, all shapes static
//   betti_pairs  the bars and their matching, of one group of items; how many rows they make
//   betti_rows   these rows, once the host has read their number and has room for them
// Rows come in any order, no row twice: their sort is the op's.
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

// Whether values are compared as double.
bool betti_in_double(const betti::Problem& p);

// Bytes of device memory, aligned to 256, for either call. Items are worked off in groups if all of
// them would need more than scratch_limit. One item, the least possible, needs about 100 bytes per
// voxel, dimension and image (of input, target and their minimum), 130 of a volume: 157 MB for
// 512^2, 0.7 GB for 96^3.
int64_t betti_scratch_bytes(const betti::Problem& p);

// NaN in either image of an item makes its loss and gradients NaN.
void betti_loss(const betti::Problem& p, const BettiLoss& l, void* scratch, int64_t scratch_bytes,
                void* stream);

// Items of a group: so many are worked off at a time.
int64_t betti_group(const betti::Problem& p);

// counts: kTerms numbers of rows, of the kinds of the loss terms (without a target only
// kUnmatchedInput, all bars), then, 0 for none, 2 items - (2 item + image) of the first NaN, whose
// key sorts above everything else: an op refuses it. `essential` (without a target): also what
// never dies, with a death of -1. The scratch memory holds the result.
void betti_pairs(const betti::Problem& p, bool essential, uint32_t* counts, void* scratch,
                 int64_t scratch_bytes, void* stream);

// rows[kTerms]: of 12 numbers (kMatched: item, dimension, 4 voxels, 6 cells) or 6 (item, dimension,
// 2 voxels, 2 cells), in device memory. The same problem and scratch memory, and these counts on
// the host.
void betti_rows(const betti::Problem& p, const uint32_t* counts, int64_t* const* rows,
                void* scratch, int64_t scratch_bytes, void* stream);

// Dimension 1 of a volume, after either call for dimensions 0 and 2 of one group of items and with
// its scratch memory: the columns that are left to a reduction on the host. counts[2]: their
// number, and a NaN as above.
void betti_columns(const betti::Problem& p, uint32_t* counts, void* scratch, int64_t scratch_bytes,
                   void* stream);
// Of each, in any order: its name (matrix * items + item) * 3 n + square, the matrices (rows,
// columns) being those of (I, I), (T, T), (M, M), (I, M), (T, M); and a number that is in the order
// of the columns of a matrix. `count`: on the host.
void betti_column_keys(const betti::Problem& p, int64_t count, int64_t* names, int64_t* keys,
                       void* scratch, int64_t scratch_bytes, void* stream);
// What the host needs beside them lies at the beginning of the scratch memory: ranks of the voxels,
// uint32 (images, items, n), up to a multiple of 256 bytes; then whether an edge joins components,
// uint8 (images, items, 3 n). Bytes of both; images: 3 with a target (I, T, M), or 1.
int64_t betti_prefix_bytes(const betti::Problem& p);

}  // namespace pyloss::cuda
