// What the host half of each op asks the CUDA runtime for: on which device and stream, never for
// memory, a copy or a wait; and every call that fails becomes an error that leaves nothing behind.
#include "cuda/aldr.h"
#include "cuda/betti_matching.h"
#include "cuda/device.h"
#include "cuda/lion_k.h"
#include "cuda/margin_shift.h"
#include "cuda/permutahedron.h"
#include "cuda/row_moments.h"
#include "cuda/row_softmax.h"
#include "cuda/segment.h"
#include "cuda/sorting_network.h"
#include "cuda_runtime.h"

namespace {

using namespace pyloss;
int checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed) std::printf("FAILED %s\n", what.c_str());
}

// Memory for a call, aligned as torch aligns it.
struct Memory {
  std::vector<double> room;
  explicit Memory(int64_t bytes) : room(size_t(bytes) / 8 + 64, 0.25) {}
  void* at() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 255) / 256 * 256);
  }
};

struct Op {
  std::string name;
  std::function<void(void* stream)> call;
};

// ---- The ops, each with every path of its host half that allocates, queries or launches --------

void row_softmax(std::vector<Op>* ops, int64_t rows, int64_t classes, Reduction reduction,
                 DType dtype) {
  const std::string name = "row_softmax " + std::to_string(rows) + " x " + std::to_string(classes);
  auto x = std::make_shared<Memory>(rows * classes * 8);
  auto grad = std::make_shared<Memory>(rows * classes * 8);
  auto rest = std::make_shared<Memory>(rows * 8 * 8);
  auto stats = std::make_shared<Memory>(rows * 8 * 8);
  auto norm = std::make_shared<Memory>(kNormCount * 8);
  auto labels = std::make_shared<std::vector<int64_t>>(size_t(rows), 1);
  RowSoftmaxProblem p{};
  p.outer = rows, p.inner = 1, p.classes = classes, p.dtype = dtype;
  p.x = x->at(), p.x_strides = {classes, 1, 1};
  p.target = labels->data(), p.target_dtype = DType::kI64, p.target_strides = {1, 1, 1};
  p.options.logit_scale = p.options.temperature = p.options.tau = 1;
  p.options.max_nll = HUGE_VAL, p.options.ignore_index = -100;
  p.options.reduction = reduction;
  RowSoftmaxForward f{};
  f.loss = rest->at(), f.loss_dtype = DType::kF32, f.stats = stats->at(), f.norm = norm->at();
  if (reduction != Reduction::kNone) f.grad = grad->at(), f.grad_strides = {classes, 1, 1};
  RowSoftmaxBackward b{};
  b.grad_loss = rest->at(), b.stats = stats->at(), b.norm = norm->at();
  b.grad = grad->at(), b.grad_strides = {classes, 1, 1};
  RowSoftmaxHvp h{};
  h.backward = b, h.v = x->at(), h.v_strides = {classes, 1, 1}, h.grad_rows = rest->at();
  ops->push_back({name + " forward", [=, keep = std::array{x, grad, rest, stats, norm}](void* s) {
                    (void)labels, (void)keep;
                    const int64_t bytes = cuda::row_softmax_scratch_bytes(p);
                    Memory scratch(bytes);
                    cuda::row_softmax_forward(p, f, scratch.at(), bytes, s);
                  }});
  ops->push_back({name + " backward", [=](void* s) { cuda::row_softmax_backward(p, b, s); }});
  ops->push_back({name + " hvp", [=](void* s) { cuda::row_softmax_hvp(p, h, s); }});
  ops->push_back({name + " scale", [=](void* s) {
                    cuda::scale_inplace(grad->at(), dtype, rows * classes, norm->at(), s);
                  }});
}

void row_moments_ops(std::vector<Op>* ops, int64_t classes, int64_t inner) {
  const int64_t rows = 3 * inner;
  auto x = std::make_shared<Memory>(rows * classes * 4);
  auto out = std::make_shared<Memory>(rows * classes * 4);
  auto moments = std::make_shared<Memory>(row_moments::kCount * rows * 4);
  auto labels = std::make_shared<std::vector<int64_t>>(size_t(rows), 1);
  row_moments::Problem p{};
  p.outer = 3, p.classes = classes, p.inner = inner, p.dtype = DType::kF32;
  p.x = x->at(), p.x_strides = {classes * inner, inner, 1};
  p.target = labels->data(), p.target_dtype = DType::kI64, p.ignore_index = -100;
  const row_moments::Backward b{moments->at(), moments->at(), out->at(), p.x_strides};
  const std::string name = "row_moments " + std::to_string(classes);
  ops->push_back({name + " forward", [=](void* s) {
                    (void)x, (void)labels;
                    cuda::row_moments_forward(p, moments->at(), s);
                  }});
  ops->push_back({name + " backward", [=](void* s) {
                    (void)x, (void)labels, (void)moments, (void)out;
                    cuda::row_moments_backward(p, b, s);
                  }});
}

