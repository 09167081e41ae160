// Rows through a sorting network, n <= 4096: the permutation matrix, features, fused losses, and
// their reverse sweep.
//
//     forward   r_lo' = alpha r_lo + beta r_hi, r_hi' = beta r_lo + alpha r_hi    t = r_lo - r_hi
//     reverse   dL/dalpha += sum over rows (g_lo - g_hi) t, then g mixes as r does
//
// A row of P is a unit vector pushed through the layers first to last, a column of P^T f is one of
// f; a column of P f goes through them last to first. The weights of all comparators come from
// sorting_network_values.cu, the gradient goes back there.
//
// Decomposition: a block owns a tile of kRows rows of one item, W[kRows][n] in shared memory, and
// takes the tiles group, group + groups, ... of its item. A thread takes comparators and does all
// rows of one, so a weight is read once per tile, t needs no exchange and the sum over rows none
// either; all rows are loaded before the first is stored, so that their latencies overlap. One
// barrier per layer; its weights, and in the reverse its dL/dalpha, are read two layers ahead.
// Places are swizzled (place_of), so that shared memory serves a warp's 32 comparators without
// conflicts.
//
// Light cone: before block k of the bitonic network a row of P is zero outside of its aligned
// 2^k wires, before layer l of odd_even outside of +-l. Comparators out there are left out, in both
// directions: n (k - 1) mixes a row in place of n k (k + 1)/4. The bitonic bounds are worked out
// once a tile, a layer a thread: a warp without a comparator has little more to do than the
// barrier.
//
// t stays in shared memory where it fits, with the light cone n (k - 1) numbers a row (n = 1024
// bitonic: 37 KB, 4 rows). If not, the layers are cut into segments: the forward leaves W at
// the start of each in global memory, the reverse runs a segment again to have its t; where that
// would take more than kMaxSegments segments, t is in global memory, for sqrt(layers) layers.
//
// Shared memory traffic per mix: 16 bytes forward, 4 for t; the same backward. Global traffic per
// comparator and tile: its weight once forward and once backward, its dL/dalpha read and written.
// Outputs are written once, by lines.
//
// Sums: dL/dalpha within a tile, then over the tiles of a block, one partial result per block, then
// over blocks (sorting_network.cu), all in an order fixed by the shape: no atomics. Accumulator
// float or double as the values; losses in double.
#include <algorithm>
#include <cmath>

#include "cuda/sorting_network.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLayers = 80;  // of n = 4096: 78
constexpr int kMaxSegments = 64;
constexpr int kStaticBytes = 4096;  // the most of static shared memory
constexpr int kWarpsWanted = 12;

struct Range {
  int begin, end;
};

// Where the differences t of a tile are: none in a forward, whether to a matrix or to a loss.
enum class Kept { kNone, kNoneOfLoss, kShared, kGlobal };

// Blocks of a multiprocessor that the registers must allow: two of a forward with few rows.
template <class R, int kRows, Kept kT>
constexpr int kTileBlocks = kT == Kept::kNone && kRows * sizeof(R) <= 16 ? 2 : 1;

// The comparators that rows [first, last] of the unit matrix can reach.
__device__ Range light_cone(const Net& net, const Layer& layer, int l, int first, int last) {
  if (first < 0) first = 0;
  if (last > net.n - 1) last = net.n - 1;
  if (net.network == Network::kBitonic) {
    const int size = layer.flip_mask;
    const int a = (first + net.absent) & ~(size - 1), b = ((last + net.absent) | (size - 1)) + 1;
    const int begin = a / 2 - layer.skip, end = b / 2 - layer.skip;
    return {begin < 0 ? 0 : begin, end < layer.count ? end : layer.count};
  }
  if (net.network == Network::kOddEven) {
    const int low = first - l - 1 - layer.shift, high = last + l - layer.shift;
    const int begin = low > 0 ? (low + 1) / 2 : 0, end = high < 0 ? 0 : high / 2 + 1;
    return {begin, end < layer.count ? end : layer.count};
  }
  return {0, layer.count};
}

// The most comparators that a tile meets in layer l.
int64_t most_active(const Net& net, bool identity, int rows, int l, int block) {
  int64_t count = net.slots;
  if (identity && net.network == Network::kBitonic) {
    count = std::max<int64_t>(int64_t{1} << block, (rows + 1) / 2);
  } else if (identity && net.network == Network::kOddEven) {
    count = l + rows / 2 + 2;
  }
  return std::min<int64_t>(count, net.slots);
}
int64_t total_active(const Net& net, bool identity, int rows) {
  int64_t sum = 0;
  int block = 0, step = 0;
  for (int l = 0; l < net.layers; ++l) {
    sum += most_active(net, identity, rows, l, block);
    if (step++ == block) ++block, step = 0;
  }
  return sum;
}

