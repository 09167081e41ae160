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

// Cells of images of 1 to 3 dimensions: those of common/betti_matching.h for 1D and 2D, where edge
// 2 p + type joins along axis 1 + type of (planes, rows, cols). In 3D edge 3 p + axis, square 3 p +
// its normal axis; p is the lowest corner. A joint is what joins the vertices of a run: an edge, or
// in 3D a square between two cubes.
struct Space {
  u32 planes, rows, cols;
  u32 axes;  // 2, also of 1D images, or 3: types of edges at a voxel

  __device__ u32 first_axis() const { return 3 - axes; }
  __device__ u32 extent(u32 axis) const { return axis == 0 ? planes : axis == 1 ? rows : cols; }
  __device__ u32 stride(u32 axis) const { return axis == 0 ? rows * cols : axis == 1 ? cols : 1; }
  __device__ u32 coordinate(u32 p, u32 axis) const {
    return axis == 2 ? p % cols : axis == 1 ? p / cols % rows : p / cols / rows;
  }
  __device__ bool has_next(u32 p, u32 axis) const { return coordinate(p, axis) + 1 < extent(axis); }
  __device__ u32 corner(u32 joint) const { return axes == 2 ? joint >> 1 : joint / 3; }
  __device__ u32 type(u32 joint) const { return axes == 2 ? joint & 1 : joint % 3; }
  // The joint at p along an axis (an edge), or across one (a dual run's).
  __device__ u32 joint(u32 dim, u32 p, u32 axis) const {
    return axes == 3 ? 3 * p + axis : 2 * p + (dim == 0 ? axis - 1 : 2 - axis);
  }
  __device__ u32 axis(u32 dim, u32 joint) const {
    const u32 t = type(joint);
    return axes == 3 ? t : dim == 0 ? t + 1 : 2 - t;
  }
  // Whether the unit cube of the last dimension lies in the image.
  __device__ bool is_top(u32 p) const {
    return (axes == 2 || has_next(p, 0)) && has_next(p, 1) && has_next(p, 2);
  }
  __device__ bool is_joint(u32 dim, u32 j) const {
    const u32 p = corner(j), own = axis(dim, j);
    if (dim == 0) return has_next(p, own);
    bool inside = true;
    for (u32 a = first_axis(); a < 3; ++a) inside = inside && (a == own || has_next(p, a));
    return inside;
  }
};

