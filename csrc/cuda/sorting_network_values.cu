// Values through a sorting network, n <= 4096: soft sort and its gradient.
//
//     lo' = alpha lo + beta hi, hi' = beta lo + alpha hi      alpha = f(s (hi - lo)), beta = 1 -
//     alpha
//
// Decomposition: one item per block, several where n is small (threadIdx.y); its values stay in
// shared memory, a thread takes every blockDim.x-th comparator of a layer, one barrier per layer.
// The backward visits the layers in reverse, with the gradient in shared memory; what it needs of a
// comparator is one number that the forward left in global memory, read one layer ahead.
//
// Memory traffic per item: n values in and out; with a backward, or rows to follow, one number each
// per comparator for differences and weights (n = 1024 bitonic: 113 KB each), which stay in the
// second-level cache. Latency rules: one layer is some 0.2 us, whatever n is.
//
// Accumulator: the type of the values, float or double.
#include <algorithm>

#include "cuda/sorting_network.cuh"

namespace pyloss::cuda {
namespace {

template <class R>
constexpr int kMaxThreads = sizeof(R) == 8 ? 512 : 1024;
constexpr int kBlockThreads = 128;  // that several small items share
constexpr int kLayers = 80;         // of n = 4096: 78

template <class R>
__global__ void __launch_bounds__(kMaxThreads<R>, 1)
    sorting_values_kernel(ValuesCall<R> a, int length) {
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ Layer layers[kLayers];
  __shared__ unsigned nans[kMaxWarps];  // by warp, a bit for each lane
  const Net& net = a.net;
  const int64_t item = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool real = item < a.items;
  R* v = reinterpret_cast<R*>(shared) + int64_t(threadIdx.y) * length;
  const int shift = place_shift(net);
  fill_layers(net, layers, 0, net.layers, int(threadIdx.y * blockDim.x + threadIdx.x),
              int(blockDim.x * blockDim.y));
  bool sick = false;
  for (int i = int(threadIdx.x); i < net.n && real; i += int(blockDim.x)) {
    const R x = a.x[item * net.n + i];
    v[place_of(i, shift)] = x;
    sick |= x != x;
  }
  const unsigned votes = __ballot_sync(kFullMask, sick);
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread % kWarp == 0) nans[thread / kWarp] = votes;
  __syncthreads();
  for (int l = 0; l < net.layers; ++l) {
    const Layer layer = layer_at(net, layers, l);
    for (int c = int(threadIdx.x); c < layer.count && real; c += int(blockDim.x)) {
      const Comparator p = comparator_at(net, layer, c);
      R &lo = v[place_of(p.lo, shift)], &hi = v[place_of(p.hi, shift)];
      const Mixed<R> m = mix_any(a.kind, lo, hi, a.relaxation);
      const int64_t at = (item * net.layers + l) * net.slots + c;
      if (a.difference) a.difference[at] = stored_difference(lo, hi);
      if (a.weights) a.weights[at] = pack_weight(m);
      lo = m.lo;
      hi = m.hi;
    }
    __syncthreads();
  }
  if (!real) return;
  // The item's lanes are part of one warp, or whole warps.
  const int first = int(threadIdx.y * blockDim.x), width = int(blockDim.x);
  bool nan = false;
  if (width < kWarp) {
    nan = ((nans[first / kWarp] >> (first % kWarp)) & ((1u << width) - 1)) != 0;
  } else {
    for (int k = 0; k < width / kWarp; ++k) nan |= nans[first / kWarp + k] != 0;
  }
  if (a.bad && threadIdx.x == 0) a.bad[item] = nan;
  for (int i = int(threadIdx.x); i < net.n && a.y; i += int(blockDim.x)) {
    a.y[item * net.n + i] = nan ? nan_<R>() : v[place_of(i, shift)];
  }
}

template <class R>
__global__ void __launch_bounds__(kMaxThreads<R>, 1)
    sorting_values_backward_kernel(ValuesBackward<R> a, int length) {
  PYLOSS_DYNAMIC_SHARED(uint4, shared);
  __shared__ Layer layers[kLayers];
  const Net& net = a.net;
  const int64_t item = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool real = item < a.items;
  R* g = reinterpret_cast<R*>(shared) + int64_t(threadIdx.y) * length;
  const int shift = place_shift(net);
  fill_layers(net, layers, 0, net.layers, int(threadIdx.y * blockDim.x + threadIdx.x),
              int(blockDim.x * blockDim.y));
  for (int i = int(threadIdx.x); i < net.n && real; i += int(blockDim.x)) {
    g[place_of(i, shift)] = a.gy ? a.gy[item * net.n + i] : R(0);
  }
  const R* difference = a.difference + item * net.layers * net.slots;
  const R* alpha_grad = a.alpha_grad ? a.alpha_grad + item * a.alpha_grad_stride : nullptr;
  // A layer may have fewer comparators than slots; what is read there goes unused.
  const bool ahead = real && int(threadIdx.x) < net.slots;
  R next_d{}, next_e{};
  const auto fetch = [&](int l) {
    const int64_t at = int64_t(l) * net.slots + threadIdx.x;
    next_d = difference[at];
    if (alpha_grad) next_e = alpha_grad[at];
  };
  if (ahead && net.layers > 0) fetch(net.layers - 1);
  __syncthreads();
  for (int l = net.layers - 1; l >= 0; --l) {
    const Layer layer = layer_at(net, layers, l);
    R d = next_d, e = next_e;
    if (ahead && l > 0) fetch(l - 1);
    for (int c = int(threadIdx.x); c < layer.count && real; c += int(blockDim.x)) {
      if (c != int(threadIdx.x)) {
        const int64_t at = int64_t(l) * net.slots + c;
        d = difference[at];
        e = alpha_grad ? alpha_grad[at] : R(0);
      }
      const Comparator p = comparator_at(net, layer, c);
      const Mixed<R> m = mix_of_difference(a.kind, d, a.relaxation);
      sorting::mix_gradients(&g[place_of(p.lo, shift)], &g[place_of(p.hi, shift)], m.alpha, m.beta,
                             m.slope, m.d, e);
    }
    __syncthreads();
  }
  for (int i = int(threadIdx.x); i < net.n && real; i += int(blockDim.x)) {
    const R x = a.x[item * net.n + i];
    const R found = x - x == R(0) ? g[place_of(i, shift)] : R(0);  // none to an infinite input
    a.gx[item * net.n + i] = a.bad[item] ? nan_<R>() : found;
  }
}

struct Shape {
  dim3 grid, block;
  int length;
  size_t bytes;
};

template <class R>
Shape shape_of(const Net& net, int64_t items) {
  int threads = 1;
  while (threads < net.slots && threads < kMaxThreads<R>) threads *= 2;
  const int together = std::max(1, kBlockThreads / threads);
  // Odd, so that small items side by side lie in different banks.
  const int length = net.n <= 32 ? net.n | 1 : place_count(net);
  return {dim3(grid_size(ceil_div(items, together))), dim3(unsigned(threads), unsigned(together)),
          length, size_t(length) * size_t(together) * sizeof(R)};
}

}  // namespace

template <class R>
void values_forward(const ValuesCall<R>& call, void* stream) {
  const Shape s = shape_of<R>(call.net, call.items);
  launch(sorting_values_kernel<R>, s.grid, s.block, s.bytes, stream, call, s.length);
}
template void values_forward<float>(const ValuesCall<float>&, void*);
template void values_forward<double>(const ValuesCall<double>&, void*);

template <class R>
void values_backward(const ValuesBackward<R>& call, void* stream) {
  const Shape s = shape_of<R>(call.net, call.items);
  launch(sorting_values_backward_kernel<R>, s.grid, s.block, s.bytes, stream, call, s.length);
}
template void values_backward<float>(const ValuesBackward<float>&, void*);
template void values_backward<double>(const ValuesBackward<double>&, void*);

}  // namespace pyloss::cuda
