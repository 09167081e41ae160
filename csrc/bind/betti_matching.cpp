// Python boundary of Betti matching: decodes and checks, releases the GIL, calls the kernels.
#include <pybind11/pybind11.h>

#include <vector>

#include "bind/args.h"
#include "bind/register.h"
#include "common/betti_matching.h"
#include "cpu/betti_matching.h"
#include "cpu/betti_volume_residue.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/betti_matching.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Problem, items, shape, want, superlevel, input, input_dtype, target, target_dtype);
PYLOSS_RECORD(Loss, extreme, essential, min_persistence, matched_weight, unmatched_weight,
              dim_weight);
PYLOSS_RECORD(Rows, counts, addresses);
PYLOSS_RECORD(Residue, rank, tree, names, count);

// `two`: a target is needed.
betti::Problem decode(const py::handle& record, bool two) {
  const Reader<Problem> r(record);
  betti::Problem p{};
  p.items = r.integer(Problem::items);
  p.depth = p.rows = p.cols = 1;
  const Py_ssize_t dims = r.length(Problem::shape);
  if (dims < 1 || dims > betti::kMaxDims) r.bad(Problem::shape, "needs 1 to 3 sizes");
  p.dims = int(dims);
  int64_t* const sizes[] = {&p.depth, &p.rows, &p.cols};
  for (int i = 0; i < p.dims; ++i) {
    *sizes[i + (p.dims < 3)] = r.integer(Problem::shape, i);
  }
  const int64_t voxels = checked_count("input", {p.items, p.depth, p.rows, p.cols});
  if (p.depth < 1 || p.rows < 1 || p.cols < 1) r.bad(Problem::shape, "no voxels");
  p.want = r.code<uint32_t>(Problem::want, 1 << betti::kMaxDims) & ((1u << dims) - 1);
  p.superlevel = r.flag(Problem::superlevel);
  p.input = r.pointer(Problem::input, voxels);
  p.input_dtype = r.dtype(Problem::input_dtype);
  p.target = r.pointer(Problem::target, two ? voxels : 0);
  p.target_dtype = r.dtype(Problem::target_dtype);
  return p;
}

// Edges are numbered in 31 bits (2D: 32), in an image with a frame (2D: rows of whole words,
// cpu/betti_local.h).
bool cells_fit(const betti::Problem& p) {
  const bool volume = p.dims == 3, turned = !volume && p.cols == 1;
  const int64_t cols = turned ? p.rows : p.cols;
  int64_t voxels = volume ? 3 : 1;
  for (int64_t size : {volume ? p.depth + 2 : 1, (turned ? 1 : p.rows) + 2,
                       volume ? cols + 2 : (cols + 64) / 64 * 64}) {
    if (size >= INT32_MAX || voxels * size >= INT32_MAX) return false;
    voxels *= size;
  }
  return true;
}

betti::Problem decode_on_cpu(const py::handle& record, bool two) {
  const betti::Problem p = decode(record, two);
  const Reader<Problem> r(record);
  if (r.float32_or_float64(Problem::input_dtype) != p.target_dtype) {
    r.bad(Problem::target_dtype, "another than the input's");
  }
  if (!cells_fit(p)) r.bad(Problem::shape, "more than 2^31 cells in an image");
  return p;
}

betti::Problem decode_volumes(const py::handle& record, bool two) {
  const betti::Problem p = decode_on_cpu(record, two);
  if (p.dims != 3 || p.want != 2) {
    Reader<Problem>(record).bad(Problem::want, "not dimension 1 of volumes");
  }
  return p;
}

cpu::BettiResidue decode_residue(const py::handle& record, const betti::Problem& p) {
  const Reader<Residue> r(record);
  cpu::BettiResidue found{};
  found.count = r.integer(Residue::count);
  const int64_t most = p.items * p.depth * p.rows * p.cols * (p.target ? 15 : 3);
  if (found.count < 0 || found.count > most) r.bad(Residue::count, "not of so many squares");
  found.rank = static_cast<const uint32_t*>(r.pointer(Residue::rank, p.items));
  found.tree = static_cast<const uint8_t*>(r.pointer(Residue::tree, p.items));
  found.names = static_cast<const int64_t*>(r.pointer(Residue::names, found.count));
  return found;
}

