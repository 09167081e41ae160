// Python boundary of sorting networks: decodes and checks, releases the GIL, calls the kernels.
#include <pybind11/pybind11.h>

#include "bind/args.h"
#include "bind/register.h"
#include "common/sorting_network.h"
#include "cpu/sorting_network.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/sorting_network.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, items, n, dtype, network, distribution, steepness, art_lambda, x, table,
              comparators, offsets, layers);
PYLOSS_RECORD(Features, f, shared, transpose, width);
PYLOSS_RECORD(Targets, order, target, dtype, count, kind, reduction);
PYLOSS_RECORD(Call, task, features, kind, g, gy, first, count, y, out, loss, gx, gf);

sorting::Problem decode(const py::handle& record) {
  const Reader<Problem> r(record);
  sorting::Problem p{};
  p.items = r.integer(Problem::items);
  p.n = r.integer(Problem::n);
  const int64_t count = checked_count("x", {p.items, p.n});
  if (p.n < 1 || p.n > sorting::kMaxWires) r.bad(Problem::n, "not between 1 and 2^29");
  p.dtype = r.float32_or_float64(Problem::dtype);
  p.network = r.code<sorting::Network>(Problem::network, sorting::kNetworkCount);
  p.distribution =
      r.code<sorting::Distribution>(Problem::distribution, sorting::kDistributionCount);
  p.steepness = r.number(Problem::steepness);
  if (!(p.steepness > 0)) r.bad(Problem::steepness, "must be positive");
  p.art_lambda = r.number(Problem::art_lambda);
  if (!(p.art_lambda >= 0 && p.art_lambda < 1)) r.bad(Problem::art_lambda, "must be in [0, 1)");
  p.x = r.pointer(Problem::x, count);
  if (p.network == sorting::Network::kSplitter) {
    p.comparators = r.code<int32_t>(Problem::comparators, INT32_MAX);
    p.layers = r.code<int32_t>(Problem::layers, INT32_MAX);
    p.table = r.pointer<const int32_t>(Problem::table, p.comparators);
    p.offsets = r.pointer<const int32_t>(Problem::offsets, int64_t{p.layers} + 1);
  }
  return p;
}

// A problem in host memory, where the table can be looked at.
sorting::Problem decode_on_cpu(const py::handle& record) {
  const sorting::Problem p = decode(record);
  if (p.network != sorting::Network::kSplitter) return p;
  if (p.offsets[0] != 0 || p.offsets[p.layers] != p.comparators) {
    bad_argument("offsets", "do not fit the table");
  }
  for (int l = 0; l < p.layers; ++l) {
    if (p.offsets[l + 1] < p.offsets[l]) bad_argument("offsets", "decreasing");
  }
  for (int64_t i = 0; i < p.comparators; ++i) {
    const int32_t lo = p.table[2 * i], hi = p.table[2 * i + 1];
    if (lo < 0 || hi < 0 || lo >= p.n || hi >= p.n || lo == hi) {
      bad_argument("table", "no comparator of two wires");
    }
  }
  return p;
}

// Buffers of a problem: (items, n), (items, n, n), (items, n, width).
void* values(const char* name, int64_t address, const sorting::Problem& p) {
  return checked_pointer(name, address, p.items * p.n);
}
void* matrices(const char* name, int64_t address, const sorting::Problem& p) {
  return checked_pointer(name, address, checked_count(name, {p.items, p.n, p.n}));
}
void* features(const char* name, int64_t address, const sorting::Problem& p,
               const sorting::Features& f) {
  return checked_pointer(name, address, checked_count(name, {p.items, p.n, f.width}));
}

sorting::Features decode(const Reader<Features>& r, const sorting::Problem& p) {
  sorting::Features f{};
  f.shared = r.flag(Features::shared);
  f.transpose = r.flag(Features::transpose);
  f.width = r.integer(Features::width);
  // Also of one item, for which scratch is made even where there is none.
  const int64_t one = checked_count("features", {p.n, f.width});
  const int64_t all = checked_count("features", {p.items, p.n, f.width});
  f.f = r.pointer(Features::f, f.shared ? one : all);
  return f;
}

cpu::SortingTargets decode(const Reader<Targets>& r, const sorting::Problem& p) {
  cpu::SortingTargets t{};
  t.order = r.code<cpu::TargetOrder>(Targets::order, cpu::kTargetOrderCount);
  t.dtype = r.dtype(Targets::dtype);
  if (t.dtype != DType::kF64 && t.dtype != DType::kF32 && t.dtype != DType::kI64 &&
      t.dtype != DType::kI32) {
    r.bad(Targets::dtype, "must be float64, float32, int64 or int32");
  }
  if (t.order == cpu::TargetOrder::kRanks && t.dtype != DType::kI32) {
    r.bad(Targets::dtype, "ranks must be int32");
  }
  t.target = r.pointer(Targets::target, p.items * p.n);
  t.count = r.optional<const int32_t>(Targets::count);
  t.kind = r.code<sorting::Loss>(Targets::kind, sorting::kLossCount);
  return t;
}