// 65 columns: a segment of 70 rows is a long one.
void segment_ops(std::vector<Op>* ops, int64_t width) {
  constexpr int64_t kRows = 90;
  const auto memory = [](int64_t n) { return std::make_shared<Memory>(n * 8); };
  auto x = memory(kRows * width), out = memory(kRows * width), numbers = memory(2 * width);
  auto offsets = std::make_shared<std::vector<int64_t>>(std::vector<int64_t>{0, 20, kRows});
  segment::Problem p{};
  p.rows = kRows, p.width = width, p.segments = 2;
  p.dtype = DType::kF32, p.offsets_dtype = DType::kI64;
  p.x = x->at(), p.x_stride = width, p.offsets = offsets->data();
  for (const void*& g : p.given) g = numbers->at();
  auto scratch = memory(segment::windows(p) * 2 * segment::kPartNumbers * width);
  const std::string name = "segment " + std::to_string(width);
  ops->push_back({name + " fold", [=](void* s) {
                    (void)x, (void)offsets, (void)numbers;
                    cuda::segment_fold(p, segment::Fold::kMoments, out->at(), scratch->at(), s);
                  }});
  ops->push_back({name + " map", [=](void* s) {
                    (void)x, (void)offsets, (void)numbers;
                    cuda::segment_map(p, segment::Map::kExp, out->at(), s);
                  }});
}

void aldr_ops(std::vector<Op>* ops, int64_t classes, bool l1) {
  constexpr int64_t kRows = 5;
  auto x = std::make_shared<Memory>(kRows * classes * 4);
  auto grad = std::make_shared<Memory>(kRows * classes * 4);
  auto stats = std::make_shared<Memory>(aldr::kStatCount * kRows * 4);
  auto factor = std::make_shared<Memory>(kRows * 4);
  auto labels = std::make_shared<std::vector<int64_t>>(size_t(kRows), 1);
  aldr::Problem p{};
  p.rows = kRows, p.classes = classes, p.dtype = DType::kF32, p.x = x->at();
  p.target = labels->data(), p.ignore_index = -100, p.l1 = l1;
  p.lambda0 = p.alpha = 1, p.margin = 0.1;
  const std::string name = "ALDR " + std::to_string(classes);
  ops->push_back({name + " forward", [=](void* s) {
                    (void)x, (void)labels;
                    cuda::aldr_forward(p, stats->at(), factor->at(), grad->at(), s);
                  }});
  ops->push_back({name + " backward", [=](void* s) {
                    (void)x, (void)labels;
                    cuda::aldr_backward(p, stats->at(), factor->at(), grad->at(), s);
                  }});
}

// Classes that are neighbours, and that are not.
void margin_shifts(std::vector<Op>* ops, int64_t classes, Strides strides) {
  margin_shift::Problem p{};
  p.outer = 1, p.inner = 5, p.classes = classes, p.dtype = DType::kF32, p.ignore_index = -100;
  auto x = std::make_shared<Memory>(5 * classes * 8),
       grad = std::make_shared<Memory>(5 * classes * 8);
  auto rest = std::make_shared<Memory>(5 * 8);
  auto labels = std::make_shared<std::vector<int64_t>>(5, 1);
  p.x = p.adv = x->at(), p.x_strides = p.adv_strides = strides;
  p.target = labels->data(), p.target_dtype = DType::kI64;
  margin_shift::Backward b{};
  b.g = b.shift = b.total = rest->at();
  b.dx = grad->at(), b.dx_strides = strides;
  const std::string name = "margin_shift " + std::to_string(classes);
  ops->push_back({name + " forward", [=](void* s) {
                    (void)labels;
                    cuda::margin_shift_forward(p, grad->at(), rest->at(), s);
                  }});
  ops->push_back({name + " backward", [=](void* s) {
                    (void)x;
                    cuda::margin_shift_backward(p, b, s);
                  }});
}

