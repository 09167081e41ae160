// Permutation matrices and fused losses of n <= 32 wires (double: 16): everything about an item in
// one launch.
// Formulas: sorting_network_tiles.cu.
//
// Decomposition: a warp takes 32 / N items, N the next power of two, a thread one row of P, whole
// in registers; the network is unrolled at compile time, so every register has a fixed name. One
// block is one warp, so there are no block barriers. First the values of an item go through the
// network, a lane per comparator, and leave weights and differences in shared memory, where the
// rows read them by broadcast. Comparators that n < N wires do not have get the weights 1 and 0.
//
// Backward: t of every comparator and row in shared memory, 33 places a comparator (N = 32 bitonic,
// float: 32 KB a warp, 7 warps an SM). The reverse sweep multiplies it by the gradients in place,
// then a lane sums over the rows of one comparator in their order, then the value sweep.
//
// Memory traffic: x and the outputs once, P and its gradient by whole lines through shared memory.
// Accumulator: the type of the values; losses in double.
#include <algorithm>
#include <type_traits>

#include "cuda/sorting_network.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kPitch = kWarp + 1;

template <int kFirst, int kLast, class Fn>
__device__ __forceinline__ void static_for(Fn&& fn) {
  if constexpr (kFirst < kLast) {
    fn(std::integral_constant<int, kFirst>{});
    static_for<kFirst + 1, kLast>(fn);
  }
}

template <Network kNet, int kWires>
struct Shape {
  static constexpr int kHalf = kWires / 2;
  static constexpr int kItems = kWarp / kWires;
  static constexpr int kLayers = sorting::layer_count(kNet, kWires);
  static constexpr int kSlots = kLayers * kHalf;
};

// fn(lo, hi, slot) of the comparators of layer kLayer; `first` is the slot of its first. The wires
// are constants of the compiler.
template <Network kNet, int kWires, int kLayer, class Fn>
__device__ __forceinline__ void for_comparators(int first, Fn&& fn) {
  constexpr Layer layer = sorting::layer_of(kNet, kWires, kLayer);
  static_for<0, layer.count>([&](auto number) {
    constexpr int c = decltype(number)::value;
    constexpr Comparator p = sorting::comparator(layer, c);
    fn(std::integral_constant<int, p.lo>{}, std::integral_constant<int, p.hi>{}, first + c);
  });
}

// Of all layers, in order or in reverse. The two kinds of layers of odd_even take turns, as many as
// there are wires: a loop of two layers.
template <Network kNet, int kWires, bool kReverse, class Fn>
__device__ __forceinline__ void for_all_comparators(int layers, Fn&& fn) {
  using S = Shape<kNet, kWires>;
  if constexpr (kNet == Network::kOddEven) {
    const int last = (layers - 1) / 2 * 2;  // -2 or 0 where there is no layer
    for (int l = kReverse ? last : 0; kReverse ? l >= 0 : l < layers; l += kReverse ? -2 : 2) {
      if (!kReverse && l < layers) for_comparators<kNet, kWires, 0>(l * S::kHalf, fn);
      if (l + 1 < layers) for_comparators<kNet, kWires, 1>((l + 1) * S::kHalf, fn);
      if (kReverse && l < layers) for_comparators<kNet, kWires, 0>(l * S::kHalf, fn);
    }
  } else {
    if (layers == 0) return;  // n = 1
    static_for<0, S::kLayers>([&](auto step) {
      constexpr int l = kReverse ? S::kLayers - 1 - decltype(step)::value : decltype(step)::value;
      for_comparators<kNet, kWires, l>(l * S::kHalf, fn);
    });
  }
}