template <class R, int kRows>
struct Tile {
  const TileCall<R>& a;
  const Layer* layers;
  const Range* cones;  // of the layers, for this tile; see find_cones
  const R* weights;    // of the item
  R *t, *alpha_grad;
  int64_t item;
  int first_row;  // of the tile; some rows may lie outside of [0, a.rows)
  int length, shift;

  __device__ int layer_number(int step) const {
    return a.reversed ? a.net.layers - 1 - step : step;
  }
  // Bitonic cones wait in shared memory; others take less to find than to load.
  __device__ bool cones_kept() const { return a.identity && a.net.network == Network::kBitonic; }
  __device__ Range cone(int l) const {
    const Range r = light_cone(a.net, layers[l], l, first_row, first_row + kRows - 1);
    return {r.begin, r.end > r.begin ? r.end : r.begin};
  }
  __device__ void find_cones(Range* to) const {
    if (!cones_kept()) return;
    for (int l = int(threadIdx.x); l < a.net.layers; l += int(blockDim.x)) to[l] = cone(l);
  }
  __device__ Range range(int l) const {
    if (cones_kept()) return cones[l];
    const Layer layer = layer_at(a.net, layers, l);
    if (!a.identity) return {0, layer.count};
    const Range r = light_cone(a.net, layer, l, first_row, first_row + kRows - 1);
    return {r.begin, r.end > r.begin ? r.end : r.begin};
  }

  // Of the thread's first comparator of a step, read while those before it run.
  struct Ahead {
    R weight, grad;
  };
  __device__ Ahead ahead_of(int step, bool with_grad) const {
    Ahead found{};
    if (step < 0 || step >= a.net.layers) return found;
    const int l = layer_number(step);
    const Range r = range(l);
    const int64_t at = int64_t(l) * a.net.slots + r.begin + int(threadIdx.x);
    if (r.begin + int(threadIdx.x) < r.end) {
      found.weight = weights[at];
      if (with_grad) found.grad = alpha_grad[at];
    }
    return found;
  }

  struct Step {
    Layer layer;  // of threads that have a comparator
    Range range;
    int l;
    Ahead first;
  };
  __device__ Step step_at(int step, const Ahead& first) const {
    Step s{};
    if (step < 0 || step >= a.net.layers) return s;
    s.l = layer_number(step);
    s.range = range(s.l);
    s.first = first;
    if (s.range.begin + int(threadIdx.x) < s.range.end) s.layer = layer_at(a.net, layers, s.l);
    return s;
  }

  // fn(lo, hi, weights, comparator, whether it is the thread's first) of the thread's comparators.
  template <class Fn>
  __device__ void for_comparators(const Step& s, Fn&& fn) const {
    const int begin = s.range.begin + int(threadIdx.x);
    for (int c = begin; c < s.range.end; c += int(blockDim.x)) {
      const R packed = c == begin ? s.first.weight : weights[int64_t(s.l) * a.net.slots + c];
      const Comparator p = comparator_at(a.net, s.layer, c);
      fn(place_of(p.lo, shift), place_of(p.hi, shift), unpack_weight(packed), c, c == begin);
    }
  }

