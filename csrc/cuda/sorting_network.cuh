// What the CUDA files of sorting_network share: networks on the device, the stored form of a
// comparator, places in shared memory, and the launchers of each file.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/sorting_network.h"

namespace pyloss::cuda {

using sorting::Comparator;
using sorting::Distribution;
using sorting::Layer;
using sorting::Mixed;
using sorting::Network;
using sorting::Relaxation;

// ---- Networks ----------------------------------------------------------------------------------

struct Net {
  Network network;
  int n, layers;
  int slots;   // comparator c of layer l is number l * slots + c of an array over comparators
  int absent;  // bitonic: wires missing to the next power of two
  const int32_t *table, *offsets;

  int64_t comparators() const { return int64_t(layers) * slots; }
};

inline Net make_net(const sorting::Problem& p) {
  const int n = int(p.n);
  const bool table = p.network == Network::kSplitter;
  const int layers = table ? p.layers : sorting::layer_count(p.network, n);
  const bool bitonic = p.network == Network::kBitonic;
  const int absent = bitonic ? (1 << sorting::ceil_log2(n)) - n : 0;
  return {p.network, n, layers, n / 2, absent, p.table, p.offsets};
}

// A block computes the layers it will visit once, since finding a layer takes a loop.
__device__ inline void fill_layers(const Net& net, Layer* layers, int first, int last, int thread,
                                   int threads) {
  if (net.network == Network::kOddEven || net.network == Network::kSplitter) return;
  for (int l = first + thread; l < last; l += threads) {
    layers[l - first] = sorting::layer_of(net.network, net.n, l);
  }
}
// `layers`: of fill_layers, with layer `first` in front.
__device__ inline Layer layer_at(const Net& net, const Layer* layers, int l, int first = 0) {
  if (net.network == Network::kOddEven) return sorting::layer_of(Network::kOddEven, net.n, l);
  if (net.network == Network::kSplitter) {
    const int offset = net.offsets[l];
    return {net.offsets[l + 1] - offset, 1, 0, offset, 0, 0, 0};
  }
  return layers[l - first];
}
__device__ inline Comparator comparator_at(const Net& net, const Layer& layer, int c) {
  if (net.network == Network::kSplitter) {
    const int64_t i = 2 * (int64_t(layer.shift) + c);
    return {net.table[i], net.table[i + 1]};
  }
  return sorting::comparator(layer, c);
}

// ---- Comparators -------------------------------------------------------------------------------

template <class R>
__device__ Mixed<R> mix_any(Distribution kind, R lo, R hi, const Relaxation<R>& relaxation) {
  using M = sorting::ScalarMath<R>;
  switch (kind) {
    case Distribution::kLogistic:
      return sorting::mix_values<Distribution::kLogistic, M>(lo, hi, relaxation);
    case Distribution::kLogisticPhi:
      return sorting::mix_values<Distribution::kLogisticPhi, M>(lo, hi, relaxation);
    case Distribution::kGaussian:
      return sorting::mix_values<Distribution::kGaussian, M>(lo, hi, relaxation);
    case Distribution::kCauchy:
      return sorting::mix_values<Distribution::kCauchy, M>(lo, hi, relaxation);
    case Distribution::kReciprocal:
      return sorting::mix_values<Distribution::kReciprocal, M>(lo, hi, relaxation);
    default:
      return sorting::mix_values<Distribution::kOptimal, M>(lo, hi, relaxation);
  }
}

// The backward gets a comparator from one stored number, x_hi - x_lo; NaN stands for two equal
// infinities (real NaNs are told by the flag of their item).
template <class R>
__device__ R stored_difference(R lo, R hi) {
  if (lo != hi) return hi - lo;
  return lo - lo;  // 0, or NaN
}
template <class R>
__device__ Mixed<R> mix_of_difference(Distribution kind, R d, const Relaxation<R>& relaxation) {
  if (d != d) return {R(0), R(0), R(0.5), R(0.5), R(0), R(0)};
  return mix_any(kind, R(0), d, relaxation);
}

// The weights in one number: tau, with a minus where it is the weight of a wire's own value.
template <class R>
__device__ R pack_weight(const Mixed<R>& m) {
  return m.alpha < m.beta ? -m.alpha : m.beta;
}
template <class R>
struct Weights {
  R own, other;
};
template <class R>
__device__ Weights<R> unpack_weight(R packed) {
  // The sign of -0 counts: alpha is 0 then.
  const bool negative = std::signbit(packed);
  const R tau = negative ? -packed : packed;
  return negative ? Weights<R>{tau, R(1) - tau} : Weights<R>{R(1) - tau, tau};
}

// ---- Shared memory -----------------------------------------------------------------------------

// The place of a wire. Lanes take neighbouring comparators, so the lower wires of a warp are all i
// with one bit of i clear, out of 64. Mirroring every second line of 32 puts them in 32 banks.
__device__ inline int place_of(int wire, int shift) {
  const int i = wire + shift;
  return i ^ ((i & 32) ? 31 : 0);
}
__host__ __device__ inline int place_shift(const Net& net) {
  return net.n > 32 ? net.absent & 63 : 0;
}
__host__ __device__ inline int place_count(const Net& net) {
  return (net.n + place_shift(net) + 31) / 32 * 32;
}

// ---- What the files offer each other -----------------------------------------------------------

// Values of n <= kSortingMaxRow wires, a block (or a part of one) per item.
template <class R>
struct ValuesCall {
  Net net;
  Distribution kind;
  Relaxation<R> relaxation;
  int64_t items;
  const R* x;
  R* y;           // may be null, like all that follow
  R* weights;     // (items, comparators)
  R* difference;  // (items, comparators)
  int32_t* bad;   // (items): NaN among the values
};
template <class R>
void values_forward(const ValuesCall<R>& call, void* stream);

template <class R>
struct ValuesBackward {
  Net net;
  Distribution kind;
  Relaxation<R> relaxation;
  int64_t items;
  const R *x, *gy, *difference;
  const R* alpha_grad;        // dL / d alpha, by way of P; null: none
  int64_t alpha_grad_stride;  // from item to item
  const int32_t* bad;
  R* gx;
};
template <class R>
void values_backward(const ValuesBackward<R>& call, void* stream);

// Rows pushed through the network, tile by tile.
enum class TileMode : int32_t { kForward, kBackward, kLoss };

template <class R>
struct TileCall {
  Net net;
  TileMode mode;
  bool identity;  // the rows are those of the unit matrix: P; otherwise columns of f
  bool reversed;  // the layers from last to first
  bool one_f;
  bool want_t;
  sorting::Loss loss_kind;
  int64_t items, rows;  // rows: n or the width of f
  const R* weights;
  const int32_t* bad;
  const R *f, *g;
  R* out;  // kForward: P or the features
  R* gf;   // kBackward: (items, n, rows); may be null
  const int32_t *first, *count;
  double* loss;   // (items, groups)
  R* alpha_grad;  // (items, groups, comparators)
  R* t;           // t_capacity per block, if it does not stay in shared memory
  R* checkpoints;
  // From plan_tiles.
  int tile_rows, row_shift, tiles, groups, threads;
  int64_t t_capacity, checkpoint_capacity;  // numbers per block
  bool t_shared, segmented;
  size_t shared_bytes;
};
// Fills in the plan; `limit` bounds the scratch memory of all blocks, where that can be.
template <class R>
void plan_tiles(TileCall<R>* call, int64_t limit);
template <class R>
void run_tiles(const TileCall<R>& call, void* stream);

// n <= 32: everything about an item in one launch.
inline constexpr int64_t kSortingTinyRow = 32;
template <class R>
struct TinyCall {
  Net net;
  Distribution kind;
  Relaxation<R> relaxation;
  SortingTask task;  // kPermutation, kPermutationBackward, kLoss
  sorting::Loss loss_kind;
  int64_t items;
  const R *x, *g, *gy;
  const int32_t *first, *count;
  R *y, *out, *loss, *gx;
};
// Whether it finds the shared memory that it needs.
template <class R>
bool tiny_fits(const TinyCall<R>& call);
template <class R>
void run_tiny(const TinyCall<R>& call, void* stream);

// n > kSortingMaxRow, values and features.
template <class R>
struct LargeCall {
  Net net;
  Distribution kind;
  Relaxation<R> relaxation;
  int64_t items, width;
  bool reversed, one_f;
  const R *x, *gy, *f, *g;
  R *y, *out, *gx, *gf;  // gf: (items, n, width)
  // Scratch: (items, comparators) the first three, (items, n) the next two.
  R *difference, *t, *alpha_grad, *a, *b;
  int32_t* bad;
};
template <class R>
void large_sort(const LargeCall<R>& call, void* stream);
template <class R>
void large_sort_backward(const LargeCall<R>& call, void* stream);
template <class R>
void large_apply(const LargeCall<R>& call, void* stream);
template <class R>
void large_apply_backward(const LargeCall<R>& call, void* stream);

// One term of a fused loss and its slope in p, at an entry p of P whose target is q; both without
// the factor that makes a mean of the sum.
template <class R>
struct LossTerm {
  R value, slope;
};
template <class R>
__device__ LossTerm<R> loss_term(sorting::Loss kind, R p, R q) {
  if (kind == sorting::Loss::kBce) {
    // As torch: logarithms are at least -100, and p (1 - p) in the gradient at least 1e-12.
    const R one = p > R(1) ? R(1) : p, rest = R(1) - one;
    const R log_p = log_(one), log_rest = log1p_(-one);
    const R value = -(q * (log_p < R(-100) ? R(-100) : log_p) +
                      (R(1) - q) * (log_rest < R(-100) ? R(-100) : log_rest));
    const R spread = one * rest;
    return {value, (one - q) / (spread < R(1e-12) ? R(1e-12) : spread)};
  }
  if (q == R(0)) return {p != p ? p : R(0), R(0)};
  const R least = R(1e-30);
  return p < least ? LossTerm<R>{-q * log_(least), R(0)} : LossTerm<R>{-q * log_(p), -q / p};
}

// The target of element i at a rank.
template <class R>
__device__ R target_weight(int rank, int first, int count) {
  return rank >= first && int64_t(rank) < int64_t(first) + count ? R(1) / R(count) : R(0);
}

}  // namespace pyloss::cuda
