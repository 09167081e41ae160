// Python boundary of the CUDA sorting networks.
//
//     problem   items, n, dtype, network, distribution, x, table, comparators, offsets, layers
//               (the last four only of splitter selection, on the device; their contents cannot be
//               checked here)
//     options   steepness, art_lambda
//     call      task, width, transpose, one_f, loss_kind, f, g, gy, first, count, y, out, loss, gx,
//               gf: see cuda/sorting_network.h
#include "bind/register.h"

#if PYLOSS_WITH_CUDA
#include <pybind11/stl.h>

#include <array>

#include "bind/args.h"
#include "cuda/sorting_network.h"
#endif

namespace pyloss {

#if PYLOSS_WITH_CUDA
namespace py = pybind11;

namespace {

using cuda::SortingTask;
using Problem = std::array<int64_t, 10>;
using Options = std::array<double, 2>;
using Call = std::array<int64_t, 15>;

cuda::SortingProblem decode(const Problem& a, const Options& o) {
  cuda::SortingProblem p{};
  p.items = a[0];
  p.n = a[1];
  const int64_t count = checked_count("x", {p.items, p.n});
  if (p.n < 1 || p.n > cuda::kSortingMaxWires) bad_argument("x", "between 1 and 2^24 columns");
  p.dtype = checked_float("x", a[2]);
  if (p.dtype != DType::kF64 && p.dtype != DType::kF32) {
    bad_argument("x", "must be float32 or float64");
  }
  p.network = checked_enum<sorting::Network>("network", a[3], sorting::kNetworkCount);
  p.distribution =
      checked_enum<sorting::Distribution>("distribution", a[4], sorting::kDistributionCount);
  p.x = checked_pointer("x", a[5], count);
  p.steepness = o[0];
  p.art_lambda = o[1];
  if (!(p.steepness > 0)) bad_argument("steepness", "must be positive");
  if (!(p.art_lambda >= 0 && p.art_lambda < 1)) bad_argument("art_lambda", "must be in [0, 1)");
  if (p.network == sorting::Network::kSplitter) {
    if (a[7] < 0 || a[7] > INT32_MAX) bad_argument("comparators", "not a 32-bit count");
    if (a[9] < 0 || a[9] > INT32_MAX - 1) bad_argument("layers", "not a 32-bit count");
    p.table = checked_pointer<const int32_t>("table", a[6], a[7]);
    p.offsets = checked_pointer<const int32_t>("offsets", a[8], a[9] + 1);
    p.table_layers = a[9];
  }
  return p;
}

bool flag(const char* name, int64_t value) {
  if (value != 0 && value != 1) bad_argument(name, "not a flag");
  return value != 0;
}

cuda::SortingCall decode_call(const cuda::SortingProblem& p, const Call& a) {
  cuda::SortingCall c{};
  c.task = checked_enum<SortingTask>("task", a[0], cuda::kSortingTaskCount);
  const SortingTask task = c.task;
  const bool apply = task == SortingTask::kApply || task == SortingTask::kApplyBackward;
  const bool loss = task == SortingTask::kLoss;
  if (task >= SortingTask::kPermutation && p.n > cuda::kSortingMaxRow) {
    bad_argument("x", "at most 4096 columns for a permutation or a fused loss");
  }
  c.width = a[1];
  if (c.width < 0 || c.width > INT32_MAX) bad_argument("width", std::to_string(c.width));
  c.transpose = flag("transpose", a[2]);
  c.one_f = flag("one_f", a[3]);
  c.loss_kind = checked_enum<cuda::SortingLoss>("loss_kind", a[4], 3);
  const int64_t values = p.items * p.n;
  const int64_t entries = checked_count("features", {p.items, p.n, apply ? c.width : p.n});
  const int64_t f_entries = checked_count("features", {c.one_f ? 1 : p.items, p.n, c.width});
  const auto needed = [](bool yes, int64_t count) { return yes ? count : 0; };

  const bool g = task == SortingTask::kApplyBackward || task == SortingTask::kPermutationBackward;
  const bool out = task == SortingTask::kApply || task == SortingTask::kPermutation;
  const bool y = task == SortingTask::kSort || task == SortingTask::kPermutation;
  const bool gx = g || task == SortingTask::kSortBackward;
  c.f = checked_pointer("f", a[5], needed(apply, f_entries));
  c.g = checked_pointer("g", a[6], needed(g, entries));
  c.gy = checked_pointer("gy", a[7], needed(task == SortingTask::kSortBackward, values));
  c.first = checked_pointer<const int32_t>("first", a[8], needed(loss, values));
  c.count = optional_pointer<const int32_t>(a[9]);
  c.y = checked_pointer("y", a[10], needed(y, values));
  c.out = checked_pointer("out", a[11], needed(out, entries));
  c.loss = checked_pointer("loss", a[12], needed(loss, p.items));
  c.gx = checked_pointer("gx", a[13], needed(gx, values));
  c.gf = optional_pointer(a[14]);
  return c;
}

}  // namespace

void register_sorting_network_cuda(py::module_& m) {
  m.def("cuda_sorting_network_scratch_bytes",
        [](const Problem& problem, const Options& options, const Call& call) {
          const cuda::SortingProblem p = decode(problem, options);
          return cuda::sorting_scratch_bytes(p, decode_call(p, call));
        });
  m.def("cuda_sorting_network", [](const Problem& problem, const Options& options, const Call& call,
                                   int64_t scratch, int64_t scratch_bytes, int64_t stream) {
    const cuda::SortingProblem p = decode(problem, options);
    const cuda::SortingCall c = decode_call(p, call);
    py::gil_scoped_release nogil;
    cuda::sorting_run(p, c, optional_pointer(scratch), scratch_bytes, optional_pointer(stream));
  });
}
#else
void register_sorting_network_cuda(pybind11::module_&) {}
#endif

}  // namespace pyloss
