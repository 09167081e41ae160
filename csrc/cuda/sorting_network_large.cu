// Values and features through networks of 4096 < n <= 2^24 wires. Formulas:
// sorting_network_tiles.cu.
//
// Decomposition: passes over arrays of one number per wire in global memory. A pass fuses
//   bitonic    all layers at distances below 2048, for which an aligned window of 4096 wires in
//              shared memory is closed (block per window, a barrier per layer): at n = 2^20 the
//              first 78 layers, then 12 layers of each of 8 blocks, with 36 single layers between;
//   odd_even   512 layers, in windows of 4096 wires of which the inner 3072 are right at the end;
// and a layer of any other kind, or network, is a pass of its own, a thread per comparator.
// Features go column by column. Reverse sweeps take the passes, and the layers of each, in reverse.
//
// Memory traffic of a pass: the wires read and written, 8 bytes (float); per comparator 4 bytes for
// the difference it leaves or reads, 4 for t, 8 for dL/dalpha. These three arrays over comparators
// are the scratch memory: at n = 2^20 bitonic 440 MB each. Soft sort alone needs none of them.
//
// Accumulator: the type of the values. dL/dalpha adds the columns in their order; no atomics.
#include <algorithm>
#include <vector>

#include "cuda/atomic.cuh"
#include "cuda/sorting_network.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kWindow = 4096, kHalo = 512;
constexpr int kThreads = 512, kSingleThreads = 256;
constexpr int kLayers = 80;  // of a window of 4096: 78
constexpr int kMostBlocks = 2048;

enum class Sweep { kValues, kRows, kRowsBackward, kValuesBackward };

struct Pass {
  int first, last;  // layers
  bool fused, reversed;
};

template <class R>
struct Large {
  Net net;
  Distribution kind;
  Relaxation<R> relaxation;
  R *difference, *t, *alpha_grad;
};

// A comparator of the sweep. `at`: its number among those of all items; others than the owner only
// compute what the owner's neighbours need.
template <class R>
__device__ void compare(const Large<R>& a, Sweep sweep, R& lo, R& hi, int64_t at, bool owner) {
  if (sweep == Sweep::kValues) {
    if (a.difference && owner) a.difference[at] = stored_difference(lo, hi);
    const Mixed<R> m = mix_any(a.kind, lo, hi, a.relaxation);
    lo = m.lo;
    hi = m.hi;
    return;
  }
  const Mixed<R> m = mix_of_difference(a.kind, a.difference[at], a.relaxation);
  if (sweep == Sweep::kValuesBackward) {
    sorting::mix_gradients(&lo, &hi, m.alpha, m.beta, m.slope, m.d,
                           a.alpha_grad ? a.alpha_grad[at] : R(0));
    return;
  }
  const R x = lo, y = hi;
  if (owner && a.t) {
    if (sweep == Sweep::kRows) {
      a.t[at] = x - y;
    } else {
      a.alpha_grad[at] += (x - y) * a.t[at];
    }
  }
  lo = m.alpha * x + m.beta * y;
  hi = m.beta * x + m.alpha * y;
}

// `from` and `to` may be one array, but for odd_even.
template <class R>
__global__ void __launch_bounds__(kThreads, 1)
    sorting_window_kernel(Large<R> a, Sweep sweep, Pass pass, const R* from, R* to) {
  __shared__ R v[kWindow];
  __shared__ Layer layers[kLayers];
  const Net& net = a.net;
  const int64_t item = blockIdx.y;
  int inner, inner_end, begin, end;  // wires to write, wires in the window
  if (net.network == Network::kOddEven) {
    inner = int(blockIdx.x) * (kWindow - 2 * kHalo);
    inner_end = std::min(inner + kWindow - 2 * kHalo, net.n);
    begin = std::max(inner - kHalo, 0);
    end = std::min(inner_end + kHalo, net.n);
  } else {
    begin = inner = std::max(int(blockIdx.x) * kWindow - net.absent, 0);
    end = inner_end = int(blockIdx.x + 1) * kWindow - net.absent;  // none where it is below 0
  }
  fill_layers(net, layers, pass.first, pass.last, int(threadIdx.x), kThreads);
  for (int i = begin + int(threadIdx.x); i < end; i += kThreads)
    v[i - begin] = from[item * net.n + i];
  __syncthreads();
  for (int step = 0; step < pass.last - pass.first; ++step) {
    const int l = pass.reversed ? pass.last - 1 - step : pass.first + step;
    const Layer layer = layer_at(net, layers, l, pass.first);
    int c, c_end;
    if (net.network == Network::kOddEven) {
      c = (begin - layer.shift + 1) / 2;
      c_end = (end - layer.shift) / 2;
    } else {
      c = std::max(int(blockIdx.x) * (kWindow / 2) - layer.skip, 0);
      c_end = std::min(int(blockIdx.x + 1) * (kWindow / 2) - layer.skip, layer.count);
    }
    for (c += int(threadIdx.x); c < c_end; c += kThreads) {
      const Comparator p = comparator_at(net, layer, c);
      const int low = std::min(p.lo, p.hi);
      compare(a, sweep, v[p.lo - begin], v[p.hi - begin], (item * net.layers + l) * net.slots + c,
              low >= inner && low < inner_end);
    }
    __syncthreads();
  }
  for (int i = inner + int(threadIdx.x); i < inner_end; i += kThreads) {
    to[item * net.n + i] = v[i - begin];
  }
}