  struct Rows {
    R lo[kRows], hi[kRows];
  };
  __device__ Rows read(const R* w, int lo, int hi) const {
    Rows found;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      found.lo[r] = w[r * length + lo];
      found.hi[r] = w[r * length + hi];
    }
    return found;
  }
  __device__ void write_mixed(R* w, int lo, int hi, const Weights<R>& m, const Rows& x) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      w[r * length + lo] = m.own * x.lo[r] + m.other * x.hi[r];
      w[r * length + hi] = m.other * x.lo[r] + m.own * x.hi[r];
    }
  }

  __device__ void forward_step(R* w, const Step& s, bool want_t, int64_t used) const {
    const int count = s.range.end - s.range.begin;
    R* store = want_t ? t + used : nullptr;
    for_comparators(s, [&](int lo, int hi, const Weights<R>& m, int c, bool) {
      const Rows x = read(w, lo, hi);
      if (store) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) store[r * count + c - s.range.begin] = x.lo[r] - x.hi[r];
      }
      write_mixed(w, lo, hi, m, x);
    });
  }
  __device__ void reverse_step(R* g, const Step& s, int64_t used) const {
    const int count = s.range.end - s.range.begin;
    const R* store = t + used;
    for_comparators(s, [&](int lo, int hi, const Weights<R>& m, int c, bool first) {
      const Rows x = read(g, lo, hi);
      R sum = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum += (x.lo[r] - x.hi[r]) * store[r * count + c - s.range.begin];
      }
      write_mixed(g, lo, hi, m, x);
      const int64_t at = int64_t(s.l) * a.net.slots + c;
      alpha_grad[at] = (first ? s.first.grad : alpha_grad[at]) + sum;
    });
  }

  __device__ int row_of(int r) const { return first_row + r; }
  __device__ bool has_row(int r) const { return row_of(r) >= 0 && row_of(r) < a.rows; }

  // fn(row in the tile, wire), along the memory of (n, n) or (n, width).
  template <class Fn>
  __device__ void for_entries(bool by_row, Fn&& fn) const {
    const int n = a.net.n, thread = int(threadIdx.x), threads = int(blockDim.x);
    if (!by_row) {
      for (int i = thread; i < kRows * n; i += threads) fn(i % kRows, i / kRows);
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int wire = thread; wire < n; wire += threads) fn(r, wire);
    }
  }
  __device__ int64_t feature(bool one, int wire, int r) const {
    return ((one ? 0 : item * a.net.n) + wire) * a.rows + row_of(r);
  }
  __device__ int64_t entry(int wire, int r) const {
    return (item * a.net.n + row_of(r)) * a.net.n + wire;
  }

  __device__ void load(R* w) const {
    if (a.identity) {
      for (int i = int(threadIdx.x); i < kRows * length; i += int(blockDim.x)) w[i] = R(0);
      __syncthreads();
      for (int r = int(threadIdx.x); r < kRows; r += int(blockDim.x)) {
        if (has_row(r)) w[r * length + place_of(row_of(r), shift)] = R(1);
      }
      return;
    }
    for_entries(false, [&](int r, int wire) {
      w[r * length + place_of(wire, shift)] = has_row(r) ? a.f[feature(a.one_f, wire, r)] : R(0);
    });
  }
  __device__ void store_forward(const R* w, bool bad) const {
    for_entries(a.identity, [&](int r, int wire) {
      if (!has_row(r)) return;
      const R found = bad ? nan_<R>() : w[r * length + place_of(wire, shift)];
      a.out[a.identity ? entry(wire, r) : feature(false, wire, r)] = found;
    });
  }
  __device__ void load_gradient(R* g) const {
    for_entries(a.identity, [&](int r, int wire) {
      const int64_t at = a.identity ? entry(wire, r) : feature(false, wire, r);
      g[r * length + place_of(wire, shift)] = has_row(r) ? a.g[at] : R(0);
    });
  }
  __device__ double loss_and_gradient(R* w, bool bad) const {
    const int n = a.net.n;
    double sum = 0;
    const R scale = R(1) / R(a.loss_kind == sorting::Loss::kBce ? int64_t(n) * n : n);
    for_entries(true, [&](int r, int wire) {
      R& entry = w[r * length + place_of(wire, shift)];
      if (!has_row(r)) {
        entry = R(0);
        return;
      }
      const int64_t i = item * n + row_of(r);
      const R q = target_weight<R>(wire, a.first[i], a.count ? a.count[i] : 1);
      const LossTerm<R> term = loss_term(a.loss_kind, bad ? nan_<R>() : entry, q);
      sum += double(term.value);
      entry = term.slope * scale;
    });
    return sum;
  }
};

