// Differentiable sorting networks on the device: which kernel does what.
//
//     n        values    features (P^T f, P f)   P and fused losses
//     <= 32    _values   _tiles                  _tiny (double: <= 16), one launch for all
//     <= 4096  _values   _tiles                  _tiles
//     <= 2^24  _large    _large                  not here
//
// With _tiles: values_forward leaves the weights of all comparators, _tiles pushes rows through
// them and back, sum_groups_kernel adds the partial dL/dalpha of its blocks, values_backward ends
// at dL/dx. A fused loss is the same with the loss between forward and reverse of a tile: P is
// never in global memory. Items are worked off in groups where the scratch memory would pass a
// limit.
//
// Expected time, by formula, of the fused loss at (64, 1024), bitonic, float32, on an H200 (132
// SMs, 1.755 GHz, 128 bytes of shared memory a clock and SM); not measured, written without a GPU.
// Mixes: 64 * 1024 rows * 9217 (light cone; 28160 without) = 6.0e8. A mix moves 2 * 20 bytes of
// shared memory: 24 GB at 29.6 TB/s, 0.82 ms, which bounds it. Beside that: about 30 instructions a
// mix, 0.6 ms at the full rate, in the same time; weights and dL/dalpha, 16 bytes per comparator
// and tile of 4 rows, 2.4 GB through the second-level cache, 0.5 ms at 5 TB/s; the loss, 6.7e7
// entries of about 60 instructions, 0.14 ms; the two value sweeps, 110 layers of 0.5 us with 64
// blocks, 0.06 ms. With half of the rate for barriers and latency, at 16 warps an SM: about 2 ms.
//
// Accumulators: as _values and _tiles say; losses in double.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/sorting_network.cuh"

