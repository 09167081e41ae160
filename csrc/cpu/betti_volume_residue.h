// Dimension 1 of volumes whose dimensions 0 and 2 and apparent pairs a device has found: the
// reduction of the columns that are left (cuda/betti_matching_residue.cu), and the matching.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/betti_item.h"

namespace pyloss {
namespace cpu {

// Cells by their public numbers, matrices (rows, columns): (I, I), (T, T), (M, M), (I, M), (T, M).
struct BettiResidue {
  const uint32_t* rank;  // [images][items][voxels], images: I, T, M, or I alone
  const uint8_t* tree;   // [images][items][3 voxels] whether an edge joins components
  // Columns of all matrices: (matrix * items + item) * 3 voxels + square, by matrix and item, and
  // then in the order of the columns.
  const int64_t* names;  // [count]
  int64_t count;
};

// Bars of dimension 1, and their matching where the batch has a target. Throws
// std::invalid_argument where a column is none.
betti_item::ItemResult match_residue(const betti::Problem& batch, int64_t item, int threads,
                                     const BettiResidue& residue);

}  // namespace cpu
}  // namespace pyloss