template <class R, int kRows, Kept kT>
__global__ void __launch_bounds__(kThreads, kTileBlocks<R, kRows, kT>)
    sorting_tile_kernel(TileCall<R> a) {
  constexpr bool backward = kT == Kept::kShared || kT == Kept::kGlobal;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ Layer layers[kLayers];
  __shared__ Range cones[kLayers];
  __shared__ int starts[kMaxSegments + 1];
  __shared__ double slots[kMaxWarps];
  const int64_t item = blockIdx.x;
  const int group = int(blockIdx.y), length = place_count(a.net);
  const int64_t block = item * a.groups + group;
  R* w = reinterpret_cast<R*>(shared);
  R* again = a.segmented ? w + kRows * length : w;  // rows that run a second time
  R* t = kT == Kept::kGlobal ? a.t + block * a.t_capacity : again + kRows * length;
  R* checkpoints = a.segmented ? a.checkpoints + block * a.checkpoint_capacity : nullptr;
  R* alpha_grad = backward ? a.alpha_grad + block * a.net.layers * a.net.slots : nullptr;
  const bool bad = a.bad[item] != 0;
  const int steps = a.net.layers;

  fill_layers(a.net, layers, 0, steps, int(threadIdx.x), int(blockDim.x));
  if (backward) {
    for (int64_t i = threadIdx.x; i < int64_t(steps) * a.net.slots; i += blockDim.x) {
      alpha_grad[i] = R(0);
    }
  }
  double loss = 0;
  __syncthreads();
  for (int tile_number = group; tile_number < a.tiles; tile_number += a.groups) {
    using T = Tile<R, kRows>;
    const T tile{a,      layers,
                 cones,  a.weights + item * steps * a.net.slots,
                 t,      alpha_grad,
                 item,   tile_number * kRows - a.row_shift,
                 length, place_shift(a.net)};
    const auto keep = [&](int segment) {
      R* to = checkpoints + int64_t(segment) * kRows * length;
      for (int i = int(threadIdx.x); i < kRows * length; i += int(blockDim.x)) to[i] = w[i];
    };
    tile.find_cones(cones);
    tile.load(w);
    int segments = 0;
    int64_t used = 0;
    __syncthreads();
    typename T::Step next = tile.step_at(0, tile.ahead_of(0, false));
    typename T::Ahead ahead = tile.ahead_of(1, false);
    for (int q = 0; q < steps; ++q) {
      const typename T::Step step = next;
      next = tile.step_at(q + 1, ahead);
      ahead = tile.ahead_of(q + 2, false);
      const int64_t size = int64_t(step.range.end - step.range.begin) * kRows;
      if (backward && used + size > a.t_capacity) {
        ++segments;
        keep(segments - 1);
        if (threadIdx.x == 0) starts[segments] = q;
        used = 0;
        __syncthreads();
      }
      tile.forward_step(w, step, backward, used);
      used += size;
      __syncthreads();
    }
    if (kT == Kept::kNone) {
      tile.store_forward(w, bad);
      __syncthreads();
      continue;
    }
    if (a.mode == TileMode::kLoss) {
      loss += tile.loss_and_gradient(w, bad);
    } else {
      tile.load_gradient(w);
    }
    __syncthreads();
    if (!backward) continue;
    int end = steps;
    for (int segment = segments; segment >= 0; --segment) {
      const int begin = segment == 0 ? 0 : starts[segment];
      if (segment != segments) {
        if (segment == 0) {
          tile.load(again);
        } else {
          const R* from = checkpoints + int64_t(segment - 1) * kRows * length;
          for (int i = int(threadIdx.x); i < kRows * length; i += int(blockDim.x)) {
            again[i] = from[i];
          }
        }
        used = 0;
        __syncthreads();
        for (int q = begin; q < end; ++q) {
          const typename T::Step step = tile.step_at(q, tile.ahead_of(q, false));
          tile.forward_step(again, step, true, used);
          used += int64_t(step.range.end - step.range.begin) * kRows;
          __syncthreads();
        }
      }
      next = tile.step_at(end - 1, tile.ahead_of(end - 1, true));
      ahead = tile.ahead_of(end - 2, true);
      for (int q = end - 1; q >= begin; --q) {
        const typename T::Step step = next;
        next = tile.step_at(q - 1, ahead);
        ahead = tile.ahead_of(q - 2, true);
        used -= int64_t(step.range.end - step.range.begin) * kRows;
        tile.reverse_step(w, step, used);
        __syncthreads();
      }
      end = begin;
    }
    if (a.gf) {
      tile.for_entries(false, [&](int r, int wire) {
        if (!tile.has_row(r)) return;
        a.gf[tile.feature(false, wire, r)] =
            bad ? nan_<R>() : w[r * length + place_of(wire, tile.shift)];
      });
      __syncthreads();  // spare: load() overwrites this thread's entries only
    }
  }
  if (a.mode == TileMode::kLoss) {
    loss = team_reduce(loss, AddOp(), 0.0, slots);
    if (threadIdx.x == 0) a.loss[block] = loss;
  }
}

int64_t ceil_root(int64_t n) {
  int64_t r = 0;
  while (r * r < n) ++r;
  return r;
}