namespace pyloss::cuda {
namespace {

constexpr int64_t kScratchLimit = int64_t{1} << 30;
constexpr int kThreads = 256;
constexpr int kMostBlocks = 4096;

// first[item][c] = sum over groups, in their order.
template <class R>
__global__ void __launch_bounds__(kThreads)
    sorting_sum_groups_kernel(R* partial, int64_t items, int groups, int64_t count) {
  const int64_t total = items * count, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    R* p = partial + i / count * groups * count + i % count;
    R sum = p[0];
    for (int k = 1; k < groups; ++k) sum += p[k * count];
    p[0] = sum;
  }
}

// out[i] (+)= sum over items of partial[item][i], in their order.
template <class R>
__global__ void __launch_bounds__(kThreads)
    sorting_sum_items_kernel(const R* partial, int64_t items, int64_t count, bool add, R* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    R sum = add ? out[i] : R(0);
    for (int64_t k = 0; k < items; ++k) sum += partial[k * count + i];
    out[i] = sum;
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    sorting_mean_loss_kernel(const double* partial, int64_t items, int groups, double terms,
                             R* loss) {
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= items) return;
  double sum = 0;
  for (int k = 0; k < groups; ++k) sum += partial[item * groups + k];
  loss[item] = R(sum / terms);
}

dim3 blocks_over(int64_t count) {
  return dim3(unsigned(std::clamp<int64_t>(ceil_div(count, kThreads), 1, kMostBlocks)));
}

// Where the buffers of one group of items lie in the scratch memory.
class Room {
 public:
  explicit Room(void* base) : base_(static_cast<char*>(base)) {}
  // Null while sizes are only added up.
  template <class T>
  T* take(int64_t count) {
    int64_t bytes;
    if (__builtin_mul_overflow(count, int64_t(sizeof(T)), &bytes) ||
        bytes > INT64_MAX / 4 - used_) {
      throw std::invalid_argument("n: too much scratch memory");
    }
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

bool is_backward(SortingTask t) {
  return t == SortingTask::kSortBackward || t == SortingTask::kApplyBackward ||
         t == SortingTask::kPermutationBackward;
}
bool is_apply(SortingTask t) {
  return t == SortingTask::kApply || t == SortingTask::kApplyBackward;
}
// Networks with a table cannot be unrolled at compile time.
bool may_be_tiny(const sorting::Problem& p, const SortingCall& c) {
  return p.n <= kSortingTinyRow && p.network != Network::kSplitter &&
         c.task >= SortingTask::kPermutation;
}

template <class R>
const R* at_item(const void* p, int64_t item, int64_t size) {
  return p ? static_cast<const R*>(p) + item * size : nullptr;
}
template <class R>
R* at_item(void* p, int64_t item, int64_t size) {
  return p ? static_cast<R*>(p) + item * size : nullptr;
}

// One group of `items` items: first, ..., of a problem; lays out scratch memory, and with `run`
// enqueues the work.
template <class R>
class Group {
 public:
  Group(const sorting::Problem& p, const SortingCall& c, int64_t first, int64_t items)
      : p_(p), c_(c), first_(first), items_(items), net_(make_net(p)) {
    relaxation_ = {R(p.steepness), R(p.art_lambda)};
  }

  int64_t work(void* scratch, bool run, void* stream) {
    Room room(scratch);
    if (may_be_tiny(p_, c_) && tiny_fits(tiny_call())) {
      if (run) run_tiny(tiny_call(), stream);
    } else if (p_.n > kSortingMaxRow) {
      large(room, run, stream);
    } else {
      rows(room, run, stream);
    }
    return room.used();
  }

 private:
  const R* x() const { return at_item<R>(p_.x, first_, p_.n); }

  TinyCall<R> tiny_call() const {
    TinyCall<R> t{};
    t.net = net_;
    t.kind = p_.distribution;
    t.relaxation = relaxation_;
    t.task = c_.task;
    t.loss_kind = c_.loss_kind;
    t.items = items_;
    t.x = x();
    t.g = at_item<R>(c_.g, first_, p_.n * p_.n);
    t.gy = at_item<R>(c_.gy, first_, p_.n);
    t.first = at_item<int32_t>(c_.first, first_, p_.n);
    t.count = at_item<int32_t>(c_.count, first_, p_.n);
    t.y = at_item<R>(c_.y, first_, p_.n);
    t.out = at_item<R>(c_.out, first_, p_.n * p_.n);
    t.loss = at_item<R>(c_.loss, first_, 1);
    t.gx = at_item<R>(c_.gx, first_, p_.n);
    return t;
  }

  void rows(Room& room, bool run, void* stream) {
    const SortingTask task = c_.task;
    const bool sort = task == SortingTask::kSort || task == SortingTask::kSortBackward;
    const bool loss = task == SortingTask::kLoss;
    const bool backward = is_backward(task) || (loss && c_.gx);
    const int64_t all = items_ * net_.comparators();

    ValuesCall<R> v{net_,    p_.distribution,           relaxation_, items_, x(), nullptr, nullptr,
                    nullptr, room.take<int32_t>(items_)};
    v.y = at_item<R>(c_.y, first_, p_.n);
    if (!sort) v.weights = room.take<R>(all);
    if (backward) v.difference = room.take<R>(all);

    TileCall<R> t{};
    R* gf_items = nullptr;
    if (!sort) {
      t.net = net_;
      t.identity = !is_apply(task);
      t.reversed = is_apply(task) && !c_.features.transpose;
      t.mode = loss ? TileMode::kLoss : backward ? TileMode::kBackward : TileMode::kForward;
      t.one_f = c_.features.shared;
      t.want_t = backward;
      t.loss_kind = c_.loss_kind;
      t.items = items_;
      t.rows = is_apply(task) ? c_.features.width : p_.n;
      t.weights = v.weights;
      t.bad = v.bad;
      const int64_t entries = p_.n * t.rows;
      t.f = c_.features.shared ? static_cast<const R*>(c_.features.f)
                               : at_item<R>(c_.features.f, first_, entries);
      t.g = at_item<R>(c_.g, first_, entries);
      t.out = at_item<R>(c_.out, first_, entries);
      t.first = at_item<int32_t>(c_.first, first_, p_.n);
      t.count = at_item<int32_t>(c_.count, first_, p_.n);
      const int64_t limit = c_.scratch_limit > 0 ? c_.scratch_limit : kScratchLimit;
      plan_tiles(&t, limit / 2);
      const int64_t blocks = items_ * t.groups;
      if (loss) t.loss = room.take<double>(blocks);
      if (backward) t.alpha_grad = room.take<R>(blocks * net_.comparators());
      if (backward && !t.t_shared) t.t = room.take<R>(blocks * t.t_capacity);
      if (t.segmented) t.checkpoints = room.take<R>(blocks * t.checkpoint_capacity);
      t.gf = at_item<R>(c_.gf, first_, entries);
      if (c_.gf && c_.features.shared) t.gf = gf_items = room.take<R>(items_ * entries);
    }
    if (!run) return;

    values_forward(v, stream);
    if (!sort && t.rows > 0) run_tiles(t, stream);
    if (loss) {
      const double terms = c_.loss_kind == sorting::Loss::kBce ? double(p_.n) * p_.n : double(p_.n);
      launch(sorting_mean_loss_kernel<R>, dim3(grid_size(ceil_div(items_, kThreads))),
             dim3(kThreads), 0, stream, static_cast<const double*>(t.loss), items_, t.groups, terms,
             at_item<R>(c_.loss, first_, 1));
    }
    if (gf_items) sum_items(gf_items, p_.n * t.rows, stream);
    if (!backward) return;
    // Without features there is no tile that would have written alpha_grad.
    const bool by_rows = !sort && t.rows > 0;
    if (by_rows && t.groups > 1 && all > 0) {
      launch(sorting_sum_groups_kernel<R>, blocks_over(all), dim3(kThreads), 0, stream,
             t.alpha_grad, items_, t.groups, net_.comparators());
    }
    const ValuesBackward<R> b{net_,
                              p_.distribution,
                              relaxation_,
                              items_,
                              x(),
                              at_item<R>(c_.gy, first_, p_.n),
                              v.difference,
                              by_rows ? t.alpha_grad : nullptr,
                              t.groups * net_.comparators(),
                              v.bad,
                              at_item<R>(c_.gx, first_, p_.n)};
    values_backward(b, stream);
  }

  void sum_items(const R* partial, int64_t count, void* stream) {
    if (count == 0) return;
    launch(sorting_sum_items_kernel<R>, blocks_over(count), dim3(kThreads), 0, stream, partial,
           items_, count, first_ > 0, static_cast<R*>(c_.gf));
  }

  void large(Room& room, bool run, void* stream) {
    const SortingTask task = c_.task;
    LargeCall<R> l{};
    l.net = net_;
    l.kind = p_.distribution;
    l.relaxation = relaxation_;
    l.items = items_;
    l.width = c_.features.width;
    l.reversed = !c_.features.transpose;
    l.one_f = c_.features.shared;
    l.x = x();
    l.gy = at_item<R>(c_.gy, first_, p_.n);
    const int64_t entries = p_.n * c_.features.width, all = items_ * net_.comparators();
    l.f = c_.features.shared ? static_cast<const R*>(c_.features.f)
                             : at_item<R>(c_.features.f, first_, entries);
    l.g = at_item<R>(c_.g, first_, entries);
    l.y = at_item<R>(c_.y, first_, p_.n);
    l.out = at_item<R>(c_.out, first_, entries);
    l.gx = at_item<R>(c_.gx, first_, p_.n);
    l.gf = at_item<R>(c_.gf, first_, entries);
    l.bad = room.take<int32_t>(items_);
    l.a = room.take<R>(items_ * p_.n);
    l.b = room.take<R>(items_ * p_.n);
    if (task != SortingTask::kSort) l.difference = room.take<R>(all);
    if (task == SortingTask::kApplyBackward) {
      l.t = room.take<R>(all);
      l.alpha_grad = room.take<R>(all);
      if (c_.gf && c_.features.shared) l.gf = room.take<R>(items_ * entries);
    }
    if (!run) return;
    switch (task) {
      case SortingTask::kSort:
        return large_sort(l, stream);
      case SortingTask::kSortBackward:
        return large_sort_backward(l, stream);
      case SortingTask::kApply:
        return large_apply(l, stream);
      default:
        large_apply_backward(l, stream);
        if (c_.gf && c_.features.shared) sum_items(l.gf, entries, stream);
    }
  }

  const sorting::Problem& p_;
  const SortingCall& c_;
  int64_t first_, items_;
  Net net_;
  Relaxation<R> relaxation_;
};

void check(const sorting::Problem& p, const SortingCall& c) {
  if (p.dtype != DType::kF32 && p.dtype != DType::kF64) {
    throw std::invalid_argument("dtype: float32 or float64");
  }
  if (p.items < 0) throw std::invalid_argument("items: negative");
  if (p.n < 1 || p.n > kSortingMaxWires) {
    throw std::invalid_argument("n: " + std::to_string(p.n) + " is not between 1 and 2^24");
  }
  if (p.n > kSortingMaxRow && c.task >= SortingTask::kPermutation) {
    throw std::invalid_argument("n: more than 4096 wires, in P or a fused loss");
  }
  if (is_apply(c.task) && (c.features.width < 0 || c.features.width > INT32_MAX)) {
    throw std::invalid_argument("width: " + std::to_string(c.features.width));
  }
  if (p.network == Network::kSplitter) {
    if (p.layers < 0 || !p.offsets) {
      throw std::invalid_argument("offsets: missing");
    }
  }
}

template <class R>
int64_t bytes_of(const sorting::Problem& p, const SortingCall& c, int64_t items) {
  return Group<R>(p, c, 0, items).work(nullptr, false, nullptr);
}

// The most items that keep within the limit, by halves.
template <class R>
int64_t group_items(const sorting::Problem& p, const SortingCall& c, int64_t* bytes) {
  const int64_t limit = c.scratch_limit > 0 ? c.scratch_limit : kScratchLimit;
  // Grid dimensions of large problems.
  int64_t items = p.n > kSortingMaxRow ? std::min<int64_t>(p.items, 65535) : p.items;
  *bytes = bytes_of<R>(p, c, items);
  while (items > 1 && *bytes > limit) {
    items = (items + 1) / 2;
    *bytes = bytes_of<R>(p, c, items);
  }
  // The last group may have more blocks per item.
  if (p.items % items) *bytes = std::max(*bytes, bytes_of<R>(p, c, p.items % items));
  return items;
}

template <class R>
void run_groups(const sorting::Problem& p, const SortingCall& c, void* scratch,
                int64_t scratch_bytes, void* stream) {
  int64_t bytes = 0;
  const int64_t items = group_items<R>(p, c, &bytes);
  if (scratch_bytes < bytes || (bytes > 0 && !scratch)) {
    throw std::invalid_argument("scratch: too small");
  }
  for (int64_t first = 0; first < p.items; first += items) {
    Group<R>(p, c, first, std::min(items, p.items - first)).work(scratch, true, stream);
  }
}

}  // namespace

int64_t sorting_scratch_bytes(const sorting::Problem& p, const SortingCall& call) {
  check(p, call);
  if (p.items == 0) return 0;
  int64_t bytes = 0;
  if (p.dtype == DType::kF64) {
    group_items<double>(p, call, &bytes);
  } else {
    group_items<float>(p, call, &bytes);
  }
  return bytes;
}

void sorting_run(const sorting::Problem& p, const SortingCall& call, void* scratch,
                 int64_t scratch_bytes, void* stream) {
  check(p, call);
  if (p.items == 0) return;
  if (p.dtype == DType::kF64) {
    run_groups<double>(p, call, scratch, scratch_bytes, stream);
  } else {
    run_groups<float>(p, call, scratch, scratch_bytes, stream);
  }
}

}  // namespace pyloss::cuda
