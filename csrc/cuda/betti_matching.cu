// Betti matching of 1D and 2D images, and of volumes in their first and last homology dimension:
// barcodes, matching, loss and gradient, without one read by the host. Cells, order and loss:
// common/betti_matching.h. Dimension 1 of volumes: betti_matching_residue.cu.
//
// Order. Every voxel gets a rank, 32 bits in the order of the values: the key of a float itself;
// doubles are sorted once per group of items and numbered. The key of an edge is (larger rank, edge
// id), 64 bits that no other edge of the graph has, so minimum spanning trees, and all that follows
// from them, are unique: the same on every machine and in every order of the threads.
//
// Runs. Six graphs per item: the vertices and edges of the input I, the target T and M = min(I, T)
// for dimension 0; for dimension 1 their squares plus one outside, joined by the same edges, all in
// reverse order (3D: for dimension 2 their cubes plus one outside, joined by the squares).
// Everything below happens for all runs of all items in the same launches.
//
// 1. Boruvka rounds (betti_matching_tree.cu). Every element, a vertex at first, takes the lowest
//    edge that leaves it (atomicMin); elements joined by such edges become one node. A round at
//    least halves the elements, so ceil(log2 n) rounds are launched, and late ones find empty
//    lists. Edges inside a node are dropped: the lists shrink by about 3 a round.
// 2. Merge trees, also where a component grows one voxel at a time and the tree is as deep as the
//    image has voxels. In Kruskal's order an edge e of the spanning tree joins two components. It
//    belongs to the smallest node V (of any round) that contains e and is left by higher edges
//    only; all such e, sorted, are the chain of V: on it a component grows from the bottom, a root
//    element, by taking at each edge e the component at the top of the chain of the element that
//    had chosen e. This is the dendrogram by tree contraction of Sao, Prokopenko, Lebrun-Grandie
//    (arXiv 2401.06089), with all nodes of Boruvka's rounds as contracted vertices.
//    One stable radix sort by (chain, rank) makes all chains (betti_matching_sort.cu).
// 3. Elder rule: along a chain a running minimum of ages; at each edge the younger side dies.
// Chains
//    hang below chains of later rounds only, hence one launch per round: a chain is read by one
//    thread, one warp or one block, by its length. The trees of M are read in three orders of age
//    at once (I, T, M), those of squares in two: these are the image pairs of the matching.
// 4. Matching by look-up, loss by a sum in fixed order, gradient: a voxel gathers from the at most
//    9 cells (3D: 27) that can lie at it. No atomics add floats, so there is one path,
//    deterministic always.
//
// Memory traffic, G = 6 n vertices of an item: 1. about 150 bytes a vertex (first edges 24, roots
// and jumps 40, list of edges 80 over all rounds), 2. 20 + 32 bytes for each of 7 sort passes, 3.
// about 60: 450 bytes, much of it scattered. Batch 8 of 512^2, G = 12.6 million: 5.7 GB. Expected
// on an H200 (4.8 TB/s peak; 2 TB/s assumed for this mix): 2.8 ms, plus 110 launches of which most
// late ones are empty, 0.3 ms. Longest chain of dependent work: a smooth image may be one chain,
// 512 edges a step by one block, 512 steps of about 1 us: 0.5 ms, for all images side by side. In
// all 3 to 4 ms. Not measured: written without a GPU.
//
// Numerics: values and slopes in float (double next to double), sums of terms in double.
#include "cuda/betti_matching.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/atomic.cuh"
#include "cuda/betti_matching.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kLossThreads = 256;
constexpr int kThreads = 512;
// Of a group of items: bytes of scratch memory, if one item needs no more; vertices of all runs, so
// that names and places fit 32 bits; (item, dimension) rows, a second grid dimension.
constexpr int64_t kScratchLimit = int64_t{3} << 29;
constexpr int64_t kMaxVertices = int64_t{1} << 30;
constexpr int64_t kMaxRows = 65535;

// ---- Ranks -------------------------------------------------------------------------------------