void permutahedra(std::vector<Op>* ops, bool kl) {
  permutahedron::Problem p{};
  p.rows = 3, p.n = 20, p.dtype = DType::kF32, p.rank = true, p.kl = kl, p.strength = 1;
  p.centred = kl;
  auto x = std::make_shared<Memory>(3 * 20 * 8), y = std::make_shared<Memory>(3 * 20 * 8);
  auto order = std::make_shared<std::vector<int64_t>>(3 * 20);
  auto packed = std::make_shared<std::vector<int32_t>>(3 * 20);
  for (size_t i = 0; i < order->size(); ++i) (*order)[i] = int64_t(i % 20);
  const std::string name = kl ? "permutahedron kl" : "permutahedron";
  ops->push_back({name + " forward", [=](void* s) {
                    const int64_t bytes = cuda::permutahedron_scratch_bytes(p);
                    Memory scratch(bytes);
                    cuda::permutahedron_forward(p, x->at(), order->data(), y->at(), packed->data(),
                                                scratch.at(), bytes, s);
                  }});
  ops->push_back({name + " backward", [=](void* s) {
                    cuda::permutahedron_backward(p, x->at(), x->at(), packed->data(), y->at(), s);
                  }});
}

void lion_k_steps(std::vector<Op>* ops, DType dtype, int64_t count) {
  auto x = std::make_shared<Memory>(count * 5 * 8), m = std::make_shared<Memory>(count * 5 * 8);
  auto g = std::make_shared<Memory>(5 * 8);
  const auto part = [&](Memory& all, int64_t i) {
    return static_cast<char*>(all.at()) + i * 5 * dtype_size(dtype);
  };
  auto tensors = std::make_shared<std::vector<lion_k::Tensor>>();
  for (int64_t i = 0; i < count; ++i) {
    tensors->push_back({part(*x, i), g->at(), part(*m, i), nullptr, nullptr, 5, i});
  }
  lion_k::Problem p{};
  p.tensors = tensors->data(), p.count = count, p.x_dtype = p.g_dtype = p.m_dtype = dtype;
  p.options.lr = 0.5, p.options.beta1 = p.options.beta2 = 0.5;
  ops->push_back({"Lion-K, " + std::to_string(count) + " tensors", [=](void* s) {
                    (void)x, (void)m, (void)g, (void)tensors;
                    cuda::lion_k_step(p, {}, s);
                  }});
}

void sorting_networks(std::vector<Op>* ops, int64_t n, sorting::Network network) {
  for (int task = 0; task < cuda::kSortingTaskCount; ++task) {
    if (n > cuda::kSortingMaxRow && task >= int(cuda::SortingTask::kPermutation)) continue;
    const int64_t width = n > 1000 ? 1 : 3;
    sorting::Problem p{};
    p.items = 2, p.n = n, p.dtype = DType::kF32, p.network = network, p.steepness = 1;
    cuda::SortingCall c{};
    c.task = cuda::SortingTask(task);
    const bool matrix = task >= int(cuda::SortingTask::kPermutation);
    const int64_t entries = 2 * n * (matrix ? n : width) * 8;
    auto x = std::make_shared<Memory>(2 * n * 8);
    auto f = std::make_shared<Memory>(entries), out = std::make_shared<Memory>(entries);
    auto small = std::make_shared<Memory>(2 * n * 8), y = std::make_shared<Memory>(2 * n * 8);
    auto first = std::make_shared<std::vector<int32_t>>(size_t(2 * n), 0);
    p.x = x->at();
    c.features.f = f->at(), c.features.width = width, c.features.transpose = true;
    c.g = f->at(), c.gy = x->at(), c.first = first->data();
    c.y = y->at(), c.out = out->at(), c.loss = small->at(), c.gx = small->at(), c.gf = out->at();
    ops->push_back(
        {"sorting network " + std::to_string(n) + " task " + std::to_string(task), [=](void* s) {
           (void)x, (void)f, (void)y, (void)first, (void)small, (void)out;
           const int64_t bytes = cuda::sorting_scratch_bytes(p, c);
           Memory scratch(bytes);
           cuda::sorting_run(p, c, scratch.at(), bytes, s);
         }});
  }
}

