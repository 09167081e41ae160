// What the algorithms of Betti matching give for one image or one pair of images. Those of 1D and
// 2D are in betti_image.h, those of 3D in betti_volume.h; betti_matching.cpp makes the loss and the
// rows of it, whatever the dimension.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/betti_matching.h"

namespace pyloss {
namespace cpu {
namespace betti_item {

using betti::kNone;
using betti::Problem;

// Cells and voxels in the numbers of Numbers.
struct Bar {
  uint32_t birth, death;
  uint32_t birth_voxel, death_voxel;
};

struct Match {
  uint32_t input, target;                       // numbers of bars
  uint32_t comparison_birth, comparison_death;  // cells
};

struct DimResult {
  std::vector<Bar> input, target;
  std::vector<Match> matches;
  std::vector<uint8_t> input_matched, target_matched;  // empty: none is
};

struct ItemResult {
  DimResult dim[betti::kMaxDims];
  uint32_t oldest_input, oldest_target;  // vertices
};

// A bar of the comparison image, and the numbers of the bars that it pairs; kNone: of none.
struct ComparisonBar {
  uint32_t birth, death;
  uint32_t in_input, in_target;
};

inline void link(const std::vector<ComparisonBar>& comparison, DimResult& r) {
  r.input_matched.assign(r.input.size(), 0);
  r.target_matched.assign(r.target.size(), 0);
  for (const ComparisonBar& m : comparison) {
    if (m.in_input == kNone || m.in_target == kNone) continue;
    r.matches.push_back({m.in_input, m.in_target, m.birth, m.death});
    r.input_matched[m.in_input] = 1;
    r.target_matched[m.in_target] = 1;
  }
}

[[noreturn]] inline void found_nan(const char* name, int64_t item) {
  throw std::invalid_argument(std::string(name) + " must not contain NaN; item " +
                              std::to_string(item) + " does");
}

// From the numbers of an ItemResult to the public ones of common/betti_matching.h. Those of images
// of one and two dimensions are the public ones.
//
// Inside, a volume lies in a frame, so that no neighbour needs a test of its coordinates: one
// column shared by the left and the right, one row shared by the two sides of a slice, one slice
// before and after. Voxel (slice, row, col) is (slice + 1) * slice_stride + row * stride + col.
// Cells as there, with padded voxels. The order of numbers, and with it every tie, is that of the
// public ones.
class Numbers {
 public:
  explicit Numbers(const Problem& p)
      : dims_(p.dims),
        rows_(uint32_t(p.rows)),
        cols_(uint32_t(p.cols)),
        stride_(cols_ + 1),
        slice_stride_((rows_ + 1) * stride_),
        inverse_(1.0 / stride_),
        slice_inverse_(1.0 / slice_stride_) {}

  uint32_t voxel(uint32_t v) const {
    if (dims_ < 3) return v;
    // Without a division: exact, since (v + 1/2) / stride is at least 1 / (2 stride) from any
    // integer.
    const uint32_t w = v - slice_stride_ - stride_ - 1;
    const uint32_t slice = uint32_t((w + 0.5) * slice_inverse_);
    const uint32_t in_slice = w - slice * slice_stride_;
    return slice * (rows_ * cols_) + in_slice - uint32_t((in_slice + 0.5) * inverse_);
  }
  // Of a cell of dimension k.
  uint32_t cell(int k, uint32_t c) const {
    if (k == 0 || (k == dims_ && k > 1)) return voxel(c);
    if (dims_ < 3) return c;
    return 3 * voxel(c / 3) + c % 3;
  }

 private:
  int dims_;
  uint32_t rows_, cols_, stride_, slice_stride_;
  double inverse_, slice_inverse_;
};

}  // namespace betti_item
}  // namespace cpu
}  // namespace pyloss
