// Betti matching on the CPU, whatever the dimension of the images: batches, loss and rows.
//
//     pairs   the bars of images I, T and M = min(I, T) and their matching, per item:
//             betti_image.h (1D, 2D), betti_volume.h (3D), and of dimension 1 of 3D, where a device
//             has found the others, betti_volume_residue.h
//     loss    values at the voxels of the bars; the gradient is scattered to the same voxels
//
// Parallel: over the items of the batch where there are as many as threads, else within an item.
// Sums follow the lists of bars: no result depends on the number of threads. Sums in double.
#include "cpu/betti_matching.h"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <utility>

#include "cpu/betti_image.h"
#include "cpu/betti_item.h"
#include "cpu/betti_volume.h"
#include "cpu/betti_volume_residue.h"
#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {
namespace {

using namespace betti_item;
using betti::Options;

int64_t voxels_of(const Problem& batch) {
  return batch.depth * batch.rows * batch.cols;
}

template <class R>
ItemResult match_item(const Problem& batch, int64_t item, int threads, Slab& slab,
                      const ReducedResidue* residue) {
  if (residue) return residue->match(item);
  return batch.dims == 3 ? match_volume<R>(batch, item, threads, slab)
                         : match_image<R>(batch, item, threads, slab);
}
template <class R>
ItemResult bars_of_item(const Problem& batch, int64_t item, Slab& slab,
                        const ReducedResidue* residue) {
  if (residue) return residue->match(item);
  return batch.dims == 3 ? bars_of_volume<R>(batch, item, slab)
                         : bars_of_image<R>(batch, item, slab);
}

std::unique_ptr<ReducedResidue> reduced_of(const Problem& batch, const BettiResidue* residue,
                                           int threads) {
  return residue ? std::make_unique<ReducedResidue>(batch, *residue, threads) : nullptr;
}

// The scratch memory of small images is kept by each thread: to map it anew takes longer than the
// work.
constexpr size_t kKeptBytes = size_t(4) << 20;
Slab& kept_slab(size_t bytes) {
  thread_local std::unique_ptr<Slab> slab;
  thread_local size_t size = 0;
  if (size < bytes) {
    slab.reset(new Slab(bytes));
    size = bytes;
  }
  return *slab;
}

// fn(item, threads within it, slab). A slab serves one item after the other.
template <class Fn>
void over_items(const Problem& batch, int threads, Fn&& fn) {
  // Waking a thread up for part of a small image takes longer than the part.
  if (batch.items < threads && voxels_of(batch) < 128 * 128) {
    threads = int(std::max<int64_t>(batch.items, 1));
  }
  const bool outer = batch.items >= threads;
  const size_t bytes = batch.dims == 3 ? volume_bytes(batch) : image_bytes(batch);
  std::mutex mutex;
  std::vector<std::unique_ptr<Slab>> idle;
  parallel_for(batch.items, 1, outer ? threads : 1, [&](int64_t begin, int64_t end) {
    const int within = outer ? 1 : threads;
    if (bytes <= kKeptBytes) {
      for (int64_t item = begin; item < end; ++item) fn(item, within, kept_slab(bytes));
      return;
    }
    std::unique_ptr<Slab> slab;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        slab = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!slab) slab.reset(new Slab(bytes));
    for (int64_t item = begin; item < end; ++item) fn(item, within, *slab);
    std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(slab));
  });
}

// --------------------------------------------------------------------------------------------------
// Loss

