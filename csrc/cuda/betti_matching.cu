// Betti matching of 1D and 2D images: barcodes, matching, loss and gradient, without one read by
// the host. Cells, order and loss: common/betti_matching.h.
//
// Order. Every voxel gets a rank, 32 bits in the order of the values: the key of a float itself;
// doubles are sorted once per group of items and numbered. The key of an edge is (larger rank, edge
// id), 64 bits that no other edge of the graph has, so minimum spanning trees, and all that follows
// from them, are unique: the same on every machine and in every order of the threads.
//
// Runs. Six graphs per item: the vertices and edges of the input I, the target T and M = min(I, T)
// for dimension 0; for dimension 1 their squares plus one outside, joined by the same edges, all in
// reverse order. Everything below happens for all runs of all items in the same launches.
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
//    13 cells that can lie at it. No atomics add floats, so there is one path, deterministic
//    always.
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
  store_relaxed(w.nan + i / w.n, 1u);
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

struct Bar {
  u32 birth, death;  // voxels
};

__device__ Bar bar_voxels(const BettiWork& w, const u32* rank, u32 dim, u32 slot, u32 edge) {
  const u32 at_edge = betti::edge_voxel(w.grid, rank, edge);
  if (dim == 0) return {slot, at_edge};
  return {at_edge, betti::square_voxel(w.grid, rank, slot)};
}

// Slopes by cell, (2, items, 4 n): vertices, edges (twice n), squares. An edge ends a bar of
// dimension 0 or begins one of dimension 1, never both.
template <class R>
__device__ R* slopes_of(const BettiWork& w, u32 image, u32 item) {
  return reinterpret_cast<R*>(w.room_a) + (u64(image) * w.items + item) * 4 * w.n;
}
template <class R>
__device__ void set_slopes(const BettiWork& w, R* slopes, u32 dim, u32 slot, u32 edge, R birth,
                           R death) {
  slopes[dim == 0 ? slot : 3 * w.n + slot] = dim == 0 ? birth : death;
  slopes[w.n + edge] = dim == 0 ? death : birth;
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
__global__ void __launch_bounds__(kLossThreads)
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
    if (dim >= w.first_dim && dim < w.first_dim + w.dims) {
      const u64 row = u64(item) * w.dims + dim - w.first_dim;
      for (u32 b = 0; b < blocks; ++b) sum += partial[(row * betti::kTerms + term) * blocks + b];
    }
    loss[u64(first_item) * dims * betti::kTerms + i] = w.nan[item] ? nan_<R>() : R(sum);
  });
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    betti_gradient_kernel(BettiWork w, u32 image, u32 first_item, void* grad, DType dtype) {
  for_each(0, w.items * w.n, [&](u32 i) {
    const u32 item = i / w.n, v = i % w.n, cols = w.grid.cols;
    const u32 row = v / cols, col = v % cols;
    const bool up = row > 0, left = col > 0;
    const u32* rank = ranks_of(w, image, item);
    const R* vertices = slopes_of<R>(w, image, item);
    const R *edges = vertices + w.n, *squares = edges + 2 * w.n;
    R sum = vertices[v];
    // Slopes of what is no cell are 0.
    const auto add_edge = [&](bool there, u32 e) {
      const R slope = there ? edges[e] : R(0);
      if (slope != 0 && betti::edge_voxel(w.grid, rank, e) == v) sum += slope;
    };
    const auto add_square = [&](bool there, u32 p) {
      const R slope = there ? squares[p] : R(0);
      if (slope != 0 && betti::square_voxel(w.grid, rank, p) == v) sum += slope;
    };
    add_edge(up, 2 * (v - cols));
    add_edge(left, 2 * (v - 1) + 1);
    add_edge(true, 2 * v);
    add_edge(true, 2 * v + 1);
    add_square(up && left, v - cols - 1);
    add_square(up, v - cols);
    add_square(left, v - 1);
    add_square(true, v);
    if (w.nan[item]) sum = nan_<R>();
    store_value<R>(grad, dtype, u64(first_item) * w.n + i, sum);
  });
}

// ---- Tables ------------------------------------------------------------------------------------

// `items` of the whole problem; the group starts at `first`.
__global__ void __launch_bounds__(kThreads)
    betti_table_kernel(BettiWork w, BettiTables t, u32 images, u32 items, u32 first, u32 dims) {
  for_each(0, images * w.items * dims * w.n, [&](u32 i) {
    const u32 slot = i % w.n, dim = i / w.n % dims;
    const u32 item = i / w.n / dims % w.items, image = i / w.n / dims / w.items;
    const u64 at = ((u64(image) * items + first + item) * dims + dim) * w.n + slot;
    const bool wanted = dim >= w.first_dim && dim < w.first_dim + w.dims;
    Bar bar{kNone, kNone};
    u32 mate = kNone;
    if (wanted) {
      const u64 from = table_row(w, image, item, dim) + slot;
      const u32 edge = w.bar[from];
      mate = w.mate[from];
      if (edge != kNone) bar = bar_voxels(w, ranks_of(w, image, item), dim, slot, edge);
    }
    t.birth[at] = int32_t(bar.birth);  // kNone is -1
    t.death[at] = int32_t(bar.death);
    if (t.mate) t.mate[at] = int32_t(mate);
    if (t.essential && dim == 0 && slot == 0) {
      t.essential[u64(image) * items + first + item] =
          w.first_dim == 0 ? int32_t(w.essential[image * w.items + item]) : -1;
    }
  });
}

