// The bars of a group of items as rows: first the lists of them and their number, which the host
// reads, then the rows themselves.
#include <stdexcept>

#include "cuda/betti_matching.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) betti_no_rows_kernel(u32* counts) {
  for_each(0, betti::kTerms + 1, [&](u32 i) { counts[i] = 0; });
}

// Lists of what becomes a row: of matched bars the slot of their bar of `both`, of others their
// own, as places in a table of (items, dims, n). In any order; counts[kTerms] says where a NaN is,
// 0: none.
__global__ void __launch_bounds__(kThreads)
    betti_list_kernel(BettiWork w, bool essential, u32* counts) {
  const u32 size = w.items * w.dims * w.n;
  u32* names = reinterpret_cast<u32*>(w.room_a);
  for_blocks(0, size, [&](u32 i, bool active) {
    const auto list = [&](u32 term, bool wanted) {
      const u32 place = block_append(wanted, counts + term);
      if (wanted) names[u64(term) * size + place] = i;
    };
    const auto lone = [&](u32 image) {
      const u64 at = u64(image) * size + i;
      return active && w.bar[at] != kNone && w.mate[at] == kNone;
    };
    if (w.images == 3) {
      list(betti::kMatched, active && w.both[i] != kNone);
      list(betti::kUnmatchedTarget, lone(kTarget));
    }
    const bool oldest = essential && active && w.first_dim == 0 && i / w.n % w.dims == 0 &&
                        w.essential[i / w.n / w.dims] == i % w.n;
    list(betti::kUnmatchedInput, lone(kInput) || oldest);
  });
  find_nan(w, counts + betti::kTerms);
}

// A list as rows of int64: item, dimension, voxels of births and deaths, cells of births and
// deaths.
__global__ void __launch_bounds__(kThreads)
    betti_rows_kernel(BettiWork w, u32 term, u32 count, u32 last_dim, int64_t* rows) {
  const u32 size = w.items * w.dims * w.n;
  const u32* names = reinterpret_cast<const u32*>(w.room_a) + u64(term) * size;
  for_each(0, count, [&](u32 i) {
    const u32 name = names[i], slot = name % w.n;
    const u32 item = name / w.n / w.dims, dim = w.first_dim + name / w.n % w.dims;
    int64_t* row = rows + u64(i) * (term == betti::kMatched ? 12 : 6);
    *row++ = item;
    *row++ = dim * last_dim;
    const auto put_voxels = [&](u32 image, u32 of, u32 joint) {
      const Bar bar = bar_voxels(w, ranks_of(w, image, item), dim, of, joint);
      *row++ = bar.birth;
      *row++ = bar.death;
    };
    const auto put_cells = [&](u32 of, u32 joint) {
      *row++ = dim == 0 ? of : joint;
      *row++ = dim == 0 ? joint : of;
    };
    if (term == betti::kMatched) {
      const u32 a = w.via[name], b = w.via[u64(size) + name];
      const u32 of_a = w.bar[name - slot + a], of_b = w.bar[u64(size) + name - slot + b];
      put_voxels(kInput, a, of_a);
      put_voxels(kTarget, b, of_b);
      put_cells(a, of_a);
      put_cells(b, of_b);
      put_cells(slot, w.both[name]);
      return;
    }
    const u32 image = term == betti::kUnmatchedInput ? kInput : kTarget;
    const u32 joint = w.bar[u64(image) * size + name];
    if (joint != kNone) {
      put_voxels(image, slot, joint);
      put_cells(slot, joint);
      return;
    }
    for (int k = 0; k < 2; ++k) {  // what never dies
      *row++ = slot;
      *row++ = -1;
    }
  });
}

}  // namespace

void betti_list(const BettiWork& w, bool essential, u32* counts, void* stream) {
  launch_over(w, betti::kTerms + 1, stream, betti_no_rows_kernel, counts);
  launch_over(w, u64(w.items) * w.dims * w.n, stream, betti_list_kernel, w, essential, counts);
}

void betti_write_rows(const BettiWork& w, const u32* counts, u32 last_dim, int64_t* const* rows,
                      void* stream) {
  for (u32 term = 0; term < betti::kTerms; ++term) {
    if (counts[term] > w.items * w.dims * w.n) throw std::invalid_argument("counts: too many");
    launch_over(w, counts[term], stream, betti_rows_kernel, w, term, counts[term], last_dim,
                rows[term]);
  }
}

}  // namespace pyloss::cuda
