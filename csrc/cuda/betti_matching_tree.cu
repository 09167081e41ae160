// Minimum spanning trees, their merge trees, and the pairs of the elder rule, for all runs of all
// items at once. How and why: betti_matching.cu.
#include "cuda/atomic.cuh"
#include "cuda/betti_matching.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 512;

struct EdgeRecord {
  u64 key;
  u32 a, b;  // elements of the next level
};

// ---- Rounds ------------------------------------------------------------------------------------

// What was there once will do: it only ever falls.
__device__ void lower(u64* p, u64 key) {
  if (key < load_relaxed(p)) atomicMin(p, key);
}

// The lowest edge of every vertex. Those of the outside, which start at kNoKey, need atomics.
__global__ void __launch_bounds__(kThreads) betti_first_edges_kernel(BettiWork w) {
  for_each(0, w.total, [&](u32 g) {
    const Run run = run_of(w, g);
    const u32* rank = ranks_of(w, run.image, run.item);
    const u32 slot = g % w.n;
    const Space& space = w.space;
    u64 best = kNoKey;
    if (run.dim == 1 && (slot == w.n - 1 || !space.is_top(slot))) {
      if (slot < w.n - 1) w.lowest[g] = kNoKey;
      return;
    }
    u64* outside = w.lowest + (g - slot) + w.n - 1;
    const auto try_joint = [&](bool there, u32 p, u32 axis) {
      if (!there) return kNoKey;
      const u64 key = edge_key(w, rank, run.dim, space.joint(run.dim, p, axis));
      best = key < best ? key : best;
      return key;
    };
#pragma unroll
    for (u32 axis = 0; axis < 3; ++axis) {
      if (axis < space.first_axis()) continue;
      const u32 at = space.coordinate(slot, axis), left = space.extent(axis) - 1 - at;
      const u32 stride = space.stride(axis);
      if (run.dim == 0) {
        try_joint(at > 0, slot - stride, axis);
        try_joint(left > 0, slot, axis);
      } else {
        const u64 low = try_joint(true, slot, axis), high = try_joint(true, slot + stride, axis);
        if (at == 0) lower(outside, low);
        if (left == 1) lower(outside, high);
      }
    }
    w.lowest[g] = best;
  });
}

// Elements of a level. Level 0: the vertices.
__device__ void level_range(const BettiWork& w, int level, u32* begin, u32* end) {
  *begin = level == 0 ? 0 : w.total + w.counters->begin[level];
  *end = level == 0 ? w.total : w.total + w.counters->begin[level + 1];
}

// The other end of every element's lowest edge; level 0 finds it without a list of edges.
__global__ void __launch_bounds__(kThreads)
    betti_link_kernel(BettiWork w, int level, const EdgeRecord* edges) {
  for_each(0, w.counters->edges[level - 1], [&](u32 i) {
    const EdgeRecord r = edges[i];
    if (w.lowest[r.a] == r.key) w.link[r.a] = r.b;
    if (w.lowest[r.b] == r.key) w.link[r.b] = r.a;
  });
}

// Every tree of links has one edge that both its ends chose, the lowest of the tree. Its end with
// the smaller name is the root, and makes a node.
__global__ void __launch_bounds__(kThreads) betti_root_kernel(BettiWork w, int level) {
  u32 begin, end;
  level_range(w, level, &begin, &end);
  for_blocks(begin, end, [&](u32 x, bool active) {
    const u64 key = active ? w.lowest[x] : kNoKey;
    bool root = false;
    if (key != kNoKey) {
      u32 other = level == 0 ? 0 : w.link[x];
      if (level == 0) {
        const u32 slot = x % w.n, dim = run_of(w, x).dim;
        u32 a, b;
        ends_of(w, dim, edge_of(dim, key), &a, &b);
        other = x - slot + (a == slot ? b : a);
      }
      root = x < other && w.lowest[other] == key;
      w.link[x] = root ? x : other;
    }
    const u32 node = block_append(root, &w.counters->nodes);
    if (!root) return;
    w.base[node] = x;
    w.seed[node] = level == 0 ? x : w.seed[x - w.total];
    w.lowest[w.total + node] = kNoKey;
    w.parent[x] = w.total + node;
  });
}