template <Network kNet, int kWires, class R>
__global__ void __launch_bounds__(kWarp) sorting_tiny_kernel(TinyCall<R> a) {
  using S = Shape<kNet, kWires>;
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  const int n = a.net.n, absent = a.net.absent, layers = a.net.layers;
  const int lane = int(threadIdx.x), mine = lane / kWires, i = lane % kWires;
  const int row = i - absent;
  const int64_t first_item = int64_t(blockIdx.x) * S::kItems, item = first_item + mine;
  const bool real_item = item < a.items, real = real_item && row >= 0 && row < n;
  const bool with_loss = a.task == SortingTask::kLoss;
  const bool backward = a.task == SortingTask::kPermutationBackward || (with_loss && a.gx);

  R* v = reinterpret_cast<R*>(shared);  // values, later their gradient: by lane
  R* weights = v + kWarp;               // [slot][item], later dL / dalpha
  R* difference = weights + S::kSlots * S::kItems;
  R* staged = difference + S::kSlots * S::kItems;  // [wire][lane]
  R* t = staged + (with_loss ? 0 : kWires * kPitch);

  const R x = real ? a.x[item * n + row] : R(0);
  v[lane] = x;
  const unsigned sick = __ballot_sync(kFullMask, x != x);
  const bool bad = ((sick >> (mine * kWires)) & unsigned((uint64_t{1} << kWires) - 1)) != 0;
  __syncwarp();

  // Whether comparator i of layer l is there, and its wires.
  const auto find = [&](int l, Comparator* p) {
    const Layer layer = sorting::layer_of(kNet, kWires, l);
    if (i >= layer.count) return false;
    *p = sorting::comparator(layer, i);
    const int low = (p->lo < p->hi ? p->lo : p->hi) - absent;
    const int high = (p->lo < p->hi ? p->hi : p->lo) - absent;
    return low >= 0 && high < n;
  };
  for (int l = 0; l < layers; ++l) {
    Comparator p{};
    const int slot = (l * S::kHalf + i) * S::kItems + mine;
    if (find(l, &p)) {
      R &lo = v[mine * kWires + p.lo], &hi = v[mine * kWires + p.hi];
      const Mixed<R> m = mix_any(a.kind, lo, hi, a.relaxation);
      difference[slot] = stored_difference(lo, hi);
      weights[slot] = pack_weight(m);
      lo = m.lo;
      hi = m.hi;
    } else if (i < S::kHalf) {
      weights[slot] = R(0);
    }
    __syncwarp();
  }
  if (a.y && real) a.y[item * n + row] = bad ? nan_<R>() : v[lane];
  __syncwarp();  // spare: only v[lane] is written again

  R w[kWires];
#pragma unroll
  for (int k = 0; k < kWires; ++k) w[k] = k == i ? R(1) : R(0);
  for_all_comparators<kNet, kWires, false>(layers, [&](auto lo, auto hi, int c) {
    constexpr int kLo = decltype(lo)::value, kHi = decltype(hi)::value;
    const Weights<R> m = unpack_weight(weights[c * S::kItems + mine]);
    const R p = w[kLo], q = w[kHi];
    if (backward) t[c * kPitch + lane] = p - q;
    w[kLo] = m.own * p + m.other * q;
    w[kHi] = m.other * p + m.own * q;
  });

  const int64_t left = a.items - first_item;
  const int entries = int(left < S::kItems ? left : S::kItems) * n * n;
  // Where entry e of the warp's matrices, in the order of memory, is staged.
  const auto stage = [&](int e) -> R& {
    const int column = e % n, other = e / n % n, which = e / n / n;
    return staged[(column + absent) * kPitch + which * kWires + other + absent];
  };
  if (a.task == SortingTask::kPermutation) {
#pragma unroll
    for (int k = 0; k < kWires; ++k) staged[k * kPitch + lane] = bad ? nan_<R>() : w[k];
    __syncwarp();
    for (int e = lane; e < entries; e += kWarp) a.out[first_item * n * n + e] = stage(e);
    return;
  }
  if (with_loss) {
    double sum = 0;
    const R scale = R(1) / R(a.loss_kind == sorting::Loss::kBce ? n * n : n);
    const int first = real ? a.first[item * n + row] : 0;
    const int count = real && a.count ? a.count[item * n + row] : 1;
#pragma unroll
    for (int k = 0; k < kWires; ++k) {
      const int rank = k - absent;
      LossTerm<R> term{R(0), R(0)};
      if (real && rank >= 0 && rank < n) {
        term = loss_term(a.loss_kind, bad ? nan_<R>() : w[k], target_weight<R>(rank, first, count));
      }
      sum += double(term.value);
      w[k] = term.slope * scale;
    }
#pragma unroll
    for (int step = kWires / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    const double terms = a.loss_kind == sorting::Loss::kBce ? double(n) * n : double(n);
    if (real_item && i == 0) a.loss[item] = R(sum / terms);
    if (!backward) return;
  } else {
    for (int e = lane; e < entries; e += kWarp) stage(e) = a.g[first_item * n * n + e];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kWires; ++k) {
      const int rank = k - absent;
      w[k] = real && rank >= 0 && rank < n ? staged[k * kPitch + lane] : R(0);
    }
  }

  for_all_comparators<kNet, kWires, true>(layers, [&](auto lo, auto hi, int c) {
    constexpr int kLo = decltype(lo)::value, kHi = decltype(hi)::value;
    const Weights<R> m = unpack_weight(weights[c * S::kItems + mine]);
    const R p = w[kLo], q = w[kHi];
    t[c * kPitch + lane] *= p - q;
    w[kLo] = m.own * p + m.other * q;
    w[kHi] = m.other * p + m.own * q;
  });
  __syncwarp();
  for (int k = lane; k < layers * S::kHalf * S::kItems; k += kWarp) {
    const R* products = t + k / S::kItems * kPitch + k % S::kItems * kWires;
    R sum = products[0];
    for (int r = 1; r < kWires; ++r) sum += products[r];
    weights[k] = sum;
  }
  v[lane] = a.gy && real ? a.gy[item * n + row] : R(0);
  __syncwarp();
  for (int l = layers - 1; l >= 0; --l) {
    Comparator p{};
    if (find(l, &p)) {
      const int slot = (l * S::kHalf + i) * S::kItems + mine;
      const Mixed<R> m = mix_of_difference(a.kind, difference[slot], a.relaxation);
      sorting::mix_gradients(&v[mine * kWires + p.lo], &v[mine * kWires + p.hi], m.alpha, m.beta,
                             m.slope, m.d, weights[slot]);
    }
    __syncwarp();
  }
  if (real) {
    const R found = x - x == R(0) ? v[lane] : R(0);
    a.gx[item * n + row] = bad ? nan_<R>() : found;
  }
}

