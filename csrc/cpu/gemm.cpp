// Matrix products on the CPU: choice of the instruction set, and whole products cut into tasks.
//
// Formula, decomposition, traffic, accumulator: gemm.h. A task of multiply() is a block of rows
// times a range of columns (times a part of K, see part_depth); for each block of K it packs its
// rows of A, then each panel of B just before the tiles that read it, which finds it in the
// first-level cache. A panel is packed once for each block of rows: with left_rows() of them that
// takes 1 or 2 % of the time.
#include "cpu/gemm.h"

#include <type_traits>
#include <utility>

#include "common/compiler.h"
#include "cpu/instruction_set.h"
#include "cpu/memory.h"
#include "cpu/tasks.h"

namespace pyloss::cpu::gemm {
namespace {

template <class R>
struct Kernels {
  int64_t tile_rows, panel_columns;
  void (*pack_left)(const MatrixView<R>&, R*);
  void (*pack_right)(const MatrixView<R>&, R*);
  void (*product)(const Left<R>&, const Right<R>&, R*, int64_t, bool);
  int64_t (*multiply_adds)(int64_t, R*);
};

#define PYLOSS_KERNELS "cpu/gemm_kernels.h"
#include "cpu/per_instruction_set.h"

template <class R>
const Kernels<R>& kernels() {
  static const Kernels<R> base_kernels = base::kernels_of<R>();
#if PYLOSS_HAS_TARGET_PRAGMA
  static const Kernels<R> v3_kernels = v3::kernels_of<R>(), v4_kernels = v4::kernels_of<R>();
  if (instruction_set() == InstructionSet::kV4) return v4_kernels;
  if (instruction_set() == InstructionSet::kV3) return v3_kernels;
#endif
  return base_kernels;
}

// Below this many multiplications a product is over sooner than a second thread has woken up.
constexpr int64_t kSerialProducts = int64_t(1) << 20;

// The cut of C into tasks: sizes only, which no bit of the result depends on.
struct Cut {
  int64_t rows, columns;  // of a task

  template <class R>
  static Cut of(const Kernels<R>& k, int64_t m, int64_t n, int64_t depth, int64_t tasks) {
    const auto rounded = [](int64_t n, int64_t size) { return blocks_of(n, size) * size; };
    const int64_t blocks = blocks_of(m, left_rows<R>(depth));
    Cut cut{rounded(blocks_of(m, blocks), k.tile_rows), rounded(n, k.panel_columns)};
    // Shorter rows pack B once more, fewer columns A: the longer side hides it better.
    const int64_t least_rows = 8 * k.tile_rows, least_columns = 4 * k.panel_columns;
    while (blocks_of(m, cut.rows) * blocks_of(n, cut.columns) < tasks) {
      if (cut.columns >= cut.rows && cut.columns > least_columns) {
        cut.columns = rounded(cut.columns / 2, k.panel_columns);
      } else if (cut.rows > least_rows) {
        cut.rows = rounded(cut.rows / 2, k.tile_rows);
      } else {
        break;
      }
    }
    return cut;
  }
};

// The depth of the parts that are summed on their own and then added in order, where C is too small
// to be cut among threads and K is long. By the sizes alone: bits depend on it.
int64_t part_depth(int64_t m, int64_t n, int64_t depth) {
  constexpr int64_t kSmall = int64_t(1) << 17, kParts = 8, kLeastBlocks = 4;
  if (m * n > kSmall) return std::max<int64_t>(1, depth);
  return kDepth * std::max(kLeastBlocks, blocks_of(blocks_of(depth, kDepth), kParts));
}

// Of a few columns, which are in the cache.
template <class R>
void add_row(int64_t rows, int64_t columns, const R* row, R* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] += row[j];
  }
}

template <class R>
void multiply_block(const Kernels<R>& k, const MatrixView<R>& a, const MatrixView<R>& b, R* c,
                    int64_t ldc, bool add, const R* bias, R* scratch) {
  R* const panel = scratch + left_size<R>(a.rows, std::min(kDepth, a.columns));
  int64_t l = 0;
  do {
    const int64_t depth = std::min(kDepth, a.columns - l);
    const Left<R> left = pack_left(a.block(0, l, a.rows, depth), scratch);
    for (int64_t n = 0; n < b.columns; n += k.panel_columns) {
      const int64_t width = std::min(k.panel_columns, b.columns - n);
      product(left, pack_right(b.block(l, n, depth, width), panel), c + n, ldc, add || l > 0);
      if (bias && l + depth == a.columns) add_row(a.rows, width, bias + n, c + n, ldc);
    }
    l += kDepth;
  } while (l < a.columns);
}

}  // namespace

