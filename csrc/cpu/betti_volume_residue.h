// Dimension 1 of volumes whose dimensions 0 and 2 and apparent pairs a device has found: the
// reduction of the columns that are left (cuda/betti_matching_residue.cu), and the matching.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// The reduction of all columns: every matrix of every item is a task. Throws std::invalid_argument
// where a column is none.
class ReducedResidue {
 public:
  ReducedResidue(const betti::Problem& batch, const BettiResidue& residue, int threads);
  // Bars of dimension 1, and their matching where the batch has a target.
  betti_item::ItemResult match(int64_t item) const;

 private:
  struct Pair {
    uint32_t square, edge;
  };
  const betti::Problem& batch_;
  const BettiResidue& residue_;
  std::vector<std::vector<Pair>> pairs_;  // of each matrix and item, by square
};

}  // namespace cpu
}  // namespace pyloss