template <class R>
void loss_of_item(const Problem& batch, const Options& o, int64_t item, const ItemResult& found,
                  R* loss, R* grad) {
  const Numbers at(batch);
  const int64_t n = voxels_of(batch);
  const R* input = static_cast<const R*>(batch.input) + item * n;
  const R* target = static_cast<const R*>(batch.target) + item * n;
  if (grad) std::fill(grad, grad + n, R(0));
  for (int d = 0; d < batch.dims; ++d) {
    const DimResult& r = found.dim[d];
    double matched = 0, left_input = 0, left_target = 0;
    if (batch.wanted(d)) {
      const R factor = R(o.dim_weight[d] * o.matched_weight);
      auto match = [&](uint32_t voxel, uint32_t target_voxel) {
        const R x = input[voxel], y = target[target_voxel];
        matched += betti::matched_term<R>(x, 0, y, 0);
        if (grad) grad[voxel] += betti::weighted(factor, betti::matched_slope(x, y));
      };
      for (const Match& m : r.matches) {
        const Bar &a = r.input[m.input], &b = r.target[m.target];
        match(at.voxel(a.birth_voxel), at.voxel(b.birth_voxel));
        match(at.voxel(a.death_voxel), at.voxel(b.death_voxel));
      }
      if (d == 0 && o.essential) match(at.voxel(found.oldest_input), at.voxel(found.oldest_target));
      const R lone = R(o.dim_weight[d] * o.unmatched_weight);
      for (size_t i = 0; i < r.input.size(); ++i) {
        if (r.input_matched[i]) continue;
        const uint32_t p = at.voxel(r.input[i].birth_voxel), q = at.voxel(r.input[i].death_voxel);
        const R x = input[p], y = input[q];
        if (!betti::counts(x, y, o.min_persistence)) continue;
        left_input += betti::unmatched_term(x, y, o.extreme, batch.superlevel);
        if (!grad) continue;
        R slope_x, slope_y;
        betti::unmatched_slopes(x, y, o.extreme, batch.superlevel, slope_x, slope_y);
        grad[p] += betti::weighted(lone, slope_x);
        grad[q] += betti::weighted(lone, slope_y);
      }
      for (size_t i = 0; i < r.target.size(); ++i) {
        if (r.target_matched[i]) continue;
        const Bar& b = r.target[i];
        left_target +=
            betti::unmatched_term(target[at.voxel(b.birth_voxel)], target[at.voxel(b.death_voxel)],
                                  o.extreme, batch.superlevel);
      }
    }
    loss[d * betti::kTerms + betti::kMatched] = R(matched);
    loss[d * betti::kTerms + betti::kUnmatchedInput] = R(left_input);
    loss[d * betti::kTerms + betti::kUnmatchedTarget] = R(left_target);
  }
}

template <class R>
void loss_of_batch(const Problem& batch, const Options& options, R* loss, R* grad, int threads,
                   const ReducedResidue* residue) {
  const int64_t n = voxels_of(batch), terms = batch.dims * betti::kTerms;
  over_items(batch, threads, [&](int64_t item, int within, Slab& slab) {
    const ItemResult found = match_item<R>(batch, item, within, slab, residue);
    loss_of_item(batch, options, item, found, loss + item * terms,
                 grad ? grad + item * n : nullptr);
  });
}

// --------------------------------------------------------------------------------------------------
// Rows

// The numbers of the rows in lexicographic order, in the low half of each; what they begin with is
// in the high half. A radix sort by that, of which few rows share one.
template <class Row>
std::vector<uint64_t> sorted(const std::vector<Row>& rows) {
  constexpr int kBits = 11;
  const size_t n = rows.size();
  std::vector<uint64_t> order(n);
  uint32_t most = 0;
  for (size_t i = 0; i < n; ++i) {
    order[i] = uint64_t(rows[i][0]) << 32 | i;
    most = std::max(most, rows[i][0]);
  }
  if (!std::is_sorted(order.begin(), order.end())) {
    std::vector<uint64_t> to(n);
    for (int shift = 32; shift < 64 && most >> (shift - 32); shift += kBits) {
      uint32_t count[(1 << kBits) + 1] = {};
      const auto digit = [&](uint64_t x) { return x >> shift & ((1 << kBits) - 1); };
      for (uint64_t x : order) ++count[digit(x) + 1];
      for (int i = 0; i < 1 << kBits; ++i) count[i + 1] += count[i];
      for (uint64_t x : order) to[count[digit(x)]++] = x;
      std::swap(order, to);
    }
  }
  for (size_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && order[end] >> 32 == order[begin] >> 32; ++end) {
    }
    if (end == begin + 1) continue;
    std::sort(order.begin() + begin, order.begin() + end,
              [&](uint64_t a, uint64_t b) { return rows[uint32_t(a)] < rows[uint32_t(b)]; });
  }
  return order;
}

// Sorted within a dimension, with the item's number and the dimension before each.
template <size_t kWidth>
void append(std::vector<std::array<uint32_t, kWidth>>& rows, int64_t item, int dim,
            std::vector<int64_t>& out) {
  const std::vector<uint64_t> order = sorted(rows);
  const size_t before = out.size();
  out.resize(before + rows.size() * (kWidth + 2));
  int64_t* to = out.data() + before;
  for (uint64_t i : order) {
    *to++ = item;
    *to++ = dim;
    for (uint32_t x : rows[uint32_t(i)]) *to++ = x == kNone ? -1 : int64_t(x);
  }
  rows.clear();
}

struct BarNumbers {
  const Numbers& at;
  int dim;

  uint32_t birth(uint32_t cell) const { return at.cell(dim, cell); }
  uint32_t death(uint32_t cell) const { return at.cell(dim + 1, cell); }
  std::array<uint32_t, 4> row(const Bar& b) const {
    return {at.voxel(b.birth_voxel), at.voxel(b.death_voxel), birth(b.birth), death(b.death)};
  }
};