template <class R>
__global__ void __launch_bounds__(kSingleThreads)
    sorting_layer_kernel(Large<R> a, Sweep sweep, int l, R* values) {
  __shared__ Layer layers[1];
  fill_layers(a.net, layers, l, l + 1, int(threadIdx.x), kSingleThreads);
  __syncthreads();
  const Layer layer = layer_at(a.net, layers, l, l);
  const int64_t item = blockIdx.y;
  R* v = values + item * a.net.n;
  const int step = int(gridDim.x) * kSingleThreads;
  for (int c = int(blockIdx.x) * kSingleThreads + int(threadIdx.x); c < layer.count; c += step) {
    const Comparator p = comparator_at(a.net, layer, c);
    compare(a, sweep, v[p.lo], v[p.hi], (item * a.net.layers + l) * a.net.slots + c, true);
  }
}

template <class R>
__global__ void __launch_bounds__(kSingleThreads) sorting_fill_kernel(R* values, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kSingleThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSingleThreads + threadIdx.x; i < count; i += step) {
    values[i] = R(0);
  }
}

// bad[item] = 1 if there is a NaN; all that write it write the same.
template <class R>
__global__ void __launch_bounds__(kSingleThreads)
    sorting_find_nan_kernel(const R* x, int n, int32_t* bad) {
  const int64_t item = blockIdx.y;
  const int step = int(gridDim.x) * kSingleThreads;
  for (int i = int(blockIdx.x) * kSingleThreads + int(threadIdx.x); i < n; i += step) {
    const R v = x[item * n + i];
    if (v != v) store_relaxed(bad + item, 1);
  }
}

// Numbers of n wires, `stride` apart; from item to item `item_stride`.
template <class T>
struct Column {
  T* p;
  int64_t item_stride, stride;
};

// With `bad`, a NaN to every wire of a bad item; with `x`, zero to infinite wires.
template <class R>
__global__ void __launch_bounds__(kSingleThreads)
    sorting_copy_kernel(Column<const R> from, Column<R> to, int n, const int32_t* bad, const R* x) {
  const int64_t item = blockIdx.y;
  const int step = int(gridDim.x) * kSingleThreads;
  for (int i = int(blockIdx.x) * kSingleThreads + int(threadIdx.x); i < n; i += step) {
    R v = from.p ? from.p[item * from.item_stride + i * from.stride] : R(0);
    if (x && x[item * n + i] - x[item * n + i] != R(0)) v = R(0);
    to.p[item * to.item_stride + i * to.stride] = bad && bad[item] ? nan_<R>() : v;
  }
}

std::vector<Pass> passes_of(const Net& net, bool reversed) {
  std::vector<Pass> passes;
  for (int l = 0; l < net.layers;) {
    int end = l;
    if (net.network == Network::kOddEven) {
      end = std::min(l + kHalo, net.layers);
    } else if (net.network == Network::kBitonic) {
      while (end < net.layers &&
             sorting::layer_of(net.network, net.n, end).distance <= kWindow / 2) {
        ++end;
      }
    }
    passes.push_back({l, std::max(end, l + 1), end > l, reversed});
    l = passes.back().last;
  }
  if (reversed) std::reverse(passes.begin(), passes.end());
  return passes;
}

template <class R>
class Run {
 public:
  Run(const LargeCall<R>& call, void* stream) : c_(call), stream_(stream) {
    device_ = {c_.net, c_.kind, c_.relaxation, c_.difference, nullptr, nullptr};
    fill(c_.bad, c_.items);
    launch(sorting_find_nan_kernel<R>, over(c_.net.n), dim3(kSingleThreads), 0, stream_, c_.x,
           c_.net.n, c_.bad);
  }