// Everyone else finds the root of its tree. Links are shortened on the way, for all who follow. A
// block takes a range of its own, so that those under way are spread over all of a long chain (of a
// ramp): each part of it is shortened at the same time, and nobody walks it hop by hop to its end.
__global__ void __launch_bounds__(kThreads) betti_jump_kernel(BettiWork w, int level) {
  u32 begin, end;
  level_range(w, level, &begin, &end);
  if (blockIdx.x == 0 && threadIdx.x == 0) w.counters->begin[level + 2] = w.counters->nodes;
  const u32 range = (end - begin + gridDim.x - 1) / gridDim.x;
  const u64 first = begin + u64(blockIdx.x) * range, after = first + range;
  const u64 last = after < end ? after : end;
  for (u64 i = first + threadIdx.x; i < last; i += blockDim.x) {
    const u32 x = u32(i);
    if (w.lowest[x] == kNoKey) continue;
    u32 to = load_relaxed(w.link + x);
    if (to == x) continue;
    for (u32 next = load_relaxed(w.link + to); next != to; next = load_relaxed(w.link + to)) {
      store_relaxed(w.link + x, next);
      to = next;
    }
    w.parent[x] = w.parent[to];
  }
}

// Edges between different nodes go to the next round.
__global__ void __launch_bounds__(kThreads)
    betti_edges_kernel(BettiWork w, int level, const EdgeRecord* in, EdgeRecord* out) {
  const u32 axes = w.space.axes;
  const u32 count = level == 0 ? axes * w.total : w.counters->edges[level - 1];
  for_blocks(0, count, [&](u32 i, bool active) {
    EdgeRecord r{kNoKey, 0, 0};
    if (active && level == 0) {
      const u32 g = w.space.corner(i), slot = g % w.n, e = axes * slot + w.space.type(i);
      const Run run = run_of(w, g);
      if (w.space.is_joint(run.dim, e)) {
        r.key = edge_key(w, ranks_of(w, run.image, run.item), run.dim, e);
        ends_of(w, run.dim, e, &r.a, &r.b);
        r.a += g - slot;
        r.b += g - slot;
      }
    } else if (active) {
      r = in[i];
    }
    bool keep = r.a != r.b;
    if (keep) {
      r.a = w.parent[r.a];
      r.b = w.parent[r.b];
      keep = r.a != r.b;
    }
    const u32 place = block_append(keep, &w.counters->edges[level]);
    if (!keep) return;
    out[place] = r;
    lower(w.lowest + r.a, r.key);
    lower(w.lowest + r.b, r.key);
  });
}

// ---- Chains ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) betti_fill_kernel(u32* data, u64 words, u32 value) {
  const u64 step = u64(gridDim.x) * blockDim.x;
  for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) data[i] = value;
}

__global__ void __launch_bounds__(kThreads) betti_start_kernel(BettiWork w) {
  if (blockIdx.x == 0) {
    u32* words = reinterpret_cast<u32*>(w.counters);
    for (u32 i = threadIdx.x; i < sizeof(Counters) / 4; i += blockDim.x) words[i] = 0;
  }
  const u32 graphs = w.runs * w.items;
  for_each(0, graphs, [&](u32 graph) {
    const u32 outside = graph * w.n + w.n - 1;
    if (run_of(w, outside).dim == 1) w.lowest[outside] = kNoKey;
  });
  for_each(0, 2 * w.items, [&](u32 i) { w.essential[i] = 0; });
}

// The edge of every element but the roots goes to the chain of the smallest node that contains it
// and is left by higher edges only, and to the place of its id: equal ranks stay in that order.
__global__ void __launch_bounds__(kThreads)
    betti_chain_kernel(BettiWork w, u64* keys, u32* elements) {
  for_each(0, w.total + w.counters->nodes, [&](u32 x) {
    const u64 key = w.lowest[x];
    if (key == kNoKey || w.link[x] == x) return;
    u32 node = w.parent[x];
    while (w.lowest[node] < key) node = w.parent[node];
    const u32 g = x < w.total ? x : w.seed[x - w.total];
    const u32 dim = run_of(w, g).dim, e = edge_of(dim, key);
    const u32 joints = w.space.axes * w.n;
    if (w.tree) w.tree[u64(g / w.n) * joints + e] = 1;
    const u64 place = u64(g / w.n) * joints + (dim == 0 ? e : joints - 1 - e);
    keys[place] = u64(node - w.total) << 32 | key >> 32;
    elements[place] = x;
  });
}