#if PYLOSS_WITH_CUDA
cuda::SortingCall decode(const Reader<Call>& r, const sorting::Problem& p) {
  using cuda::SortingTask;
  cuda::SortingCall c{};
  c.task = r.code<SortingTask>(Call::task, cuda::kSortingTaskCount);
  const auto is = [&](SortingTask a, SortingTask b) { return c.task == a || c.task == b; };
  const bool apply = is(SortingTask::kApply, SortingTask::kApplyBackward);
  const bool permutation = is(SortingTask::kPermutation, SortingTask::kPermutationBackward);
  const bool loss = c.task == SortingTask::kLoss;
  if ((permutation || loss) && p.n > cuda::kSortingMaxRow) {
    bad_argument("x", "at most 4096 columns for a permutation or a fused loss");
  }
  c.features = decode(r.record<Features>(Call::features), p);
  c.loss_kind = r.code<sorting::Loss>(Call::kind, sorting::kLossCount);

  // What a task does not read or write may be absent.
  const auto needed = [](bool yes, int64_t count) { return yes ? count : 0; };
  const int64_t row = p.items * p.n;
  const int64_t entries = apply         ? checked_count("out", {row, c.features.width})
                          : permutation ? checked_count("out", {row, p.n})
                                        : 0;
  const bool g = is(SortingTask::kApplyBackward, SortingTask::kPermutationBackward);
  const bool out = is(SortingTask::kApply, SortingTask::kPermutation);
  const bool y = is(SortingTask::kSort, SortingTask::kPermutation);
  const bool sort_backward = c.task == SortingTask::kSortBackward;
  c.g = r.pointer(Call::g, needed(g, entries));
  c.gy = r.pointer(Call::gy, needed(sort_backward, row));
  c.first = r.pointer<const int32_t>(Call::first, needed(loss, row));
  c.count = r.optional<const int32_t>(Call::count);
  c.y = r.pointer(Call::y, needed(y, row));
  c.out = r.pointer(Call::out, needed(out, entries));
  c.loss = r.pointer(Call::loss, needed(loss, p.items));
  c.gx = r.pointer(Call::gx, needed(g || sort_backward, row));
  c.gf = r.optional(Call::gf);
  return c;
}
#endif

}  // namespace

void register_sorting_network(py::module_& m) {
  declare_records<Problem, Features, Targets, Call>(m, "sorting_network");
  m.def("sorting_network_sort", [](py::handle problem, int64_t y, int64_t threads) {
    const auto p = decode_on_cpu(problem);
    without_gil(cpu::sorting_sort, p, values("y", y, p), checked_threads(threads));
  });
  m.def("sorting_network_sort_bwd",
        [](py::handle problem, int64_t gy, int64_t gx, int64_t threads) {
          const auto p = decode_on_cpu(problem);
          without_gil(cpu::sorting_sort_backward, p, values("gy", gy, p), values("gx", gx, p),
                      checked_threads(threads));
        });
  m.def("sorting_network_apply", [](py::handle problem, py::handle feature, int64_t out,
                                    int64_t threads) {
    const auto p = decode_on_cpu(problem);
    const auto f = decode(Reader<Features>(feature), p);
    without_gil(cpu::sorting_apply, p, f, features("out", out, p, f), checked_threads(threads));
  });
  m.def("sorting_network_apply_bwd", [](py::handle problem, py::handle feature, int64_t g,
                                        int64_t gx, int64_t gf, int64_t threads) {
    const auto p = decode_on_cpu(problem);
    const auto f = decode(Reader<Features>(feature), p);
    without_gil(cpu::sorting_apply_backward, p, f, features("g", g, p, f), values("gx", gx, p),
                optional_pointer("gf", gf), checked_threads(threads));
  });
  m.def("sorting_network_permutation",
        [](py::handle problem, int64_t y, int64_t permutation, int64_t threads) {
          const auto p = decode_on_cpu(problem);
          without_gil(cpu::sorting_permutation, p, values("y", y, p),
                      matrices("permutation", permutation, p), checked_threads(threads));
        });
  m.def("sorting_network_permutation_bwd",
        [](py::handle problem, int64_t gy, int64_t gp, int64_t gx, int64_t threads) {
          const auto p = decode_on_cpu(problem);
          without_gil(cpu::sorting_permutation_backward, p, optional_pointer("gy", gy),
                      matrices("gp", gp, p), values("gx", gx, p), checked_threads(threads));
        });
  m.def("sorting_network_loss",
        [](py::handle problem, py::handle targets, int64_t loss, int64_t gx, int64_t threads) {
          const auto p = decode_on_cpu(problem);
          const Reader<Targets> r(targets);
          const auto t = decode(r, p);
          const auto reduction = r.code<Reduction>(Targets::reduction, kReductionCount);
          const int64_t losses = reduction == Reduction::kNone ? p.items : 1;
          without_gil(cpu::sorting_loss, p, t, reduction, checked_pointer("loss", loss, losses),
                      optional_pointer("gx", gx), checked_threads(threads));
        });

#if PYLOSS_WITH_CUDA
  m.def("cuda_sorting_network_scratch_bytes",
        [](py::handle problem, py::handle call, int64_t device) {
          const auto p = decode(problem);
          return on_device(device, cuda::sorting_scratch_bytes, p, decode(Reader<Call>(call), p));
        });
  m.def("cuda_sorting_network", [](py::handle problem, py::handle call, int64_t scratch,
                                   int64_t scratch_bytes, int64_t device, int64_t stream) {
    const auto p = decode(problem);
    const auto c = decode(Reader<Call>(call), p);
    on_device(device, cuda::sorting_run, p, c, optional_pointer("scratch", scratch), scratch_bytes,
              optional_pointer("stream", stream));
  });
#endif
}

}  // namespace pyloss