betti::Options decode_loss(const py::handle& record) {
  const Reader<Loss> r(record);
  const auto checked = [&](Loss::Field f, double value) {
    if (!(value >= 0)) r.bad(f, "negative or NaN");
    return value;
  };
  betti::Options o{};
  o.extreme = r.flag(Loss::extreme);
  o.essential = r.flag(Loss::essential);
  o.min_persistence = checked(Loss::min_persistence, r.number(Loss::min_persistence));
  o.matched_weight = checked(Loss::matched_weight, r.number(Loss::matched_weight));
  o.unmatched_weight = checked(Loss::unmatched_weight, r.number(Loss::unmatched_weight));
  if (r.length(Loss::dim_weight) != betti::kMaxDims) r.bad(Loss::dim_weight, "needs 3 numbers");
  for (int d = 0; d < betti::kMaxDims; ++d) {
    o.dim_weight[d] = checked(Loss::dim_weight, r.number(Loss::dim_weight, d));
  }
  return o;
}

void* terms(int64_t loss, const betti::Problem& p) {
  return checked_pointer("loss", loss, checked_count("loss", {p.items, p.dims, betti::kTerms}));
}

py::bytearray bytes(const std::vector<int64_t>& rows) {
  return py::bytearray(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(int64_t));
}

const cpu::BettiResidue* const kAll = nullptr;  // not the residue of a device

py::tuple rows_of(const betti::Problem& p, int64_t threads, const cpu::BettiResidue* residue) {
  const auto rows = without_gil(cpu::betti_matching, p, checked_threads(threads), residue);
  return py::make_tuple(bytes(rows.matched), bytes(rows.unmatched_input),
                        bytes(rows.unmatched_target));
}

}  // namespace