__global__ void __launch_bounds__(kThreads)
    betti_bounds_kernel(const u64* keys, u32 count, u32* start) {
  const u64 step = u64(gridDim.x) * blockDim.x;
  for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const u32 chain = u32(keys[i] >> 32);
    if (i == 0 || chain != u32(keys[i - 1] >> 32)) start[chain] = u32(i);
    if (i == count - 1) start[chain + 1] = count;
  }
}

// ---- Elder rule --------------------------------------------------------------------------------

constexpr int kViews = 3;        // a tree is read with up to three orders of age
constexpr u32 kSerialChain = 8;  // edges: one thread
constexpr u32 kWarpChain = 512;  // one warp; longer ones: one block

struct Sorted {
  const u32* elements;  // (merges) by chain, then by edge
  const u32* start;     // (nodes + 1)
  u64* oldest;          // (kViews, G) ages at the top of the chains
  u32* longs;           // the long chains of a level
};

struct Ages {
  u64 view[kViews];
};
__device__ Ages oldest_of(const Ages& a, const Ages& b) {
  Ages r;
#pragma unroll
  for (int v = 0; v < kViews; ++v) r.view[v] = a.view[v] < b.view[v] ? a.view[v] : b.view[v];
  return r;
}
__device__ Ages no_ages() {
  return {{kNoKey, kNoKey, kNoKey}};
}

struct Chain {
  u32 node, begin, end;
  Run run;
  int views;
  const u32* rank[kViews];
};

// Views of a tree: its own image's ages first. Dimension 0 needs input and target on the tree of
// both; dimension 1 needs both on the trees of input and target.
__device__ Chain open_chain(const BettiWork& w, const Sorted& s, u32 node) {
  Chain c;
  c.node = node;
  c.begin = s.start[node];
  c.end = s.start[node + 1];
  c.run = run_of(w, w.seed[node]);
  const u32 image = c.run.image, item = c.run.item;
  const bool merged = image == kBoth;
  c.views = w.images == 1 ? 1 : c.run.dim == 0 ? (merged ? 3 : 1) : (merged ? 1 : 2);
  c.rank[0] = ranks_of(w, image, item);
  c.rank[1] = c.views == 1 ? c.rank[0] : ranks_of(w, c.run.dim == 0 ? kInput : kBoth, item);
  c.rank[2] = c.views < 3 ? c.rank[0] : ranks_of(w, kTarget, item);
  return c;
}

__device__ Ages element_ages(const BettiWork& w, const Sorted& s, const Chain& c, u32 x) {
  Ages a = no_ages();
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    if (v >= c.views) break;
    a.view[v] = x < w.total ? age_of(w, c.rank[v], c.run.dim, x % w.n)
                            : s.oldest[u64(v) * w.total + (x - w.total)];
  }
  return a;
}

// One merge: in every view the younger of `a` and `b` dies.
__device__ void merge(const BettiWork& w, const Chain& c, u32 x, const Ages& a, const Ages& b) {
  const u64 key = w.lowest[x];
  u64 dying[kViews];
#pragma unroll
  for (int v = 0; v < kViews; ++v) dying[v] = a.view[v] < b.view[v] ? b.view[v] : a.view[v];
  const u32 dim = c.run.dim, item = c.run.item, image = c.run.image;
  const bool real = dying[0] >> 32 != key >> 32;  // not of length 0
  const u32 slot = slot_of(dim, dying[0]);
  if (image != kBoth) {
    if (real) w.bar[table_row(w, image, item, dim) + slot] = edge_of(dim, key);
    if (real && c.views == 2) {
      w.via[table_row(w, image, item, dim) + slot_of(dim, dying[1])] = slot;
    }
  } else if (real) {
    w.both[table_row(w, 0, item, dim) + slot] = edge_of(dim, key);
    if (dim == 0) {
      w.via[table_row(w, kInput, item, 0) + slot] = slot_of(0, dying[1]);
      w.via[table_row(w, kTarget, item, 0) + slot] = slot_of(0, dying[2]);
    }
  }
}

