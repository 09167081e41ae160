// Folds and maps of segments on the CPU: formulas in common/segment.h.
//
// Decomposition of a fold: windows of equal numbers of rows go to threads, each with the segments
// that begin in it. A segment longer than a window is cut into parts of a window's length, counted
// from its own beginning; each part belongs to the window in which it begins, and the parts are
// merged in their order, in double, when all are there. So a thousand segments of one value and one
// of a million cost the same a value, and neither threads nor neighbours change a bit.
//
// A column alone: a segment of up to two vectors is two loads, masked, whatever its length, because
// a branch on the length of short segments costs more than they do; the lanes of as many segments
// as a vector has lanes are joined together. Loads reach into the next segments, never past x.
// Several columns: a vector of columns down the rows. Two passes where a maximum or a mean comes
// first; the part is in the first-level cache by then.
//
// A map lays the coefficients of each value out beside the values and then knows no segments.
//
// Half types are converted in the ranges of the threads, and go the way of float.
//
// Memory traffic per value of b bytes: a fold reads b, a map reads b (nothing for kSpread) and
// writes b; per segment and column the accumulator's size once. Accumulator: float, double for
// double.
#include "cpu/segment.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/compiler.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"

namespace pyloss::cpu {
namespace {

using namespace segment;

using FoldWindows = void (*)(const Problem&, Fold, void*, double*, int64_t, int64_t);
using MapRows = void (*)(const Problem&, Map, void*, int64_t, int64_t);
struct Kernels {
  FoldWindows (*fold)(Pass);
  MapRows (*map)(Form);
};

inline bool sums_are_results(Fold f) {
  return results(f) == 1 && f != Fold::kMean && f != Fold::kLogSumExp;
}

constexpr int64_t kMapValues = 1024;
constexpr int64_t kOverread = 64;  // how far loads reach beyond the values

#define PYLOSS_KERNELS "cpu/segment_kernels.h"
#include "cpu/per_instruction_set.h"

constexpr Kernels double_kernels = {base::fold_of<double>, base::map_of<double>};

const Kernels& kernels(DType t) {
  if (t == DType::kF64) return double_kernels;
#if PYLOSS_HAS_TARGET_PRAGMA
  if (instruction_set() == InstructionSet::kV4) return v4::kernels;
  if (instruction_set() == InstructionSet::kV3) return v3::kernels;
#endif
  return base::kernels;
}

// A problem whose values are float where they were halves, in a range of rows.
struct Rows {
  Problem problem;
  std::unique_ptr<float[]> x, other;

  explicit Rows(const Problem& p) : problem(p) {}

  void convert(int64_t begin, int64_t end) {
    if (dtype_size(problem.dtype) != 2) return;
    problem.x = converted(problem.x, &problem.x_stride, begin, end, &x);
    if (problem.other) {
      problem.other = converted(problem.other, &problem.other_stride, begin, end, &other);
    }
  }