// ---- Host --------------------------------------------------------------------------------------

bool wide(DType t) {
  return t == DType::kF64 || t == DType::kI64 || t == DType::kI32;
}

void check_problem(const betti::Problem& p) {
  if (p.items < 0 || p.rows < 1 || p.cols < 1) throw std::invalid_argument("input: empty images");
  if (p.dims < 1 || p.dims > 2 || p.depth != 1 || (p.dims == 1 && (p.cols != 1 || p.wanted(1))) ||
      !(p.wanted(0) || p.wanted(1))) {
    throw std::invalid_argument("dims: not those of 1D or 2D images");
  }
  const int64_t runs = (p.target ? 3 : 1) * (int(p.wanted(0)) + int(p.wanted(1)));
  if (p.rows > kMaxVertices / runs / p.cols) {
    throw std::invalid_argument("input: images of more than 2^30 / " + std::to_string(runs) +
                                " voxels");
  }
}

// Everything but `items`.
BettiWork plan_item(const betti::Problem& p) {
  check_problem(p);
  BettiWork w{};
  w.grid = {u32(p.rows), u32(p.cols)};
  w.n = u32(p.rows * p.cols);
  w.images = p.target ? 3 : 1;
  w.first_dim = p.wanted(0) ? 0 : 1;
  w.dims = u32(p.wanted(0)) + u32(p.wanted(1));
  w.runs = w.images * w.dims;
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
  const u64 squares = u64(p.rows - 1) * u64(p.cols - 1);
  const u64 merges = (p.wanted(0) ? n - 1 : 0) + (p.wanted(1) ? squares : 0);
  w->merges = u32(merges * w->images * items);
  u64 used = 0;
  const auto take = [&](auto** pointer, u64 count) {
    *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(scratch + used);
    used += (count * sizeof(**pointer) + 255) / 256 * 256;
  };
  take(&w->rank, w->images * size);
  take(&w->lowest, 2 * total);
  take(&w->link, 2 * total);
  take(&w->parent, 2 * total);
  take(&w->base, total);
  take(&w->seed, total);
  take(&w->bar, 2 * size * w->dims);
  take(&w->mate, 2 * size * w->dims);
  take(&w->via, 2 * size);
  take(&w->both, size);
  take(&w->essential, 2 * items);
  take(&w->nan, items);
  take(&w->counters, 1);
  take(&w->digits, betti_sort_words(2 * total));
  take(&w->room_a, 24 * total);
  take(&w->room_b, 24 * total);
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
  launch_over(w, w.items, stream, betti_clear_kernel, w.nan, u64(w.items));
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

// Calls fn(work, images) for one group of items after the other.
template <class Fn>
void for_groups(const betti::Problem& p, void* scratch, int64_t scratch_bytes, void* stream,
                Fn&& fn) {
  if (p.items == 0) {
    check_problem(p);
    return;
  }
  if (scratch_bytes < betti_scratch_bytes(p) || !scratch) {
    throw std::invalid_argument("scratch: too small");
  }
  const u32 group = group_size(p);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  for (int64_t first = 0; first < p.items; first += group) {
    BettiWork w;
    plan(p, u32(std::min<int64_t>(group, p.items - first)), static_cast<char*>(scratch), &w);
    w.most_blocks = 8 * processors;
    const Images m{p.input,    p.target,    p.input_dtype, p.target_dtype, p.target ? 2u : 1u,
                   u32(first), p.superlevel};
    compute_ranks(w, m, betti_in_double(p), stream);
    betti_trees(w, stream);
    fn(w, m);
  }
}

template <class R>
void loss_of_group(const betti::Problem& p, const BettiLoss& l, const BettiWork& w, const Images& m,
                   void* stream) {
  const u64 words = u64(w.items) * 2 * 4 * w.n * (sizeof(R) / 4);
  launch_over(w, words, stream, betti_clear_kernel, reinterpret_cast<u32*>(w.room_a), words);
  const u32 threads = w.n <= 512 ? 64 : kLossThreads;
  const u32 blocks = u32(std::clamp<int64_t>(ceil_div(w.n, 4 * threads), 1, 256));
  double* partial = reinterpret_cast<double*>(w.room_b);
  const betti::Options& o = l.options;
  const Loss<R> loss{{R(o.dim_weight[0]), R(o.dim_weight[1])},
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

void betti_pairs(const betti::Problem& p, const BettiTables& t, void* scratch,
                 int64_t scratch_bytes, void* stream) {
  for_groups(p, scratch, scratch_bytes, stream, [&](const BettiWork& w, const Images& m) {
    launch_over(w, u64(m.count) * w.items * p.dims * w.n, stream, betti_table_kernel, w, t, m.count,
                u32(p.items), m.first, u32(p.dims));
  });
}

}  // namespace pyloss::cuda