__device__ void close_chain(const BettiWork& w, const Sorted& s, const Chain& c, const Ages& top) {
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    if (v < c.views) s.oldest[u64(v) * w.total + c.node] = top.view[v];
  }
  if (c.run.dim == 0 && c.run.image != kBoth && w.lowest[w.total + c.node] == kNoKey) {
    w.essential[c.run.image * w.items + c.run.item] = slot_of(0, top.view[0]);
  }
}

// Ages of the lanes before, and of all 32.
__device__ Ages warp_oldest_before(const Chain& c, const Ages& own, Ages* all) {
  const u32 lane = threadIdx.x % kWarp;
  Ages before = no_ages();
  *all = no_ages();
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    if (v >= c.views) break;
    u64 a = own.view[v];
#pragma unroll
    for (u32 step = 1; step < kWarp; step *= 2) {
      const u64 other = __shfl_up_sync(kFullMask, a, step);
      if (lane >= step) a = other < a ? other : a;
    }
    all->view[v] = __shfl_sync(kFullMask, a, kWarp - 1);
    const u64 up = __shfl_up_sync(kFullMask, a, 1);
    if (lane > 0) before.view[v] = up;
  }
  return before;
}

// All chains of a level. Their elements lie in lower levels, whose tops are known.
__global__ void __launch_bounds__(kThreads) betti_elder_kernel(BettiWork w, int level, Sorted s) {
  const u32 lane = threadIdx.x % kWarp;
  for_blocks(w.counters->begin[level], w.counters->begin[level + 1], [&](u32 node, bool active) {
    const u32 begin = active ? s.start[node] : 0, size = active ? s.start[node + 1] - begin : 0;
    if (size > 0 && size <= kSerialChain) {
      const Chain c = open_chain(w, s, node);
      Ages top = element_ages(w, s, c, w.base[node]);
      for (u32 i = c.begin; i < c.end; ++i) {
        const u32 x = s.elements[i];
        const Ages own = element_ages(w, s, c, x);
        merge(w, c, x, top, own);
        top = oldest_of(top, own);
      }
      close_chain(w, s, c, top);
    }
    if (size > kWarpChain) s.longs[atomicAdd(&w.counters->chains[level], 1u)] = node;
    u32 left = __ballot_sync(kFullMask, size > kSerialChain && size <= kWarpChain);
    for (; left != 0; left &= left - 1) {
      const Chain c = open_chain(w, s, __shfl_sync(kFullMask, node, __ffs(int(left)) - 1));
      Ages top = element_ages(w, s, c, w.base[c.node]);
      for (u32 first = c.begin; first < c.end; first += kWarp) {
        const u32 i = first + lane, x = i < c.end ? s.elements[i] : 0;
        const Ages own = i < c.end ? element_ages(w, s, c, x) : no_ages();
        Ages all;
        const Ages before = warp_oldest_before(c, own, &all);
        if (i < c.end) merge(w, c, x, oldest_of(top, before), own);
        top = oldest_of(top, all);
      }
      if (lane == 0) close_chain(w, s, c, top);
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    betti_elder_long_kernel(BettiWork w, int level, Sorted s) {
  __shared__ Ages slots[2][kMaxWarps];
  const u32 warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const u32 count = w.counters->chains[level];
  int turn = 0;
  for (u32 k = blockIdx.x; k < count; k += gridDim.x) {
    const Chain c = open_chain(w, s, s.longs[k]);
    Ages top = element_ages(w, s, c, w.base[c.node]), next = no_ages();
    u32 next_x = 0;
    const auto fetch = [&](u32 i) {
      next_x = i < c.end ? s.elements[i] : 0;
      next = i < c.end ? element_ages(w, s, c, next_x) : no_ages();
    };
    fetch(c.begin + threadIdx.x);
    for (u32 first = c.begin; first < c.end; first += blockDim.x) {
      const u32 i = first + threadIdx.x, x = next_x;
      const Ages own = next;
      fetch(i + blockDim.x);  // in flight during the scan
      Ages all;
      Ages before = oldest_of(top, warp_oldest_before(c, own, &all));
      if (threadIdx.x % kWarp == 0) slots[turn][warp] = all;
      __syncthreads();
      for (u32 j = 0; j < warps; ++j) {
        if (j < warp) before = oldest_of(before, slots[turn][j]);
        top = oldest_of(top, slots[turn][j]);
      }
      turn ^= 1;  // nobody is more than one barrier behind
      if (i < c.end) merge(w, c, x, before, own);
    }
    if (threadIdx.x == 0) close_chain(w, s, c, top);
  }
}

// A bar of `both` whose two bars exist is a match.
__global__ void __launch_bounds__(kThreads) betti_match_kernel(BettiWork w) {
  const u32 size = w.items * w.dims * w.n;
  for_each(0, size, [&](u32 i) {
    if (w.both[i] == kNone) return;
    const u64 input = i - i % w.n, target = size + input;  // rows of the tables
    const u32 a = w.via[i], b = w.via[u64(size) + i];
    if (a == kNone || b == kNone || w.bar[input + a] == kNone || w.bar[target + b] == kNone) {
      w.both[i] = kNone;
      return;
    }
    w.mate[input + a] = b;
    w.mate[target + b] = a;
  });
}

void fill(const BettiWork& w, u32* data, u64 words, u32 value, void* stream) {
  launch_over(w, words, stream, betti_fill_kernel, data, words, value);
}

}  // namespace

void betti_trees(const BettiWork& w, void* stream) {
  const u64 total = w.total, joints = w.space.axes * total, table = 2 * u64(w.items) * w.dims * w.n;
  fill(w, w.bar, table, kNone, stream);
  fill(w, w.mate, table, kNone, stream);
  if (w.images == 3) {
    fill(w, w.via, table, kNone, stream);
    fill(w, w.both, table / 2, kNone, stream);
  }
  if (w.tree) fill(w, reinterpret_cast<u32*>(w.tree), (joints + 3) / 4, 0, stream);
  launch_over(w, 2 * u64(w.runs) * w.items, stream, betti_start_kernel, w);
  if (w.merges == 0) return;

  EdgeRecord* lists[2] = {reinterpret_cast<EdgeRecord*>(w.room_a),
                          reinterpret_cast<EdgeRecord*>(w.room_b)};
  launch_over(w, total, stream, betti_first_edges_kernel, w);
  for (int level = 0; level < w.rounds; ++level) {
    // Every round at least halves the elements; the edges have no such bound.
    const u64 elements = (total >> level) + 1;
    const EdgeRecord* in = lists[(level + 1) % 2];
    if (level > 0) launch_over(w, total, stream, betti_link_kernel, w, level, in);
    launch_over(w, elements, stream, betti_root_kernel, w, level);
    launch_over(w, elements, stream, betti_jump_kernel, w, level);
    if (level + 1 < w.rounds) {
      launch_over(w, joints, stream, betti_edges_kernel, w, level, in, lists[level % 2]);
    }
  }

  // First with holes, a place for every joint; sorted, at most G.
  u64* keys = reinterpret_cast<u64*>(w.room_a);
  const SortBuffers a{keys, reinterpret_cast<u32*>(keys + joints)};
  keys = reinterpret_cast<u64*>(w.room_b);
  const SortBuffers b{keys, reinterpret_cast<u32*>(keys + total)};
  fill(w, reinterpret_cast<u32*>(a.keys), 2 * joints, ~u32{0}, stream);
  launch_over(w, 2 * total, stream, betti_chain_kernel, w, a.keys, a.values);
  int bits = 32;
  while (bits < 64 && total >> (bits - 32) > 0) ++bits;
  const bool in_b = betti_sort(w, a, b, u32(joints), w.merges, bits, stream);
  const SortBuffers& sorted = in_b ? b : a;
  Sorted s{};
  s.elements = sorted.values;
  s.start = w.link;  // needed no more
  s.oldest = reinterpret_cast<u64*>(in_b ? w.room_a : w.room_b);
  s.longs = w.parent;  // nor this
  launch_over(w, w.merges, stream, betti_bounds_kernel, static_cast<const u64*>(sorted.keys),
              w.merges, w.link);
  for (int level = 1; level <= w.rounds; ++level) {
    const u64 chains = (total >> level) + 1;
    launch_over(w, chains, stream, betti_elder_kernel, w, level, s);
    if (w.n > kWarpChain) {
      const u64 longs = chains < w.merges / kWarpChain ? chains : w.merges / kWarpChain + 1;
      launch_over(w, longs * w.threads, stream, betti_elder_long_kernel, w, level, s);
    }
  }
  if (w.images == 3) launch_over(w, u64(w.items) * w.dims * w.n, stream, betti_match_kernel, w);
}

}  // namespace pyloss::cuda