 private:
  // Where row 0 would be.
  const float* converted(const void* from, int64_t* stride, int64_t begin, int64_t end,
                         std::unique_ptr<float[]>* to) {
    const int64_t width = problem.width, n = (end - begin) * width;
    to->reset(new float[size_t(n + kOverread)]);
    const uint16_t* rows = static_cast<const uint16_t*>(from);
    if (*stride == width) {
      load_values(rows + begin * width, problem.dtype, n, to->get());
    } else {
      for (int64_t r = begin; r < end; ++r) {
        load_values(rows + r * *stride, problem.dtype, width, to->get() + (r - begin) * width);
      }
    }
    *stride = width;
    return to->get() - begin * width;
  }
};

struct Lengths {
  int64_t shortest, longest;
};
template <class I>
PYLOSS_INLINE Lengths lengths_of(const I* o, int64_t segments, int64_t rows) {
  I low = 0, high = 0;  // first, so that no difference overflows
  for (int64_t s = 0; s < segments; ++s) {
    low = o[s] < low ? o[s] : low;
    high = o[s] > high ? o[s] : high;
  }
  if (low < 0 || int64_t(high) > rows) return {-1, 0};
  I shortest = 0, longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const I n = o[s + 1] - o[s];
    shortest = n < shortest ? n : shortest;
    longest = n > longest ? n : longest;
  }
  return {int64_t(shortest), int64_t(longest)};
}
PYLOSS_MULTIVERSION Lengths lengths(const int64_t* o, int64_t segments, int64_t rows) {
  return lengths_of(o, segments, rows);
}
PYLOSS_MULTIVERSION Lengths lengths(const int32_t* o, int64_t segments, int64_t rows) {
  return lengths_of(o, segments, rows);
}

// Returns the rows of the longest segment.
template <class I>
int64_t checked_offsets(const Problem& p) {
  const I* o = static_cast<const I*>(p.offsets);
  if (o[0] != 0 || o[p.segments] != p.rows) {
    throw std::invalid_argument("offsets must start at 0 and end at the number of values, " +
                                std::to_string(p.rows));
  }
  const Lengths found = lengths(o, p.segments, p.rows);
  if (found.shortest < 0) throw std::invalid_argument("offsets must not decrease");
  return found.longest;
}
int64_t checked_offsets(const Problem& p) {
  return p.offsets_dtype == DType::kI64 ? checked_offsets<int64_t>(p) : checked_offsets<int32_t>(p);
}

// The parts of the long segments that begin in the windows [begin, end).
template <class R>
void merge_windows(const Problem& p, Fold f, const double* parts, R* out, int64_t begin,
                   int64_t end) {
  const Pass pass = pass_of(f);
  const int64_t size = part_rows(p.width), step = p.segments * p.width;
  const int64_t last = end == windows(p) ? p.rows + 1 : end * size;
  for (int64_t s = p.first_from(begin * size); s < p.segments && p.offset(s) < last; ++s) {
    const int64_t from = p.offset(s), stop = p.offset(s + 1);
    if (stop - from <= size) continue;
    for (int64_t c = 0; c < p.width; ++c) {
      Part<double> all{};
      for (int64_t at = from; at < stop; at += size) {
        const int64_t slot = 2 * (at / size) + (at == from);
        const double* part = parts + (slot * p.width + c) * kPartNumbers;
        all = merge(pass, all,
                    Part<double>{double(std::min(size, stop - at)), part[0], {part[1], part[2]}});
      }
      double found[2] = {};
      finish(f, all, found, 1);
      out[s * p.width + c] = R(found[0]);
      if (results(f) == 2) out[step + s * p.width + c] = R(found[1]);
    }
  }
}

// The first row that holds the maximum, or NaN where that is NaN.
template <class T>
void argmax_segments(const Problem& p, int64_t* out, int64_t begin, int64_t end) {
  using R = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t s = i / p.width, c = i % p.width, stop = p.offset(s + 1);
    const R m = static_cast<const R*>(p.given[0])[i];
    out[i] = -1;
    for (int64_t row = p.offset(s); row < stop; ++row) {
      const R x = R(to_float(static_cast<const T*>(p.x)[row * p.x_stride + c]));
      if (x == m || x != x) {
        out[i] = row;
        break;
      }
    }
  }
}

}  // namespace

void segment_fold(const Problem& p, Fold f, void* out, int threads) {
  const int64_t longest = checked_offsets(p);
  if (p.segments * p.width == 0) return;
  threads = useful_threads(p.rows * p.width + p.segments * p.width, threads);
  if (f == Fold::kArgmax) {
    dispatch_float(p.dtype, [&](auto zero) {
      using T = decltype(zero);
      parallel_for(p.segments * p.width, 4096, threads, [&](int64_t begin, int64_t end) {
        argmax_segments<T>(p, static_cast<int64_t*>(out), begin, end);
      });
    });
    return;
  }
  const int64_t size = part_rows(p.width), all = windows(p);
  const bool has_long = longest > size;
  std::unique_ptr<double[]> parts;
  if (has_long) parts.reset(new double[size_t(2 * all * p.width * kPartNumbers)]);
  const FoldWindows fold = kernels(p.dtype).fold(pass_of(f));
  const int64_t grain = rows_per_range(size * p.width);
  parallel_for(all, grain, threads, [&](int64_t begin, int64_t end) {
    Rows rows(p);
    // A segment that begins in the last window may end a window later.
    rows.convert(begin * size, std::min(p.rows, (end + 1) * size));
    fold(rows.problem, f, out, parts.get(), begin, end);
  });
  if (!has_long) return;
  parallel_for(all, grain, threads, [&](int64_t begin, int64_t end) {
    if (p.dtype == DType::kF64) {
      merge_windows(p, f, parts.get(), static_cast<double*>(out), begin, end);
    } else {
      merge_windows(p, f, parts.get(), static_cast<float*>(out), begin, end);
    }
  });
}

void segment_map(const Problem& p, Map f, void* out, int threads) {
  checked_offsets(p);
  if (p.rows * p.width == 0) return;
  const MapRows map = kernels(p.dtype).map(form_of(f));
  const bool is_half = dtype_size(p.dtype) == 2;
  const int64_t grain = rows_per_range(p.width);
  parallel_for(p.rows, grain, useful_threads(p.rows * p.width, threads),
               [&](int64_t begin, int64_t end) {
                 if (!is_half) return map(p, f, out, begin, end);
                 Rows rows(p);
                 if (form_of(f) != Form::kSpread) rows.convert(begin, end);
                 const int64_t at = begin * p.width, n = (end - begin) * p.width;
                 const std::unique_ptr<float[]> found(new float[size_t(n)]);
                 map(rows.problem, f, found.get() - at, begin, end);
                 for (int64_t i = 0; i < n; i += kBlock) {
                   store_block(found.get() + i, std::min(kBlock, n - i), p.dtype,
                               static_cast<uint16_t*>(out) + at + i, false);
                 }
               });
}

}  // namespace pyloss::cpu
