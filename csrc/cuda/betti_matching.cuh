// What the files of the CUDA betti_matching share: the layout of the scratch memory, names of runs,
// vertices and cells, and loops. The algorithm: betti_matching.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/betti_matching.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace pyloss::cuda {

using u32 = uint32_t;
using u64 = unsigned long long;  // the type that atomics know
using betti::kNone;

inline constexpr u64 kNoKey = ~u64{0};
inline constexpr int kMaxLevels = 33;
enum Image { kInput = 0, kTarget = 1, kBoth = 2 };  // kBoth: the smaller of the two, "M"

// One group of items. A run is a graph per item: vertices and edges of an image (dimension 0), or
// its squares, plus one outside, and the edges between them in reverse order (dimension 1).
// Vertex g = (run * items + item) * n + slot. Slots of a dual run are the squares' lowest corners;
// the outside has the last slot, which is no square's. Node G + m is a tree of vertices or nodes
// contracted by one round; nodes and vertices together are called elements.
struct BettiWork {
  betti::Grid grid;
  u32 n;                // voxels of an item
  u32 items;            // of the group
  u32 images;           // runs per dimension: input, target, both; or 1
  u32 dims, first_dim;  // homology dimensions first_dim ..< first_dim + dims
  u32 runs;             // images * dims
  u32 total;            // G: runs * items * n
  u32 merges;           // edges in all minimum spanning trees
  int rounds, threads;  // threads of an ordinary block
  int most_blocks;      // that an ordinary launch has
  u32* rank;            // (images, items, n): keys of the voxels' values
  u64* lowest;          // (2 G) key of the lowest edge that leaves an element
  u32* link;            // (2 G) the element at its other end; of a root, itself
  u32* parent;          // (2 G) the node that contains an element
  u32* base;            // (G) the root that a node was made of
  u32* seed;            // (G) some vertex in a node
  u32* bar;             // (2, items, dims, n) edge of the bar in a slot
  u32* mate;            // (2, items, dims, n) slot in the other image
  u32* via;             // (2, items, n) slot of the bar whose death, seen in `both`, is the slot
  u32* both;            // (items, n) dimension 1: not kNone where `both` has a bar
  u32* essential;       // (2, items)
  u32* nan;             // (items)
  struct Counters* counters;
  u32* digits;            // of the radix sort
  char *room_a, *room_b;  // 24 G bytes each, for one purpose after the other
};

struct Counters {
  u32 nodes;                   // made so far
  u32 begin[kMaxLevels + 2];   // nodes of level l >= 1: begin[l] ..< begin[l + 1]
  u32 edges[kMaxLevels + 1];   // between different elements after a round
  u32 chains[kMaxLevels + 1];  // long ones of a level
};

struct Run {
  u32 item, image, dim;
};

__device__ inline Run run_of(const BettiWork& w, u32 g) {
  const u32 graph = g / w.n, run = graph / w.items;
  return {graph % w.items, run % w.images, w.first_dim + run / w.images};
}
__device__ inline const u32* ranks_of(const BettiWork& w, u32 image, u32 item) {
  return w.rank + (u64(image) * w.items + item) * w.n;
}
// A table of (2, items, dims, n).
__device__ inline u64 table_row(const BettiWork& w, u32 image, u32 item, u32 dim) {
  return ((u64(image) * w.items + item) * w.dims + dim - w.first_dim) * w.n;
}

// The two slots that an edge joins.
__device__ inline void ends_of(const BettiWork& w, u32 dim, u32 e, u32* a, u32* b) {
  if (dim == 0) {
    *a = e >> 1;
    *b = w.grid.second_end(e);
  } else {
    w.grid.sides(e, *a, *b);
    *a = *a < w.n - 1 ? *a : w.n - 1;  // kNone: outside
    *b = *b < w.n - 1 ? *b : w.n - 1;
  }
}

// Edges in their order, reversed for dual runs: the rank of the value above, the id below.
__device__ inline u64 edge_key(const BettiWork& w, const u32* rank, u32 dim, u32 e) {
  const u32 p = rank[e >> 1], q = rank[w.grid.second_end(e)];
  const u64 key = u64(p > q ? p : q) << 32 | e;
  return dim == 0 ? key : ~key;
}
__device__ inline u32 edge_of(u32 dim, u64 key) {
  return dim == 0 ? u32(key) : ~u32(key);
}

