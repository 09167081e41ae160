// Python boundary of Betti matching: decodes and checks, releases the GIL, calls the kernels.
//
//     problem   items, rows, cols, dims, dtype, superlevel, wanted dim 0, wanted dim 1
//     options   extreme, essential, min_persistence, matched weight, unmatched weight,
//               weight of dim 0, weight of dim 1
#include "cpu/betti_matching.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bind/args.h"
#include "bind/register.h"

namespace py = pybind11;

namespace pyloss {
namespace {

using Problem = std::array<int64_t, 8>;
using OptionFloats = std::array<double, 7>;

cpu::BettiBatch decode(const Problem& p, int64_t input, int64_t target, bool two) {
  cpu::BettiBatch b;
  b.items = p[0];
  b.rows = p[1];
  b.cols = p[2];
  const int64_t count = checked_count("input", {p[0], p[1], p[2]});
  const int64_t voxels = checked_count("input", {p[1], p[2]});
  if (voxels < 1) bad_argument("input", "no voxels");
  // Edges are numbered in 32 bits, in an image with a frame.
  if (p[1] > INT32_MAX - 2 || p[2] > INT32_MAX - 2 || (p[1] + 2) * (p[2] + 1) >= INT32_MAX) {
    bad_argument("input", "more than 2^31 cells in an image");
  }
  if (p[3] != 1 && p[3] != 2) bad_argument("dims", std::to_string(p[3]));
  b.dims = int(p[3]);
  b.dtype = checked_float("input", p[4]);
  if (b.dtype != DType::kF64 && b.dtype != DType::kF32) {
    bad_argument("input", "must be float32 or float64");
  }
  b.superlevel = p[5] != 0;
  b.wanted[0] = p[6] != 0;
  b.wanted[1] = p[7] != 0;
  b.input = checked_pointer("input", input, count);
  b.target = two ? checked_pointer("target", target, count) : nullptr;
  return b;
}

betti::Options decode(const OptionFloats& o, bool superlevel) {
  for (double x : o) {
    if (!(x >= 0)) bad_argument("options", "negative or NaN");
  }
  betti::Options r;
  r.superlevel = superlevel;
  r.extreme = o[0] != 0;
  r.essential = o[1] != 0;
  r.min_persistence = o[2];
  r.matched_weight = o[3];
  r.unmatched_weight = o[4];
  r.dim_weight[0] = o[5];
  r.dim_weight[1] = o[6];
  return r;
}

py::bytearray bytes(const std::vector<int64_t>& rows) {
  return py::bytearray(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(int64_t));
}

}  // namespace

void register_betti_matching(py::module_& m) {
  m.def("betti_loss", [](const Problem& problem, const OptionFloats& options, int64_t input,
                         int64_t target, int64_t loss, int64_t grad, int64_t threads) {
    const cpu::BettiBatch batch = decode(problem, input, target, true);
    const betti::Options o = decode(options, batch.superlevel);
    const int64_t terms = checked_count("loss", {batch.items, batch.dims, betti::kTerms});
    void* out = checked_pointer("loss", loss, terms);
    void* slope = optional_pointer(grad);
    const int width = checked_threads(threads);
    py::gil_scoped_release nogil;
    cpu::betti_loss(batch, o, out, slope, width);
  });
  // Rows of int64 as bytes: their number is known afterwards only.
  m.def("betti_matching",
        [](const Problem& problem, int64_t input, int64_t target, int64_t threads) {
          const cpu::BettiBatch batch = decode(problem, input, target, true);
          const int width = checked_threads(threads);
          cpu::BettiRows rows;
          {
            py::gil_scoped_release nogil;
            rows = cpu::betti_matching(batch, width);
          }
          return py::make_tuple(bytes(rows.matched), bytes(rows.unmatched_input),
                                bytes(rows.unmatched_target));
        });
  m.def("persistence_pairs",
        [](const Problem& problem, int64_t input, bool essential, int64_t threads) {
          const cpu::BettiBatch batch = decode(problem, input, 0, false);
          const int width = checked_threads(threads);
          std::vector<int64_t> rows;
          {
            py::gil_scoped_release nogil;
            rows = cpu::persistence_pairs(batch, essential, width);
          }
          return bytes(rows);
        });
}

}  // namespace pyloss