template <class R>
__device__ R load_value(const void* p, DType t, u64 i) {
  switch (t) {
    case DType::kF64:
      return R(static_cast<const double*>(p)[i]);
    case DType::kF32:
      return R(static_cast<const float*>(p)[i]);
    case DType::kBF16:
      return R(to_float(static_cast<const BF16*>(p)[i]));
    case DType::kF16:
      return R(to_float(static_cast<const F16*>(p)[i]));
    default:
      return R(load_index(p, t, int64_t(i)));
  }
}
template <class R>
__device__ void store_value(void* p, DType t, u64 i, R v) {
  switch (t) {
    case DType::kF64:
      static_cast<double*>(p)[i] = double(v);
      break;
    case DType::kF32:
      static_cast<float*>(p)[i] = float(v);
      break;
    case DType::kBF16:
      static_cast<BF16*>(p)[i] = float_to_bf16(float(v));
      break;
    case DType::kF16:
      static_cast<F16*>(p)[i] = float_to_f16(float(v));
      break;
    default:
      break;
  }
}

struct Images {
  const void *input, *target;
  DType input_dtype, target_dtype;
  u32 count;
  u32 first;  // item of the group's first
  bool superlevel;
};

template <class R>
__device__ R image_value(const Images& m, u32 image, u64 i) {
  return image == kInput ? load_value<R>(m.input, m.input_dtype, i)
                         : load_value<R>(m.target, m.target_dtype, i);
}

// NaN above everything, whatever its bits: the algorithm needs an order, not a meaning.
template <class R, class K>
__device__ K checked_key(const BettiWork& w, const Images& m, u32 image, u32 i) {
  const R x = image_value<R>(m, image, u64(m.first) * w.n + i);
  if (x == x) return K(betti::filtration_key(x, m.superlevel));
  store_relaxed(w.nan + image * w.items + i / w.n, 1u);
  return K(~K{0} - 1);
}

__global__ void __launch_bounds__(kThreads) betti_rank_kernel(BettiWork w, Images m) {
  const u32 size = w.items * w.n;
  for_each(0, size, [&](u32 i) {
    const u32 a = checked_key<float, u32>(w, m, kInput, i);
    w.rank[i] = a;
    if (m.count == 1) return;
    const u32 b = checked_key<float, u32>(w, m, kTarget, i);
    w.rank[u64(size) + i] = b;
    w.rank[2 * u64(size) + i] = a < b ? a : b;
  });
}

__global__ void __launch_bounds__(kThreads)
    betti_key_kernel(BettiWork w, Images m, u64* keys, u32* values) {
  const u32 size = w.items * w.n;
  for_each(0, m.count * size, [&](u32 i) {
    keys[i] = checked_key<double, u64>(w, m, i / size, i % size);
    values[i] = i;
  });
}