template <class R>
int64_t left_rows(int64_t depth) {
  const int64_t bytes = std::max<int64_t>(1, std::min(depth, kDepth)) * sizeof(R);
  const int64_t height = kernels<R>().tile_rows;
  return std::max(height, l2_cache_bytes() * 3 / 4 / bytes / height * height);
}

template <class R>
int64_t panel_columns() {
  return kernels<R>().panel_columns;
}

template <class R>
int64_t left_size(int64_t rows, int64_t depth) {
  // Packing writes past the last panel. Whole cache lines, as there may be another array behind.
  return (rows * depth + kernels<R>().panel_columns + 63) / 64 * 64;
}
template <class R>
int64_t right_size(int64_t depth, int64_t columns) {
  const int64_t width = panel_columns<R>();
  return blocks_of(columns, width) * width * depth;
}

template <class R>
Left<R> pack_left(const MatrixView<R>& a, R* to) {
  kernels<R>().pack_left(a, to);
  return {to, a.rows, a.columns, a.columns, Form::kPanels};
}
template <class R>
Right<R> pack_right(const MatrixView<R>& b, R* to) {
  kernels<R>().pack_right(b, to);
  return {to, b.rows, b.columns, b.rows};
}

template <class R>
void product(const Left<R>& left, const Right<R>& right, R* c, int64_t ldc, bool add) {
  kernels<R>().product(left, right, c, ldc, add);
}

template <class R>
void multiply(const MatrixView<R>& a, const MatrixView<R>& b, R* c, int64_t ldc, bool add,
              int threads, const R* bias) {
  const int64_t m = a.rows, n = b.columns, k = a.columns;
  if (m == 0 || n == 0) return;
  const Kernels<R>& kernel = kernels<R>();
  const int64_t part = part_depth(m, n, k), parts = std::max<int64_t>(1, blocks_of(k, part));
  // Four tasks for each thread even out what the threads meet.
  const bool serial = threads == 1 || m * n * k < kSerialProducts;
  const Cut cut = Cut::of(kernel, m, n, k, serial ? 1 : blocks_of(4 * int64_t(threads), parts));
  const int64_t across = blocks_of(n, cut.columns), tiles = blocks_of(m, cut.rows) * across;
  const int64_t slots = slots_for(tiles * parts, serial ? 1 : threads);
  const int64_t depth = std::min(kDepth, k);
  const int64_t size = left_size<R>(std::min(m, cut.rows), depth) + kernel.panel_columns * depth;
  const Buffer<R> scratch(slots * size), sums((parts - 1) * m * n);
  run_tasks(tiles * parts, slots, [&](int64_t slot, int64_t task) {
    const int64_t p = task / tiles, at = task % tiles;
    const int64_t i = at / across * cut.rows, j = at % across * cut.columns, l = p * part;
    const int64_t rows = std::min(cut.rows, m - i), columns = std::min(cut.columns, n - j);
    const int64_t length = std::min(part, k - l), stride = p ? n : ldc;
    R* const to = p ? sums.get() + (p - 1) * m * n : c;
    multiply_block(kernel, a.block(i, l, rows, length), b.block(l, j, length, columns),
                   to + i * stride + j, stride, add && p == 0, p || !bias ? nullptr : bias + j,
                   scratch.get() + slot * size);
  });
  for (int64_t p = 0; p < parts - 1; ++p) {
    for (int64_t i = 0; i < m; ++i) {
      add_row(1, n, sums.get() + (p * m + i) * n, c + i * ldc, ldc);
    }
  }
}

template <class R>
double multiply_adds(int64_t operations) {
  alignas(64) R numbers[128 / sizeof(R)];
  for (R& x : numbers) x = R(0.5);
  for (int64_t done = 0; done < operations;) done += kernels<R>().multiply_adds(1000, numbers);
  return double(numbers[0]);
}

#define PYLOSS_GEMM_OF(R)                                                                       \
  template double multiply_adds<R>(int64_t);                                                    \
  template int64_t left_rows<R>(int64_t);                                                       \
  template int64_t panel_columns<R>();                                                          \
  template int64_t left_size<R>(int64_t, int64_t);                                              \
  template int64_t right_size<R>(int64_t, int64_t);                                             \
  template Left<R> pack_left<R>(const MatrixView<R>&, R*);                                      \
  template Right<R> pack_right<R>(const MatrixView<R>&, R*);                                    \
  template void product<R>(const Left<R>&, const Right<R>&, R*, int64_t, bool);                 \
  template void multiply<R>(const MatrixView<R>&, const MatrixView<R>&, R*, int64_t, bool, int, \
                            const R*);
PYLOSS_GEMM_OF(float)
PYLOSS_GEMM_OF(double)
#undef PYLOSS_GEMM_OF

}  // namespace pyloss::cpu::gemm