// Age of a vertex of a run: the smallest is the oldest, which wins. Rank above, slot below, both
// reversed for dual runs.
__device__ inline u64 age_of(const BettiWork& w, const u32* rank, u32 dim, u32 slot) {
  if (dim == 0) return u64(rank[slot]) << 32 | slot;
  if (slot == w.n - 1) return 0;
  return ~(u64(rank[betti::square_voxel(w.grid, rank, slot)]) << 32 | slot);
}
__device__ inline u32 slot_of(u32 dim, u64 age) {
  return dim == 0 ? u32(age) : ~u32(age);
}

// Calls fn(i, active) for i = 0 ... count - 1, by whole blocks: fn may use barriers.
template <class Fn>
__device__ inline void for_blocks(u32 begin, u32 end, Fn&& fn) {
  const u64 step = u64(gridDim.x) * blockDim.x;
  for (u64 first = begin + u64(blockIdx.x) * blockDim.x; first < end; first += step) {
    const u64 i = first + threadIdx.x;
    fn(u32(i), i < end);
  }
}
template <class Fn>
__device__ inline void for_each(u32 begin, u32 end, Fn&& fn) {
  for_blocks(begin, end, [&](u32 i, bool active) {
    if (active) fn(i);
  });
}

// Sum over the lanes before; `total` over all 32.
__device__ inline u32 warp_sum_before(u32 v, u32* total) {
  const u32 lane = threadIdx.x % kWarp;
  u32 sum = v;
#pragma unroll
  for (u32 step = 1; step < kWarp; step *= 2) {
    const u32 other = __shfl_up_sync(kFullMask, sum, step);
    if (lane >= step) sum += other;
  }
  *total = __shfl_sync(kFullMask, sum, kWarp - 1);
  return sum - v;
}

// A place in a growing list for every thread with `wanted`; called by all threads of a block. The
// order of a list depends on timing: nothing that is computed from a list may depend on it.
__device__ inline u32 block_append(bool wanted, u32* size) {
  __shared__ u32 places[kMaxWarps];
  const u32 votes = __ballot_sync(kFullMask, wanted);
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) places[warp] = u32(__popc(votes));
  __syncthreads();
  if (warp == 0) {
    u32 total, first = 0;
    const u32 before = warp_sum_before(lane < blockDim.x / kWarp ? places[lane] : 0, &total);
    if (lane == 0 && total > 0) first = atomicAdd(size, total);
    first = __shfl_sync(kFullMask, first, 0);
    places[lane] = first + before;
  }
  __syncthreads();
  const u32 place = places[warp] + u32(__popc(votes & ((1u << lane) - 1)));
  __syncthreads();
  return place;
}

// Launches over up to `count` indices, some of which may turn out not to exist.
template <class... Params, class... Args>
void launch_over(const BettiWork& w, u64 count, void* stream, void (*kernel)(Params...),
                 const Args&... args) {
  const int64_t blocks = ceil_div(int64_t(count), w.threads);
  if (blocks == 0) return;
  launch(kernel, dim3(unsigned(blocks < w.most_blocks ? blocks : w.most_blocks)),
         dim3(unsigned(w.threads)), 0, stream, args...);
}

// ---- betti_matching_sort.cu
// Sorts (key, value) by the 8 bits digits of `key` from bit `low_bit` up to `high_bit`; stable.
// Entries with kNoKey are dropped on the way; `count` is their number before, `kept` after it. The
// result is in `a` or `b`; both are overwritten.
struct SortBuffers {
  u64* keys;
  u32* values;
};
bool betti_sort(const BettiWork& w, SortBuffers a, SortBuffers b, u32 count, u32 kept, int high_bit,
                void* stream);    // true: the result is in b
u64 betti_sort_words(u64 count);  // of BettiWork::digits

// ---- betti_matching_tree.cu
// Fills bar, mate, via, both and essential from rank.
void betti_trees(const BettiWork& w, void* stream);

}  // namespace pyloss::cuda
