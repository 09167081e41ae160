// Python boundary of sorting networks: decodes and checks, releases the GIL, calls the kernels.
//
//     problem   items, n, dtype, network, distribution, x, table, comparators, offsets, layers
//               (the last four only of splitter selection: int32 pairs (lo, hi) of wires, and where
//               each layer starts)
//     options   steepness, art_lambda
//     features  f, shared by the batch, transpose, d
//     targets   order, target, its dtype, count or 0, kind, reduction
#include "cpu/sorting_network.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bind/args.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using Problem = std::array<int64_t, 10>;
using Options = std::array<double, 2>;
using Features = std::array<int64_t, 4>;
using Targets = std::array<int64_t, 6>;

void check_table(const cpu::SortingProblem& p, int64_t comparators) {
  if (p.offsets[0] != 0 || p.offsets[p.layers] != comparators) {
    bad_argument("offsets", "do not fit the table");
  }
  for (int l = 0; l < p.layers; ++l) {
    if (p.offsets[l + 1] < p.offsets[l]) bad_argument("offsets", "decreasing");
  }
  for (int64_t i = 0; i < comparators; ++i) {
    const int32_t lo = p.table[2 * i], hi = p.table[2 * i + 1];
    if (lo < 0 || hi < 0 || lo >= p.n || hi >= p.n || lo == hi) {
      bad_argument("table", "no comparator of two wires");
    }
  }
}

cpu::SortingProblem decode(const Problem& a, const Options& o) {
  cpu::SortingProblem p{};
  p.items = a[0];
  const int64_t count = checked_count("x", {a[0], a[1]});
  if (a[1] < 1 || a[1] > (int64_t(1) << 29)) bad_argument("x", "between 1 and 2^29 columns");
  p.n = int32_t(a[1]);
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
    p.layers = int32_t(a[9]);
    check_table(p, a[7]);
  }
  return p;
}

int64_t values(const cpu::SortingProblem& p) {
  return p.items * p.n;
}
int64_t matrices(const cpu::SortingProblem& p) {
  return checked_count("permutation", {p.items, p.n, p.n});
}

// `sizes`: how much f, and what is of the shape of the result, hold.
cpu::SortingFeatures decode_features(const cpu::SortingProblem& p, const Features& a,
                                     int64_t* f_size, int64_t* size) {
  for (int i : {1, 2}) {
    if (a[i] != 0 && a[i] != 1) bad_argument("features", "not a flag");
  }
  cpu::SortingFeatures f{};
  f.shared = a[1] != 0;
  f.transpose = a[2] != 0;
  f.d = a[3];
  checked_count("features", {p.n, f.d});  // of an item, for which scratch is made even of none
  *size = checked_count("features", {p.items, p.n, f.d});
  *f_size = checked_count("features", {f.shared ? 1 : p.items, p.n, f.d});
  f.f = checked_pointer("features", a[0], *f_size);
  return f;
}

cpu::SortingTargets decode_targets(const cpu::SortingProblem& p, const Targets& a) {
  cpu::SortingTargets t{};
  t.order = checked_enum<cpu::TargetOrder>("order", a[0], 5);
  t.dtype = checked_dtype("target", a[2]);
  if (t.dtype != DType::kF64 && t.dtype != DType::kF32 && t.dtype != DType::kI64 &&
      t.dtype != DType::kI32) {
    bad_argument("target", "must be float64, float32, int64 or int32");
  }
  if (t.order == cpu::TargetOrder::kRanks && t.dtype != DType::kI32) {
    bad_argument("target", "ranks must be int32");
  }
  t.target = checked_pointer("target", a[1], values(p));
  t.count = optional_pointer<const int32_t>(a[3]);
  t.kind = checked_enum<cpu::SortingLoss>("kind", a[4], 3);
  return t;
}

}  // namespace

void register_sorting_network(py::module_& m) {
  m.def("sorting_network_sort",
        [](const Problem& problem, const Options& options, int64_t y, int64_t threads) {
          const cpu::SortingProblem p = decode(problem, options);
          void* to = checked_pointer("y", y, values(p));
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::sorting_sort(p, to, width);
        });
  m.def("sorting_network_sort_bwd", [](const Problem& problem, const Options& options, int64_t gy,
                                       int64_t gx, int64_t threads) {
    const cpu::SortingProblem p = decode(problem, options);
    const void* from = checked_pointer("gy", gy, values(p));
    void* to = checked_pointer("gx", gx, values(p));
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::sorting_sort_backward(p, from, to, width);
  });
  m.def("sorting_network_apply", [](const Problem& problem, const Options& options,
                                    const Features& features, int64_t out, int64_t threads) {
    const cpu::SortingProblem p = decode(problem, options);
    int64_t f_size, size;
    const cpu::SortingFeatures f = decode_features(p, features, &f_size, &size);
    void* to = checked_pointer("out", out, size);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::sorting_apply(p, f, to, width);
  });
  m.def("sorting_network_apply_bwd",
        [](const Problem& problem, const Options& options, const Features& features, int64_t g,
           int64_t gx, int64_t gf, int64_t threads) {
          const cpu::SortingProblem p = decode(problem, options);
          int64_t f_size, size;
          const cpu::SortingFeatures f = decode_features(p, features, &f_size, &size);
          const void* from = checked_pointer("g", g, size);
          void* to = checked_pointer("gx", gx, values(p));
          void* to_f = optional_pointer(gf);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::sorting_apply_backward(p, f, from, to, to_f, width);
        });
  m.def("sorting_network_permutation", [](const Problem& problem, const Options& options, int64_t y,
                                          int64_t permutation, int64_t threads) {
    const cpu::SortingProblem p = decode(problem, options);
    void* to = checked_pointer("y", y, values(p));
    void* matrix = checked_pointer("permutation", permutation, matrices(p));
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::sorting_permutation(p, to, matrix, width);
  });
  m.def("sorting_network_permutation_bwd", [](const Problem& problem, const Options& options,
                                              int64_t gy, int64_t gp, int64_t gx, int64_t threads) {
    const cpu::SortingProblem p = decode(problem, options);
    const void* from = optional_pointer(gy);
    const void* matrix = checked_pointer("gp", gp, matrices(p));
    void* to = checked_pointer("gx", gx, values(p));
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::sorting_permutation_backward(p, from, matrix, to, width);
  });
  m.def("sorting_network_loss",
        [](const Problem& problem, const Options& options, const Targets& target, int64_t loss,
           int64_t gx, int64_t threads) {
          const cpu::SortingProblem p = decode(problem, options);
          const cpu::SortingTargets targets = decode_targets(p, target);
          const auto reduction = checked_enum<cpu::Reduction>("reduction", target[5], 3);
          const bool each = reduction == cpu::Reduction::kNone;
          void* to = checked_pointer("loss", loss, each ? p.items : 1);
          void* to_x = optional_pointer(gx);
          const int width = checked_threads(threads);
          py::gil_scoped_release nogil;
          cpu::sorting_loss(p, targets, reduction, to, to_x, width);
        });
}

}  // namespace pyloss