  // From x to the sorted values in a buffer.
  R* values() {
    copy(rows(c_.x), rows(c_.a), nullptr, nullptr);
    return sweep(Sweep::kValues, false);
  }
  void backward(const R* gy, const R* alpha_grad) {
    copy(rows(gy), rows(c_.a), nullptr, nullptr);
    device_.alpha_grad = const_cast<R*>(alpha_grad);
    copy(rows(static_cast<const R*>(sweep(Sweep::kValuesBackward, true))), rows(c_.gx), c_.bad,
         c_.x);
  }
  // Column k of f through the layers; t is kept if there is room for it.
  R* features(int64_t k, R* t) {
    copy(column(c_.f, k, c_.one_f), rows(c_.a), nullptr, nullptr);
    device_.t = t;
    return sweep(Sweep::kRows, c_.reversed);
  }
  void features_backward(int64_t k) {
    copy(column(c_.g, k, false), rows(c_.a), nullptr, nullptr);
    device_.alpha_grad = c_.alpha_grad;
    const R* found = sweep(Sweep::kRowsBackward, !c_.reversed);
    if (c_.gf) copy(rows(found), column(c_.gf, k, false), c_.bad, nullptr);
  }
  void store(const R* buffer, Column<R> to) { copy(rows(buffer), to, c_.bad, nullptr); }

  template <class T>
  Column<T> rows(T* p) const {
    return {p, c_.net.n, 1};
  }
  template <class T>
  Column<T> column(T* p, int64_t k, bool one) const {
    return {p + k, one ? 0 : c_.net.n * c_.width, c_.width};
  }
  template <class T>
  void fill(T* p, int64_t count) {
    const int64_t blocks = std::clamp<int64_t>(ceil_div(count, kSingleThreads), 1, kMostBlocks);
    launch(sorting_fill_kernel<T>, dim3(unsigned(blocks)), dim3(kSingleThreads), 0, stream_, p,
           count);
  }

 private:
  dim3 over(int64_t count) const {
    const int64_t blocks = std::clamp<int64_t>(ceil_div(count, kSingleThreads), 1, kMostBlocks);
    return dim3(unsigned(blocks), unsigned(c_.items));
  }
  void copy(Column<const R> from, Column<R> to, const int32_t* bad, const R* x) {
    launch(sorting_copy_kernel<R>, over(c_.net.n), dim3(kSingleThreads), 0, stream_, from, to,
           c_.net.n, bad, x);
  }

  // From buffer a; returns the one that holds the result.
  R* sweep(Sweep kind, bool reversed) {
    R *now = c_.a, *other = c_.b;
    const bool odd_even = c_.net.network == Network::kOddEven;
    const int inner = odd_even ? kWindow - 2 * kHalo : kWindow;
    for (const Pass& pass : passes_of(c_.net, reversed)) {
      if (!pass.fused) {
        launch(sorting_layer_kernel<R>, over(c_.net.slots), dim3(kSingleThreads), 0, stream_,
               device_, kind, pass.first, now);
        continue;
      }
      R* to = odd_even ? other : now;
      launch(sorting_window_kernel<R>,
             dim3(unsigned(ceil_div(c_.net.n + c_.net.absent, inner)), unsigned(c_.items)),
             dim3(kThreads), 0, stream_, device_, kind, pass, static_cast<const R*>(now), to);
      if (odd_even) std::swap(now, other);
    }
    return now;
  }

  const LargeCall<R>& c_;
  void* stream_;
  Large<R> device_;
};

}  // namespace

template <class R>
void large_sort(const LargeCall<R>& call, void* stream) {
  Run<R> run(call, stream);
  const R* found = run.values();
  run.store(found, run.rows(call.y));
}

template <class R>
void large_sort_backward(const LargeCall<R>& call, void* stream) {
  Run<R> run(call, stream);
  run.values();
  run.backward(call.gy, nullptr);
}

template <class R>
void large_apply(const LargeCall<R>& call, void* stream) {
  Run<R> run(call, stream);
  run.values();
  for (int64_t k = 0; k < call.width; ++k) {
    const R* found = run.features(k, nullptr);
    run.store(found, run.column(call.out, k, false));
  }
}

template <class R>
void large_apply_backward(const LargeCall<R>& call, void* stream) {
  Run<R> run(call, stream);
  run.values();
  run.fill(call.alpha_grad, call.items * call.net.comparators());
  for (int64_t k = 0; k < call.width; ++k) {
    run.features(k, call.t);
    run.features_backward(k);
  }
  run.backward(nullptr, call.alpha_grad);
}

#define PYLOSS_INSTANTIATE(R)                                       \
  template void large_sort<R>(const LargeCall<R>&, void*);          \
  template void large_sort_backward<R>(const LargeCall<R>&, void*); \
  template void large_apply<R>(const LargeCall<R>&, void*);         \
  template void large_apply_backward<R>(const LargeCall<R>&, void*);
PYLOSS_INSTANTIATE(float)
PYLOSS_INSTANTIATE(double)
#undef PYLOSS_INSTANTIATE

}  // namespace pyloss::cuda