// One group of items. A run is a graph per item: vertices and edges of an image (dim 0), or its
// cubes (2D: squares), plus one outside, and the joints between them in reverse order (dim 1, which
// stands for the last homology dimension here). Vertex g = (run * items + item) * n + slot. Slots
// of a dual run are the cubes' lowest corners; the outside has the last slot, which is no cube's.
// Node G + m is a tree of vertices or nodes contracted by one round; nodes and vertices together
// are called elements.
struct BettiWork {
  Space space;
  u32 n;                // voxels of an item
  u32 items;            // of the group
  u32 images;           // runs per dimension: input, target, both; or 1
  u32 dims, first_dim;  // first_dim ..< first_dim + dims of the two
  u32 runs;             // images * dims
  u32 total;            // G: runs * items * n
  u32 merges;           // joints in all minimum spanning trees
  int rounds, threads;  // threads of an ordinary block
  int most_blocks;      // that an ordinary launch has
  u32* rank;            // (images, items, n): keys of the voxels' values
  uint8_t* tree;        // (runs, items, 3 n) 3D: whether a joint is in a spanning tree
  u64* lowest;          // (2 G) key of the lowest joint that leaves an element
  u32* link;            // (2 G) the element at its other end; of a root, itself
  u32* parent;          // (2 G) the node that contains an element
  u32* base;            // (G) the root that a node was made of
  u32* seed;            // (G) some vertex in a node
  u32* bar;             // (2, items, dims, n) joint of the bar in a slot
  u32* mate;            // (2, items, dims, n) slot in the other image
  u32* via;             // (2, items, dims, n) slot of the bar that a slot of `both` leads to
  u32* both;            // (items, dims, n) joint of the bar of `both`; in the end of matched bars
  u32* essential;       // (2, items)
  u32* nan;             // (2, items)
  struct Counters* counters;
  u32* digits;            // of the radix sort
  char *room_a, *room_b;  // room_bytes() each, for one purpose after the other
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
// A table of (2, items, dims, n); image 0 also of (items, dims, n).
__device__ inline u64 table_row(const BettiWork& w, u32 image, u32 item, u32 dim) {
  return ((u64(image) * w.items + item) * w.dims + dim - w.first_dim) * w.n;
}

// The two slots that a joint joins.
__device__ inline void ends_of(const BettiWork& w, u32 dim, u32 e, u32* a, u32* b) {
  const Space& s = w.space;
  const u32 p = s.corner(e), axis = s.axis(dim, e), outside = w.n - 1;
  *a = p;
  if (dim == 0) {
    *b = p + s.stride(axis);
  } else {
    const u32 at = s.coordinate(p, axis);
    *a = at > 0 ? p - s.stride(axis) : outside;
    *b = at + 1 < s.extent(axis) ? p : outside;
  }
}

// The voxel that carries the value of an edge, or of a square of a 3D image that is normal to an
// axis: of equals the last.
__device__ inline u32 edge_voxel(const Space& s, const u32* rank, u32 p, u32 axis) {
  const u32 q = p + s.stride(axis);
  return rank[p] > rank[q] ? p : q;
}
__device__ inline u32 square_voxel(const u32* rank, u32 p, u32 stride, u32 other) {
  u32 best = p;
  if (rank[p + other] >= rank[best]) best = p + other;
  if (rank[p + stride] >= rank[best]) best = p + stride;
  if (rank[p + stride + other] >= rank[best]) best = p + stride + other;
  return best;
}
__device__ inline u32 normal_square_voxel(const Space& s, const u32* rank, u32 p, u32 normal) {
  return square_voxel(rank, p, s.stride(normal == 0 ? 1 : 0), s.stride(normal == 2 ? 1 : 2));
}
__device__ inline u32 joint_voxel(const Space& s, const u32* rank, u32 dim, u32 e) {
  const u32 p = s.corner(e), type = s.type(e);
  if (s.axes == 3 && dim == 1) return normal_square_voxel(s, rank, p, type);
  return edge_voxel(s, rank, p, type + s.first_axis());
}
__device__ inline u32 top_rank(const Space& s, const u32* rank, u32 p) {
  const u32 low = rank[square_voxel(rank, p, s.cols, 1)];
  if (s.axes == 2) return low;
  const u32 high = rank[square_voxel(rank, p + s.stride(0), s.cols, 1)];
  return low > high ? low : high;
}
// Of a cube the first of equals, of a square of a 2D image the last.
__device__ inline u32 top_voxel(const Space& s, const u32* rank, u32 p) {
  if (s.axes == 2) return square_voxel(rank, p, s.cols, 1);
  const u32 top = top_rank(s, rank, p);
  u32 best = p + s.stride(0) + s.cols + 1;
  for (u32 i = 7; i-- > 0;) {
    const u32 q = p + (i & 4 ? s.stride(0) : 0) + (i & 2 ? s.cols : 0) + (i & 1);
    if (rank[q] == top) best = q;
  }
  return best;
}

struct Bar {
  u32 birth, death;  // voxels
};

__device__ inline Bar bar_voxels(const BettiWork& w, const u32* rank, u32 dim, u32 slot, u32 edge) {
  const u32 at_edge = joint_voxel(w.space, rank, dim, edge);
  if (dim == 0) return {slot, at_edge};
  return {at_edge, top_voxel(w.space, rank, slot)};
}

// Joints in their order, reversed for dual runs: the rank of the value above, the id below.
__device__ inline u64 edge_key(const BettiWork& w, const u32* rank, u32 dim, u32 e) {
  const u64 key = u64(rank[joint_voxel(w.space, rank, dim, e)]) << 32 | e;
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
  return ~(u64(top_rank(w.space, rank, slot)) << 32 | slot);
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

// Where a NaN is, for the host: 0 for none, 2 items - (2 item + image) of the first.
__device__ inline void find_nan(const BettiWork& w, u32* found) {
  for_each(0, 2 * w.items, [&](u32 i) {
    if (w.nan[i % 2 * w.items + i / 2]) atomicMax(found, 2 * w.items - i);
  });
}

// ---- betti_matching_rows.cu
// counts and rows as of betti_pairs and betti_rows; the lists lie in room_a.
void betti_list(const BettiWork& w, bool essential, u32* counts, void* stream);
void betti_write_rows(const BettiWork& w, const u32* counts, u32 last_dim, int64_t* const* rows,
                      void* stream);

// ---- betti_matching_residue.cu
// As betti_columns and betti_column_keys; the list lies in room_b.
void betti_list_columns(const BettiWork& w, u32* counts, void* stream);
void betti_write_columns(const BettiWork& w, u32 count, int64_t* names, int64_t* keys,
                         void* stream);

}  // namespace pyloss::cuda