template <class R, int kRows>
void run_rows(const TileCall<R>& call, void* stream) {
  const auto kernel = call.mode == TileMode::kForward ? sorting_tile_kernel<R, kRows, Kept::kNone>
                      : !call.want_t  ? sorting_tile_kernel<R, kRows, Kept::kNoneOfLoss>
                      : call.t_shared ? sorting_tile_kernel<R, kRows, Kept::kShared>
                                      : sorting_tile_kernel<R, kRows, Kept::kGlobal>;
  launch(kernel, dim3(grid_size(call.items), unsigned(call.groups)), dim3(unsigned(call.threads)),
         call.shared_bytes, stream, call);
}

}  // namespace

template <class R>
void plan_tiles(TileCall<R>* call, int64_t limit) {
  const Net& net = call->net;
  const int64_t length = place_count(net);
  const int64_t sm_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t most = sm_bytes - 1024 - kStaticBytes;
  call->threads = std::clamp((net.slots + kWarp - 1) / kWarp * kWarp, kWarp, kThreads);
  const auto warps_per_sm = [&](int64_t bytes) {
    const int64_t blocks = std::min<int64_t>(sm_bytes / (bytes + 1024 + kStaticBytes), 32);
    return std::min<int64_t>(blocks * call->threads / kWarp, 64);
  };

  // Whole rows with all their t, as many as leave enough warps; few rows waste weights.
  const int few = net.n > 2048 || sizeof(R) == 8 ? 2 : 4;
  int rows = 8;
  while (rows > 1 && rows / 2 >= call->rows) rows /= 2;
  int best = 0;
  int64_t best_warps = 0;
  const int fewest = std::min(few, rows);
  for (; rows >= fewest; rows /= 2) {
    const int64_t t = call->want_t ? total_active(net, call->identity, rows) * rows : 0;
    const int64_t bytes = (rows * length + t) * int64_t(sizeof(R));
    if (bytes > most) continue;
    const int64_t warps = std::min<int64_t>(warps_per_sm(bytes), kWarpsWanted);
    if (warps <= best_warps) continue;
    best = rows;
    best_warps = warps;
    call->t_capacity = t;
    call->shared_bytes = size_t(bytes);
  }
  call->segmented = false;
  call->t_shared = true;
  call->checkpoint_capacity = 0;
  if (best == 0) {
    best = fewest;
    const int64_t kept = 2 * best * length, layer = int64_t(net.slots) * best;
    int64_t together = (most / int64_t(sizeof(R)) - kept) / layer;  // layers
    call->segmented = true;
    if (together < 1 || ceil_div(net.layers, together) > kMaxSegments) {
      call->t_shared = false;
      together = std::max(ceil_root(net.layers), ceil_div(net.layers, kMaxSegments));
    }
    call->t_capacity = together * layer;
    call->checkpoint_capacity = ceil_div(net.layers, together) * best * length;
    call->shared_bytes = size_t(kept + (call->t_shared ? call->t_capacity : 0)) * sizeof(R);
  }
  call->tile_rows = best;
  call->row_shift = call->identity ? net.absent % best : 0;
  call->tiles = int(ceil_div(call->rows + call->row_shift, best));

  // About two blocks for every place on the device; each leaves a partial sum per comparator.
  const int64_t per_sm = std::max<int64_t>(
      1, std::min<int64_t>(sm_bytes / (int64_t(call->shared_bytes) + 1024 + kStaticBytes),
                           2048 / call->threads));
  const int64_t places = per_sm * device_attribute(cudaDevAttrMultiProcessorCount);
  int64_t per_block = call->checkpoint_capacity + (call->t_shared ? 0 : call->t_capacity);
  if (call->want_t) per_block += net.comparators();
  const int64_t affordable =
      limit / std::max<int64_t>(1, per_block * int64_t(sizeof(R)) * call->items);
  const int64_t wanted =
      call->want_t ? 2 * places / std::max<int64_t>(1, call->items) : int64_t(call->tiles);
  call->groups =
      int(std::clamp<int64_t>(std::min({wanted, affordable, int64_t(call->tiles)}), 1, 65535));
}
template void plan_tiles<float>(TileCall<float>*, int64_t);
template void plan_tiles<double>(TileCall<double>*, int64_t);

template <class R>
void run_tiles(const TileCall<R>& call, void* stream) {
  switch (call.tile_rows) {
    case 1:
      return run_rows<R, 1>(call, stream);
    case 2:
      return run_rows<R, 2>(call, stream);
    case 4:
      return run_rows<R, 4>(call, stream);
    default:
      return run_rows<R, 8>(call, stream);
  }
}
template void run_tiles<float>(const TileCall<float>&, void*);
template void run_tiles<double>(const TileCall<double>&, void*);

}  // namespace pyloss::cuda