void register_betti_matching(py::module_& m) {
  declare_records<Problem, Loss, Rows, Residue>(m, "betti_matching");
  m.def("betti_loss",
        [](py::handle problem, py::handle options, int64_t loss, int64_t grad, int64_t threads) {
          const auto p = decode_on_cpu(problem, true);
          without_gil(cpu::betti_loss, p, decode_loss(options), terms(loss, p),
                      optional_pointer("grad", grad), checked_threads(threads), kAll);
        });
  m.def("betti_loss_of_residue", [](py::handle problem, py::handle options, py::handle residue,
                                    int64_t loss, int64_t grad, int64_t threads) {
    const auto p = decode_volumes(problem, true);
    const auto r = decode_residue(residue, p);
    without_gil(cpu::betti_loss, p, decode_loss(options), terms(loss, p),
                optional_pointer("grad", grad), checked_threads(threads), &r);
  });
  // Rows of int64 as bytes: their number is known afterwards only.
  m.def("betti_matching", [](py::handle problem, int64_t threads) {
    return rows_of(decode_on_cpu(problem, true), threads, kAll);
  });
  m.def("betti_matching_of_residue", [](py::handle problem, py::handle residue, int64_t threads) {
    const auto p = decode_volumes(problem, true);
    const auto r = decode_residue(residue, p);
    return rows_of(p, threads, &r);
  });
  m.def("persistence_pairs", [](py::handle problem, bool essential, int64_t threads) {
    const auto p = decode_on_cpu(problem, false);
    return bytes(without_gil(cpu::persistence_pairs, p, essential, checked_threads(threads), kAll));
  });
  m.def("persistence_pairs_of_residue",
        [](py::handle problem, py::handle residue, int64_t threads) {
          const auto p = decode_volumes(problem, false);
          const auto r = decode_residue(residue, p);
          return bytes(without_gil(cpu::persistence_pairs, p, false, checked_threads(threads), &r));
        });

  m.def("betti_loops", [](py::handle problem, int64_t squares, int64_t count) {
    const auto p = decode_on_cpu(problem, false);
    const Reader<Problem> r(problem);
    if (p.dims != 3) r.bad(Problem::shape, "needs 3 sizes");
    if (p.items != 1) r.bad(Problem::items, "needs one item");
    const auto* found = static_cast<const int64_t*>(
        checked_pointer("squares", squares, checked_count("squares", {count})));
    for (int64_t i = 0; i < count; ++i) {
      if (found[i] < 0 || found[i] / 3 >= p.depth * p.rows * p.cols) {
        bad_argument("squares", "no number of a square");
      }
    }
    return bytes(without_gil(cpu::betti_loops, p, found, count));
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_betti_matching_scratch_bytes", [](py::handle problem, int64_t device) {
    return on_device(device, cuda::betti_scratch_bytes, decode(problem, false));
  });
  m.def("cuda_betti_group", [](py::handle problem, int64_t device) {
    return on_device(device, cuda::betti_group, decode(problem, false));
  });
  m.def("cuda_betti_prefix_bytes", [](py::handle problem, int64_t device) {
    return on_device(device, cuda::betti_prefix_bytes, decode(problem, false));
  });
  m.def("cuda_betti_columns", [](py::handle problem, int64_t counts, int64_t scratch,
                                 int64_t scratch_bytes, int64_t device, int64_t stream) {
    const auto p = decode(problem, false);
    on_device(device, cuda::betti_columns, p, checked_pointer<uint32_t>("counts", counts, 2),
              optional_pointer("scratch", scratch), scratch_bytes,
              optional_pointer("stream", stream));
  });
  m.def("cuda_betti_column_keys", [](py::handle problem, int64_t count, int64_t names, int64_t keys,
                                     int64_t scratch, int64_t scratch_bytes, int64_t device,
                                     int64_t stream) {
    const auto p = decode(problem, false);
    on_device(device, cuda::betti_column_keys, p, count,
              checked_pointer<int64_t>("names", names, count),
              checked_pointer<int64_t>("keys", keys, count), optional_pointer("scratch", scratch),
              scratch_bytes, optional_pointer("stream", stream));
  });
  m.def("cuda_betti_pairs", [](py::handle problem, bool essential, int64_t counts, int64_t scratch,
                               int64_t scratch_bytes, int64_t device, int64_t stream) {
    const auto p = decode(problem, false);
    auto* to = checked_pointer<uint32_t>("counts", counts, 4);
    on_device(device, cuda::betti_pairs, p, essential, to, optional_pointer("scratch", scratch),
              scratch_bytes, optional_pointer("stream", stream));
  });
  m.def("cuda_betti_rows", [](py::handle problem, py::handle rows, int64_t scratch,
                              int64_t scratch_bytes, int64_t device, int64_t stream) {
    const auto p = decode(problem, false);
    const Reader<Rows> r(rows);
    for (const auto field : {Rows::counts, Rows::addresses}) {
      if (r.length(field) != betti::kTerms) r.bad(field, "needs 3 numbers");
    }
    uint32_t counts[betti::kTerms];
    int64_t* to[betti::kTerms];
    for (int i = 0; i < betti::kTerms; ++i) {
      const int64_t count = r.integer(Rows::counts, i);
      if (count < 0 || count > UINT32_MAX) r.bad(Rows::counts, "out of range");
      counts[i] = uint32_t(count);
      to[i] = checked_pointer<int64_t>("rows", r.integer(Rows::addresses, i), count);
    }
    on_device(device, cuda::betti_rows, p, static_cast<const uint32_t*>(counts),
              static_cast<int64_t* const*>(to), optional_pointer("scratch", scratch), scratch_bytes,
              optional_pointer("stream", stream));
  });
  m.def("cuda_betti_loss",
        [](py::handle problem, py::handle options, int64_t loss, int64_t grad, int64_t scratch,
           int64_t scratch_bytes, int64_t device, int64_t stream) {
          const auto p = decode(problem, true);
          cuda::BettiLoss l{};
          l.options = decode_loss(options);
          l.loss = terms(loss, p);
          l.grad_input = optional_pointer("grad", grad);
          if (l.grad_input && !is_float(p.input_dtype)) bad_argument("grad", "input is no float");
          on_device(device, cuda::betti_loss, p, l, optional_pointer("scratch", scratch),
                    scratch_bytes, optional_pointer("stream", stream));
        });
#endif
}

}  // namespace pyloss
