// Persistence pairs, Betti matching and its loss, of batches of images of up to three dimensions.
#pragma once

#include <cstdint>
#include <vector>

#include "common/betti_matching.h"
#include "common/dtype.h"
#include "cpu/betti_volume_residue.h"

namespace pyloss {
namespace cpu {

// Both images of the dtype of the input, float32 or float64.
// Throws std::invalid_argument where an image holds NaN. `residue`: null, or of a batch of volumes
// of which dimension 1 is wanted.
void betti_loss(const betti::Problem& batch, const betti::Options& options,
                void* loss,  // [items][dims][kTerms]
                void* grad,  // as the input, or null
                int threads, const BettiResidue* residue);

// Rows of int64, sorted.
struct BettiRows {
  std::vector<int64_t> matched;           // item, dim, 4 voxels, 6 cells
  std::vector<int64_t> unmatched_input;   // item, dim, 2 voxels, 2 cells
  std::vector<int64_t> unmatched_target;  // likewise
};
BettiRows betti_matching(const betti::Problem& batch, int threads, const BettiResidue* residue);
// Rows as the unmatched ones above; the essential class has death -1.
std::vector<int64_t> persistence_pairs(const betti::Problem& batch, bool essential, int threads,
                                       const BettiResidue* residue);
// Of one volume: edges of a cycle for each of `squares` that is the death of a bar of dimension 1,
// as rows (place in `squares`, edge).
std::vector<int64_t> betti_loops(const betti::Problem& volume, const int64_t* squares,
                                 int64_t count);

}  // namespace cpu
}  // namespace pyloss
