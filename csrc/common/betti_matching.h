// Cubical persistence and Betti matching in 1D, 2D and 3D: what CPU and CUDA share.
//
// Image: rows x cols voxels, flat index p = row * cols + col; a signal of n values is n x 1. Cells:
//
//     vertex   p                  the voxel itself
//     edge     2 p + axis         voxels p and p + cols (axis 0) or p + 1 (axis 1)
//     square   p                  voxels p, p + 1, p + cols, p + cols + 1
//
// Volume: depth slices of these, p = (slice * rows + row) * cols + col. Cells at their lowest
// corner p:
//
//     vertex   p
//     edge     3 p + axis
//     square   3 p + axis         the one across which it lies
//     cube     p
//
// A cell's value is the largest of its voxels (sublevel filtration; superlevel negates the image).
// Cells of one dimension are ordered by (value, id): a total order, so that every correct algorithm
// finds the same pairs. The voxel that carries the value is, of several, the one of the largest
// index, but for a cube of the smallest. Bars: dim 0 (vertex, edge), dim 1 (edge, square), dim 2
// (square, cube), without those of length 0.
//
// Loss of one item and dimension, values b, d taken from the image at the voxels of the cells:
//     matched              2 ((b - b')^2 + (d - d')^2)
//     unmatched            (b - d)^2, or "extreme": 2 ((f_b - 1)^2 + f_d^2)
// Papers: arXiv 2211.15272, 2407.04683.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss {
namespace betti {

inline constexpr int kMaxDims = 3;
inline constexpr uint32_t kNone = 0xffffffffu;  // no cell

// Batches of images, contiguous, in host memory or on a device.
struct Problem {
  int64_t items;              // independent images: batch times channels
  int64_t depth, rows, cols;  // 2D: depth = 1; 1D: cols = 1, too
  int dims;                   // of the images: 1, 2 or 3
  uint32_t want;              // bit d: homology dimension d, of those below dims
  bool superlevel;
  const void* input;  // [items][depth][rows][cols]
  DType input_dtype;
  const void* target;  // likewise; null where only the bars of the input are asked for
  DType target_dtype;
  int64_t scratch_limit;  // on a device, in bytes; 0: 1.5 GiB

  bool wanted(int dim) const { return want >> dim & 1; }
};

// --------------------------------------------------------------------------------------------------
// Keys: unsigned integers in the order of the values, -0 and +0 equal.

template <class R>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

PYLOSS_HD inline uint32_t order_key(float x) {
  x += 0.0f;  // -0 becomes +0
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000u);
}
PYLOSS_HD inline uint64_t order_key(double x) {
  x += 0.0;
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  return u ^ (uint64_t(int64_t(u) >> 63) | 0x8000000000000000u);
}
// The key of the filtration value: of x for sublevel sets, of -x for superlevel sets.
template <class R>
PYLOSS_HD inline typename KeyOf<R>::type filtration_key(R x, bool superlevel) {
  return order_key(superlevel ? -x : x);
}

// --------------------------------------------------------------------------------------------------
// Loss

struct Options {
  bool extreme;            // cost of an unmatched bar: pushes its birth to the background, 0 in f
  bool essential;          // dim 0 also matches the two oldest vertices, deaths equal
  double min_persistence;  // unmatched bars of the input up to this length are left out
  double matched_weight, unmatched_weight;  // in the gradient; the loss is reported per term
  double dim_weight[kMaxDims];              // likewise
};

// Terms of the loss, in this order in the last axis of the result.
enum Term { kMatched = 0, kUnmatchedInput = 1, kUnmatchedTarget = 2, kTerms = 3 };

// a - b, 0 for equal infinities.
template <class R>
PYLOSS_HD inline R difference(R a, R b) {
  return a == b ? R(0) : a - b;
}

template <class R>
PYLOSS_HD inline R matched_term(R b, R d, R target_b, R target_d) {
  const R x = difference(b, target_b), y = difference(d, target_d);
  return 2 * (x * x + y * y);
}
// Derivative of matched_term by b; by d likewise.
template <class R>
PYLOSS_HD inline R matched_slope(R value, R target_value) {
  return 4 * difference(value, target_value);
}

template <class R>
PYLOSS_HD inline R unmatched_term(R b, R d, bool extreme, bool superlevel) {
  if (!extreme) {
    const R x = difference(b, d);
    return x * x;
  }
  const R from_one = superlevel ? b : b - 1, from_zero = superlevel ? 1 - d : d;
  return 2 * (from_one * from_one + from_zero * from_zero);
}
template <class R>
PYLOSS_HD inline void unmatched_slopes(R b, R d, bool extreme, bool superlevel, R& slope_b,
                                       R& slope_d) {
  if (!extreme) {
    slope_b = 2 * difference(b, d);
    slope_d = -slope_b;
  } else {
    slope_b = 4 * (superlevel ? b : b - 1);
    slope_d = 4 * (superlevel ? d - 1 : d);
  }
}
// A slope times its weight. What has no weight adds nothing, an infinite slope neither.
template <class R>
PYLOSS_HD inline R weighted(R weight, R slope) {
  return weight == 0 ? R(0) : weight * slope;
}
// Whether an unmatched bar of the input counts.
template <class R>
PYLOSS_HD inline bool counts(R b, R d, double min_persistence) {
  const R length = difference(b, d);
  return (length < 0 ? -length : length) > R(min_persistence);
}

}  // namespace betti
}  // namespace pyloss