struct Launch {
  int64_t items;  // of a block
  size_t bytes;
};

// double, for gradient checks, is compiled for fewer wires.
template <class R>
constexpr int kMostWires = sizeof(R) == 8 ? 16 : 32;

// fn(integral constants of the network and the wires).
template <class R, class Fn>
auto with_shape(const Net& net, Fn&& fn) {
  const auto sized = [&](auto network) {
    switch (std::max(1, sorting::ceil_log2(net.n))) {
      case 1:
        return fn(network, std::integral_constant<int, 2>{});
      case 2:
        return fn(network, std::integral_constant<int, 4>{});
      case 3:
        return fn(network, std::integral_constant<int, 8>{});
      case 4:
        return fn(network, std::integral_constant<int, 16>{});
      default:
        return fn(network, std::integral_constant<int, kMostWires<R>>{});
    }
  };
  switch (net.network) {
    case Network::kBitonic:
      return sized(std::integral_constant<Network, Network::kBitonic>{});
    case Network::kOddEven:
      return sized(std::integral_constant<Network, Network::kOddEven>{});
    default:
      return sized(std::integral_constant<Network, Network::kBatcher>{});
  }
}

template <class R>
Launch launch_of(const TinyCall<R>& call) {
  const bool loss = call.task == SortingTask::kLoss;
  const bool backward = call.task == SortingTask::kPermutationBackward || (loss && call.gx);
  return with_shape<R>(call.net, [&](auto network, auto wires) {
    using S = Shape<decltype(network)::value, decltype(wires)::value>;
    int64_t count = kWarp + 2 * S::kSlots * S::kItems;
    if (!loss) count += decltype(wires)::value * kPitch;
    if (backward) count += S::kSlots * kPitch;
    return Launch{S::kItems, size_t(count) * sizeof(R)};
  });
}

}  // namespace

template <class R>
bool tiny_fits(const TinyCall<R>& call) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) - 1024;
  return call.net.n <= kMostWires<R> && launch_of(call).bytes <= size_t(most);
}
template bool tiny_fits<float>(const TinyCall<float>&);
template bool tiny_fits<double>(const TinyCall<double>&);

template <class R>
void run_tiny(const TinyCall<R>& call, void* stream) {
  const Launch shape = launch_of(call);
  with_shape<R>(call.net, [&](auto network, auto wires) {
    launch(sorting_tiny_kernel<decltype(network)::value, decltype(wires)::value, R>,
           dim3(grid_size(ceil_div(call.items, shape.items))), dim3(kWarp), shape.bytes, stream,
           call);
  });
}
template void run_tiny<float>(const TinyCall<float>&, void*);
template void run_tiny<double>(const TinyCall<double>&, void*);

}  // namespace pyloss::cuda