// Equal doubles get the place of their first as rank.
__global__ void __launch_bounds__(kThreads)
    betti_number_kernel(BettiWork w, const u64* keys, const u32* values, u32 count) {
  for_each(0, count, [&](u32 i) {
    const u64 key = keys[i];
    u32 low = 0, high = i;
    if (i > 0 && keys[i - 1] != key) low = i;
    while (low < high) {
      const u32 middle = (low + high) / 2;
      if (keys[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    w.rank[values[i]] = low + 1;
  });
}

__global__ void __launch_bounds__(kThreads) betti_min_rank_kernel(BettiWork w) {
  const u32 size = w.items * w.n;
  for_each(0, size, [&](u32 i) {
    const u32 a = w.rank[i], b = w.rank[u64(size) + i];
    w.rank[2 * u64(size) + i] = a < b ? a : b;
  });
}

__global__ void __launch_bounds__(kThreads) betti_clear_kernel(u32* data, u64 words) {
  const u64 step = u64(gridDim.x) * blockDim.x;
  for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) data[i] = 0;
}

// ---- Loss --------------------------------------------------------------------------------------

// Slopes by cell, (2, items, cells): vertices; edges (twice n) and squares in 2D, where an edge
// ends a bar of dimension 0 or begins one of dimension 1, never both; edges, squares (three times n
// each) and cubes in 3D.
struct SlopesAt {
  u32 vertices, edges, joints, tops, cells;  // joints: of a dual run
};
PYLOSS_HD SlopesAt slopes_at(u32 n, u32 axes) {
  return axes == 2 ? SlopesAt{0, n, n, 3 * n, 4 * n} : SlopesAt{0, n, 4 * n, 7 * n, 8 * n};
}
template <class R>
__device__ R* slopes_of(const BettiWork& w, u32 image, u32 item) {
  const u32 cells = slopes_at(w.n, w.space.axes).cells;
  return reinterpret_cast<R*>(w.room_a) + (u64(image) * w.items + item) * cells;
}
template <class R>
__device__ void set_slopes(const BettiWork& w, R* slopes, u32 dim, u32 slot, u32 edge, R birth,
                           R death) {
  const SlopesAt at = slopes_at(w.n, w.space.axes);
  slopes[(dim == 0 ? at.vertices : at.tops) + slot] = dim == 0 ? birth : death;
  slopes[(dim == 0 ? at.edges : at.joints) + edge] = dim == 0 ? death : birth;
}

// An item with NaN in one of its images.
__device__ bool spoiled(const BettiWork& w, u32 item) {
  return (w.nan[item] | w.nan[w.items + item]) != 0;
}

template <class R>
struct Loss {
  R dim_weight[2], matched_weight, unmatched_weight[2];  // by dimension; by image
  double min_persistence;
  bool superlevel, extreme, essential;
};

// Block (b, item * dims + d): part of the slots of a row. Both halves of a matched bar are found
// twice, once from either side; its term is counted from the input's.
template <class R>
__global__ void __launch_bounds__(kLossThreads, 4)
    betti_loss_kernel(BettiWork w, Images m, Loss<R> l, double* partial) {
  __shared__ double shared[betti::kTerms][kMaxWarps];
  const u32 item = blockIdx.y / w.dims, dim = w.first_dim + blockIdx.y % w.dims;
  const u64 image_at = u64(m.first + item) * w.n;
  const R weight = dim == 0 ? l.dim_weight[0] : l.dim_weight[1];
  double matched = 0, unmatched_input = 0, unmatched_target = 0;
  const auto value = [&](u32 image, u32 voxel) {
    return image_value<R>(m, image, image_at + voxel);
  };
  for (u32 slot = blockIdx.x * blockDim.x + threadIdx.x; slot < w.n;
       slot += gridDim.x * blockDim.x) {
#pragma unroll
    for (u32 image = 0; image < 2; ++image) {
      const u64 own = table_row(w, image, item, dim), other = table_row(w, 1 - image, item, dim);
      const u32 edge = w.bar[own + slot], mate = w.mate[own + slot];
      if (edge == kNone) continue;
      const Bar bar = bar_voxels(w, ranks_of(w, image, item), dim, slot, edge);
      const R b = value(image, bar.birth), d = value(image, bar.death);
      R* slopes = slopes_of<R>(w, image, item);
      if (mate != kNone) {
        const Bar to = bar_voxels(w, ranks_of(w, 1 - image, item), dim, mate, w.bar[other + mate]);
        const R to_b = value(1 - image, to.birth), to_d = value(1 - image, to.death);
        if (image == kInput) matched += betti::matched_term(b, d, to_b, to_d);
        const R scale = weight * l.matched_weight;
        set_slopes(w, slopes, dim, slot, edge,
                   betti::weighted(scale, betti::matched_slope(b, to_b)),
                   betti::weighted(scale, betti::matched_slope(d, to_d)));
      } else if (image == kTarget || betti::counts(b, d, l.min_persistence)) {
        const R term = betti::unmatched_term(b, d, l.extreme, l.superlevel);
        (image == kInput ? unmatched_input : unmatched_target) += term;
        R slope_b, slope_d;
        betti::unmatched_slopes(b, d, l.extreme, l.superlevel, slope_b, slope_d);
        const R scale = weight * (image == kInput ? l.unmatched_weight[0] : l.unmatched_weight[1]);
        set_slopes(w, slopes, dim, slot, edge, betti::weighted(scale, slope_b),
                   betti::weighted(scale, slope_d));
      }
    }
  }
  if (l.essential && dim == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
    const u32 a = w.essential[item], b = w.essential[w.items + item];
    const R x = value(kInput, a), y = value(kTarget, b);
    matched += betti::matched_term(x, R(0), y, R(0));
    const R scale = weight * l.matched_weight;
    slopes_of<R>(w, kInput, item)[a] = betti::weighted(scale, betti::matched_slope(x, y));
    slopes_of<R>(w, kTarget, item)[b] = betti::weighted(scale, betti::matched_slope(y, x));
  }
  const auto finish = [&](betti::Term term, double sum) {
    sum = team_reduce(sum, AddOp{}, 0.0, shared[term]);
    if (threadIdx.x == 0) {
      partial[(u64(blockIdx.y) * betti::kTerms + term) * gridDim.x + blockIdx.x] = sum;
    }
  };
  finish(betti::kMatched, matched);
  finish(betti::kUnmatchedInput, unmatched_input);
  finish(betti::kUnmatchedTarget, unmatched_target);
}

// One thread per term of (items, dims of the images, kTerms).
template <class R>
__global__ void __launch_bounds__(kThreads)
    betti_loss_sum_kernel(BettiWork w, u32 first_item, u32 dims, const double* partial, u32 blocks,
                          R* loss) {
  for_each(0, w.items * dims * betti::kTerms, [&](u32 i) {
    const u32 term = i % betti::kTerms, dim = i / betti::kTerms % dims;
    const u32 item = i / betti::kTerms / dims;
    double sum = 0;
    const u32 kind = dim == 0 ? 0 : 1;  // a middle dimension is not of these kernels
    if ((dim == 0 || dim == dims - 1) && kind >= w.first_dim && kind < w.first_dim + w.dims) {
      const u64 row = u64(item) * w.dims + kind - w.first_dim;
      for (u32 b = 0; b < blocks; ++b) sum += partial[(row * betti::kTerms + term) * blocks + b];
    }
    loss[u64(first_item) * dims * betti::kTerms + i] = spoiled(w, item) ? nan_<R>() : R(sum);
  });
}

template <class R>
__global__ void __launch_bounds__(kThreads, 2)
    betti_gradient_kernel(BettiWork w, u32 image, u32 first_item, void* grad, DType dtype) {
  for_each(0, w.items * w.n, [&](u32 i) {
    const u32 item = i / w.n, v = i % w.n;
    const Space& space = w.space;
    const SlopesAt at = slopes_at(w.n, space.axes);
    const u32* rank = ranks_of(w, image, item);
    const R* slopes = slopes_of<R>(w, image, item);
    R sum = slopes[at.vertices + v];
    // Slopes of what is no cell are 0.
    const auto add = [&](bool there, u32 cell, const auto& voxel) {
      const R slope = there ? slopes[cell] : R(0);
      if (slope != 0 && voxel() == v) sum += slope;
    };
    const u32 first = space.first_axis();
    bool low[3];  // whether there is a voxel before, along each axis
#pragma unroll
    for (u32 a = 0; a < 3; ++a) low[a] = a >= first && space.coordinate(v, a) > 0;
    // Edges, and in 3D squares by the two axes that they span.
#pragma unroll
    for (u32 a = 0; a < 3; ++a) {
      if (a < first) continue;
      for (u32 back = 0; back < 2; ++back) {
        const u32 p = v - back * space.stride(a);
        add(back == 0 || low[a], at.edges + space.axes * p + a - first,
            [&] { return edge_voxel(space, rank, p, a); });
      }
      if (space.axes == 2) continue;
      const u32 b = a == 0 ? 1 : 0, c = a == 2 ? 1 : 2;
      for (u32 back = 0; back < 4; ++back) {
        const u32 p = v - (back & 2 ? space.stride(b) : 0) - (back & 1 ? space.stride(c) : 0);
        add((!(back & 2) || low[b]) && (!(back & 1) || low[c]), at.joints + 3 * p + a,
            [&] { return normal_square_voxel(space, rank, p, a); });
      }
    }
    for (u32 back = 0; back < (1u << space.axes); ++back) {
      const u32 p = v - (back & 4 ? space.stride(0) : 0) - (back & 2 ? space.cols : 0) - (back & 1);
      add((!(back & 4) || low[0]) && (!(back & 2) || low[1]) && (!(back & 1) || low[2]),
          at.tops + p, [&] { return top_voxel(space, rank, p); });
    }
    if (spoiled(w, item)) sum = nan_<R>();
    store_value<R>(grad, dtype, u64(first_item) * w.n + i, sum);
  });
}

// ---- Host --------------------------------------------------------------------------------------

bool wide(DType t) {
  return t == DType::kF64 || t == DType::kI64 || t == DType::kI32;
}

// With the first or the last homology dimension, of one image or of input, target and both.
bool has_dual(const betti::Problem& p) {
  return p.dims > 1 && p.wanted(p.dims - 1);
}
int64_t runs_of(const betti::Problem& p) {
  return (p.target ? 3 : 1) * (int(p.wanted(0)) + int(has_dual(p)));
}

void check_problem(const betti::Problem& p) {
  if (p.items < 0 || p.depth < 1 || p.rows < 1 || p.cols < 1) {
    throw std::invalid_argument("input: empty images");
  }
  const int64_t sizes[] = {p.depth, p.rows, p.cols};
  bool right = p.dims >= 1 && p.dims <= 3;
  for (int axis = 0; right && axis < 3; ++axis) {  // 1D: along the rows
    right = sizes[axis] == 1 || axis == (p.dims == 1 ? 1 : axis >= 3 - p.dims ? axis : -1);
  }
  if (!right || p.want == 0 || p.want >> p.dims != 0) {
    throw std::invalid_argument("dims: not those of images of 1 to 3 dimensions");
  }
  if (p.dims == 3 && p.wanted(1)) throw std::invalid_argument("dims: 1 of volumes is the host's");
  const int64_t runs = runs_of(p);
  if (p.rows > kMaxVertices / runs / p.cols || p.depth > kMaxVertices / runs / (p.rows * p.cols)) {
    throw std::invalid_argument("input: images of more than 2^30 / " + std::to_string(runs) +
                                " voxels");
  }
}

// Everything but `items`.
BettiWork plan_item(const betti::Problem& p) {
  check_problem(p);
  BettiWork w{};
  w.space = {u32(p.depth), u32(p.rows), u32(p.cols), p.dims == 3 ? 3u : 2u};
  w.n = u32(p.depth * p.rows * p.cols);
  w.images = p.target ? 3 : 1;
  w.first_dim = p.wanted(0) ? 0 : 1;
  w.runs = u32(runs_of(p));
  w.dims = w.runs / w.images;
  while ((u64{1} << w.rounds) < w.n) ++w.rounds;
  return w;
}

// Lays out the scratch memory for `items` images; returns its size.
int64_t plan(const betti::Problem& p, u32 items, char* scratch, BettiWork* w) {
  *w = plan_item(p);
  const u64 n = w->n, size = u64(items) * n, total = w->runs * size;
  w->items = items;
  w->total = u32(total);
  w->threads = total < 65536 ? 64 : kThreads;
  const u64 tops = u64(p.rows - 1) * u64(p.cols - 1) * u64(p.dims == 3 ? p.depth - 1 : 1);
  const u64 merges = (p.wanted(0) ? n - 1 : 0) + (has_dual(p) ? tops : 0);
  w->merges = u32(merges * w->images * items);
  u64 used = 0;
  const auto take = [&](auto** pointer, u64 count) {
    *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(scratch + used);
    used += (count * sizeof(**pointer) + 255) / 256 * 256;
  };
  take(&w->rank, w->images * size);
  if (w->space.axes == 3) take(&w->tree, 3 * total + 3);
  take(&w->lowest, 2 * total);
  take(&w->link, 2 * total);
  take(&w->parent, 2 * total);
  take(&w->base, total);
  take(&w->seed, total);
  take(&w->bar, 2 * size * w->dims);
  take(&w->mate, 2 * size * w->dims);
  const bool pair = w->images == 3;
  take(&w->via, pair ? 2 * size * w->dims : 0);
  take(&w->both, pair ? size * w->dims : 0);
  take(&w->essential, 2 * items);
  take(&w->nan, 2 * items);
  take(&w->counters, 1);
  take(&w->digits, betti_sort_words(w->space.axes * total));
  // After a first round at most axes - 1/2 edges a vertex are left, as records of 16 bytes.
  const u64 room = (w->space.axes == 2 ? 24 : 40) * total;
  const u64 slopes = 2 * 8 * u64(items) * slopes_at(w->n, w->space.axes).cells;
  take(&w->room_a, pair && slopes > room ? slopes : room);
  take(&w->room_b, room);
  return int64_t(used);
}

u32 group_size(const betti::Problem& p) {
  BettiWork w;
  // Null pointers are only added to here, never used.
  const int64_t one = plan(p, 1, nullptr, &w);
  const int64_t limit = p.scratch_limit > 0 ? p.scratch_limit : kScratchLimit;
  const int64_t fit =
      std::min({limit / one, kMaxVertices / (int64_t(w.runs) * w.n), kMaxRows / int64_t(w.dims)});
  return u32(std::clamp<int64_t>(fit, 1, std::max<int64_t>(p.items, 1)));
}

void compute_ranks(const BettiWork& w, const Images& m, bool in_double, void* stream) {
  launch_over(w, 2 * w.items, stream, betti_clear_kernel, w.nan, 2 * u64(w.items));
  const u32 size = w.items * w.n, count = m.count * size;
  if (!in_double) {
    launch_over(w, size, stream, betti_rank_kernel, w, m);
    return;
  }
  u64* keys = reinterpret_cast<u64*>(w.room_a);
  const SortBuffers a{keys, reinterpret_cast<u32*>(keys + count)};
  keys = reinterpret_cast<u64*>(w.room_b);
  const SortBuffers b{keys, reinterpret_cast<u32*>(keys + count)};
  launch_over(w, count, stream, betti_key_kernel, w, m, a.keys, a.values);
  const SortBuffers& sorted = betti_sort(w, a, b, count, count, 64, stream) ? b : a;
  launch_over(w, count, stream, betti_number_kernel, w, static_cast<const u64*>(sorted.keys),
              static_cast<const u32*>(sorted.values), count);
  if (m.count == 2) launch_over(w, size, stream, betti_min_rank_kernel, w);
}

BettiWork work_of(const betti::Problem& p, int64_t items, void* scratch, int64_t scratch_bytes) {
  if (scratch_bytes < betti_scratch_bytes(p) || !scratch) {
    throw std::invalid_argument("scratch: too small");
  }
  BettiWork w;
  plan(p, u32(items), static_cast<char*>(scratch), &w);
  w.most_blocks = 8 * device_attribute(cudaDevAttrMultiProcessorCount);
  return w;
}

// Calls fn(work, images) for one group of items after the other.
template <class Fn>
void for_groups(const betti::Problem& p, void* scratch, int64_t scratch_bytes, void* stream,
                Fn&& fn) {
  if (p.items == 0) {
    check_problem(p);
    return;
  }
  const u32 group = group_size(p);
  for (int64_t first = 0; first < p.items; first += group) {
    const int64_t items = std::min<int64_t>(group, p.items - first);
    const BettiWork w = work_of(p, items, scratch, scratch_bytes);
    const Images m{p.input,    p.target,    p.input_dtype, p.target_dtype, p.target ? 2u : 1u,
                   u32(first), p.superlevel};
    compute_ranks(w, m, betti_in_double(p), stream);
    betti_trees(w, stream);
    fn(w, m);
  }
}

void check_group(const betti::Problem& p) {
  if (p.items > group_size(p)) throw std::invalid_argument("input: more than a group of items");
}

// Of a group whose trees of dimensions 0 and 2 are made.
BettiWork columns_work(const betti::Problem& p, void* scratch, int64_t scratch_bytes) {
  if (p.dims != 3 || p.want != 5) throw std::invalid_argument("dims: need 0 and 2 of volumes");
  if (p.items < 1) throw std::invalid_argument("input: no items");
  check_group(p);
  return work_of(p, p.items, scratch, scratch_bytes);
}

template <class R>
void loss_of_group(const betti::Problem& p, const BettiLoss& l, const BettiWork& w, const Images& m,
                   void* stream) {
  const u64 cells = slopes_at(w.n, w.space.axes).cells;
  const u64 words = u64(w.items) * 2 * cells * (sizeof(R) / 4);
  launch_over(w, words, stream, betti_clear_kernel, reinterpret_cast<u32*>(w.room_a), words);
  const u32 threads = w.n <= 512 ? 64 : kLossThreads;
  const u32 blocks = u32(std::clamp<int64_t>(ceil_div(w.n, 4 * threads), 1, 256));
  double* partial = reinterpret_cast<double*>(w.room_b);
  const betti::Options& o = l.options;
  const Loss<R> loss{{R(o.dim_weight[0]), R(o.dim_weight[p.dims - 1])},
                     R(o.matched_weight),
                     {R(o.unmatched_weight), R(l.target_weight)},
                     o.min_persistence,
                     p.superlevel,
                     o.extreme,
                     o.essential};
  launch(betti_loss_kernel<R>, dim3(blocks, w.items * w.dims), dim3(threads), 0, stream, w, m, loss,
         partial);
  launch_over(w, u64(w.items) * p.dims * betti::kTerms, stream, betti_loss_sum_kernel<R>, w,
              m.first, u32(p.dims), static_cast<const double*>(partial), blocks,
              static_cast<R*>(l.loss));
  const auto gradient = [&](u32 image, void* grad, DType dtype) {
    if (!grad) return;
    launch_over(w, u64(w.items) * w.n, stream, betti_gradient_kernel<R>, w, image, m.first, grad,
                dtype);
  };
  gradient(kInput, l.grad_input, p.input_dtype);
  gradient(kTarget, l.grad_target, p.target_dtype);
}

}  // namespace

bool betti_in_double(const betti::Problem& p) {
  return wide(p.input_dtype) || (p.target && wide(p.target_dtype));
}

int64_t betti_scratch_bytes(const betti::Problem& p) {
  BettiWork w;
  return plan(p, group_size(p), nullptr, &w);
}

void betti_loss(const betti::Problem& p, const BettiLoss& l, void* scratch, int64_t scratch_bytes,
                void* stream) {
  if (!p.target) throw std::invalid_argument("target: the loss needs one");
  for_groups(p, scratch, scratch_bytes, stream, [&](const BettiWork& w, const Images& m) {
    if (betti_in_double(p)) {
      loss_of_group<double>(p, l, w, m, stream);
    } else {
      loss_of_group<float>(p, l, w, m, stream);
    }
  });
}

int64_t betti_group(const betti::Problem& p) {
  return group_size(p);
}

void betti_pairs(const betti::Problem& p, bool essential, uint32_t* counts, void* scratch,
                 int64_t scratch_bytes, void* stream) {
  check_group(p);
  for_groups(p, scratch, scratch_bytes, stream,
             [&](const BettiWork& w, const Images&) { betti_list(w, essential, counts, stream); });
}

void betti_rows(const betti::Problem& p, const uint32_t* counts, int64_t* const* rows,
                void* scratch, int64_t scratch_bytes, void* stream) {
  check_group(p);
  if (p.items == 0) return;
  const BettiWork w = work_of(p, p.items, scratch, scratch_bytes);
  betti_write_rows(w, counts, u32(p.dims - 1), rows, stream);
}

int64_t betti_prefix_bytes(const betti::Problem& p) {
  check_group(p);
  BettiWork w;
  plan(p, u32(p.items), nullptr, &w);
  return int64_t(reinterpret_cast<uintptr_t>(w.tree)) + int64_t(w.images) * p.items * 3 * w.n;
}

void betti_columns(const betti::Problem& p, uint32_t* counts, void* scratch, int64_t scratch_bytes,
                   void* stream) {
  betti_list_columns(columns_work(p, scratch, scratch_bytes), counts, stream);
}

void betti_column_keys(const betti::Problem& p, int64_t count, int64_t* names, int64_t* keys,
                       void* scratch, int64_t scratch_bytes, void* stream) {
  const BettiWork w = columns_work(p, scratch, scratch_bytes);
  if (count < 0 || count > 15 * int64_t(w.items) * w.n) {
    throw std::invalid_argument("count: of no columns");
  }
  betti_write_columns(w, u32(count), names, keys, stream);
}

}  // namespace pyloss::cuda