void append_left(const std::vector<Bar>& bars, const std::vector<uint8_t>& matched,
                 const BarNumbers& numbers, int64_t item, std::vector<int64_t>& out) {
  std::vector<std::array<uint32_t, 4>> rows;
  for (size_t i = 0; i < bars.size(); ++i) {
    if (matched.empty() || !matched[i]) rows.push_back(numbers.row(bars[i]));
  }
  append(rows, item, numbers.dim, out);
}

template <class T>
std::vector<T> joined(std::vector<std::vector<T>>& parts) {
  if (parts.size() == 1) return std::move(parts[0]);
  size_t size = 0;
  for (const auto& part : parts) size += part.size();
  std::vector<T> all;
  all.reserve(size);
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

ItemResult match_item(const Problem& batch, int64_t item, int threads, Slab& slab,
                      const ReducedResidue* residue) {
  return batch.input_dtype == DType::kF64 ? match_item<double>(batch, item, threads, slab, residue)
                                          : match_item<float>(batch, item, threads, slab, residue);
}

}  // namespace

void betti_loss(const Problem& batch, const Options& options, void* loss, void* grad, int threads,
                const BettiResidue* given) {
  const auto reduced = reduced_of(batch, given, threads);
  const ReducedResidue* residue = reduced.get();
  if (batch.input_dtype == DType::kF64) {
    loss_of_batch(batch, options, static_cast<double*>(loss), static_cast<double*>(grad), threads,
                  residue);
  } else {
    loss_of_batch(batch, options, static_cast<float*>(loss), static_cast<float*>(grad), threads,
                  residue);
  }
}

BettiRows betti_matching(const Problem& batch, int threads, const BettiResidue* given) {
  const auto reduced = reduced_of(batch, given, threads);
  const ReducedResidue* residue = reduced.get();
  const Numbers at(batch);
  std::vector<std::vector<int64_t>> matched(batch.items), input(batch.items), target(batch.items);
  over_items(batch, threads, [&](int64_t item, int within, Slab& slab) {
    const ItemResult found = match_item(batch, item, within, slab, residue);
    for (int d = 0; d < batch.dims; ++d) {
      const DimResult& r = found.dim[d];
      const BarNumbers numbers{at, d};
      std::vector<std::array<uint32_t, 10>> rows;
      rows.reserve(r.matches.size());
      for (const Match& m : r.matches) {
        const auto a = numbers.row(r.input[m.input]), b = numbers.row(r.target[m.target]);
        rows.push_back({a[0], a[1], b[0], b[1], a[2], a[3], b[2], b[3],
                        numbers.birth(m.comparison_birth), numbers.death(m.comparison_death)});
      }
      append(rows, item, d, matched[item]);
      append_left(r.input, r.input_matched, numbers, item, input[item]);
      append_left(r.target, r.target_matched, numbers, item, target[item]);
    }
  });
  return {joined(matched), joined(input), joined(target)};
}

std::vector<int64_t> persistence_pairs(const Problem& batch, bool essential, int threads,
                                       const BettiResidue* given) {
  const auto reduced = reduced_of(batch, given, threads);
  const ReducedResidue* residue = reduced.get();
  const Numbers at(batch);
  std::vector<std::vector<int64_t>> pairs(batch.items);
  over_items(batch, threads, [&](int64_t item, int, Slab& slab) {
    const ItemResult found = batch.input_dtype == DType::kF64
                                 ? bars_of_item<double>(batch, item, slab, residue)
                                 : bars_of_item<float>(batch, item, slab, residue);
    for (int d = 0; d < batch.dims; ++d) {
      const DimResult& r = found.dim[d];
      const BarNumbers numbers{at, d};
      std::vector<std::array<uint32_t, 4>> rows;
      rows.reserve(r.input.size() + 1);
      for (const Bar& b : r.input) rows.push_back(numbers.row(b));
      if (d == 0 && essential && batch.wanted(0)) {
        const uint32_t v = at.voxel(found.oldest_input);
        rows.push_back({v, kNone, v, kNone});
      }
      append(rows, item, d, pairs[item]);
    }
  });
  return joined(pairs);
}

std::vector<int64_t> betti_loops(const Problem& volume, const int64_t* squares, int64_t count) {
  return volume.input_dtype == DType::kF64 ? loops_of_volume<double>(volume, squares, count)
                                           : loops_of_volume<float>(volume, squares, count);
}

}  // namespace cpu
}  // namespace pyloss