void betti_matching(std::vector<Op>* ops, DType dtype) {
  betti::Problem p{};
  p.items = 2, p.depth = 1, p.rows = 6, p.cols = 5, p.dims = 2, p.want = 3;
  auto x = std::make_shared<Memory>(60 * 8), y = std::make_shared<Memory>(60 * 8);
  auto grad = std::make_shared<Memory>(60 * 8), loss = std::make_shared<Memory>(60 * 8);
  p.input = x->at(), p.target = y->at(), p.input_dtype = p.target_dtype = dtype;
  cuda::BettiLoss l{};
  l.options.matched_weight = l.options.unmatched_weight = l.target_weight = 1;
  l.options.dim_weight[0] = l.options.dim_weight[1] = 1;
  l.loss = loss->at(), l.grad_input = grad->at();
  ops->push_back({"Betti matching", [=](void* s) {
                    (void)x, (void)y, (void)grad, (void)loss;
                    const int64_t bytes = cuda::betti_scratch_bytes(p);
                    Memory scratch(bytes);
                    cuda::betti_loss(p, l, scratch.at(), bytes, s);
                  }});
  auto tables = std::make_shared<std::vector<int32_t>>(4 * 2 * 2 * 2 * 30);
  ops->push_back({"Betti pairs", [=](void* s) {
                    const int64_t bytes = cuda::betti_scratch_bytes(p);
                    Memory scratch(bytes);
                    int32_t* t = tables->data();
                    cuda::betti_pairs(p, {t, t + 240, t + 480, t + 720}, scratch.at(), bytes, s);
                  }});
}

// ---- What they must all do ---------------------------------------------------------------------

std::string error_of(const Op& op) {
  try {
    op.call(nullptr);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return {};
}

// On the device and stream that it was given, and without a call that waits or allocates.
void check_calls(const Op& op) {
  shim::settings.devices = 2;
  void* stream = shim::stream(1, 3);
  shim::calls().clear();
  {
    const cuda::DeviceGuard guard(1);
    shim::calls().clear();
    op.call(stream);
  }
  size_t launches = 0;
  auto calls = shim::calls();
  calls.pop_back();  // the guard's way back
  for (const shim::Call& call : calls) {
    require(call.device == 1, op.name + ": asks another device");
    if (call.what == shim::Asked::kLaunch) {
      ++launches;
      require(call.stream == stream, op.name + ": launches on another stream");
    }
    require(call.what == shim::Asked::kLaunch || call.what == shim::Asked::kAttribute ||
                call.what == shim::Asked::kFunction,
            op.name + ": allocates, copies or waits");
  }
  require(launches > 0, op.name + ": launches nothing");
}

// Each of its calls fails once, those of the first run of all among them.
int check_failures(const Op& op) {
  int calls = 0;
  for (bool failed_call = true; failed_call; calls += failed_call) {
    shim::settings.fails_after = calls;
    const std::string error = error_of(op);
    failed_call = shim::settings.fails_after < 0;  // the call was reached
    const bool told = error.find("cudaErrorMemoryAllocation: out of memory") != std::string::npos;
    require(failed_call ? told : error.empty(),
            op.name + ": call " + std::to_string(calls) + ": '" + error + "'");
    require(cudaGetLastError() == cudaSuccess, op.name + ": leaves its error to others");
  }
  shim::settings.fails_after = -1;
  return calls;
}

}  // namespace

int main() {
  std::vector<Op> ops;
  row_softmax(&ops, 5, 40, Reduction::kMean, DType::kF32);
  row_softmax(&ops, 2, 70000, Reduction::kSum, DType::kF32);
  row_softmax(&ops, 9000, 3, Reduction::kMean, DType::kF32);
  row_softmax(&ops, 4, 300, Reduction::kNone, DType::kF32);
  row_moments_ops(&ops, 40, 1);
  row_moments_ops(&ops, 5, 40);
  segment_ops(&ops, 3);
  segment_ops(&ops, 65);
  aldr_ops(&ops, 40, false);
  aldr_ops(&ops, 5000, true);
  margin_shifts(&ops, 40, {0, 1, 40});
  margin_shifts(&ops, 5000, {0, 1, 5000});
  margin_shifts(&ops, 41, {0, 5, 1});
  permutahedra(&ops, false);
  permutahedra(&ops, true);
  lion_k_steps(&ops, DType::kF32, 3);
  lion_k_steps(&ops, DType::kBF16, 70);
  for (const int64_t n : {8, 60, 4097}) sorting_networks(&ops, n, sorting::Network::kBitonic);
  sorting_networks(&ops, 300, sorting::Network::kBatcher);
  betti_matching(&ops, DType::kF32);
  betti_matching(&ops, DType::kF64);
  int failures = 0;
  for (const Op& op : ops) {
    failures += check_failures(op);
    check_calls(op);
  }
  std::printf("%zu calls of ops, %d failing calls of the runtime, %d checks, %d failed\n",
              ops.size(), failures, checked, failed);
  return failed != 0;
}
