// The CUDA half of betti_matching. From Python, all addresses on the current device:
//
//   problem = (items, rows, cols, dims, want_dim0, want_dim1, superlevel,
//              input, input_dtype, target, target_dtype)     bool tensors pass as uint8
//   numbers = (matched_weight, unmatched_weight, target_weight, min_persistence,
//              weight_dim0, weight_dim1)
//   cuda_betti_in_double(problem) -> bool                    dtype of the loss terms
//   cuda_betti_matching_scratch_bytes(problem) -> int        torch.empty(..., dtype=torch.uint8)
//   cuda_betti_loss(problem, numbers, extreme, essential, loss, grad_input, grad_target, scratch,
//                   scratch_bytes, stream)                   gradients may be 0
//   cuda_betti_pairs(problem, birth, death, mate, essential, scratch, scratch_bytes, stream)
//
// 1D images are columns: cols = 1, dims = 1. Shapes and meaning of the outputs:
// cuda/betti_matching.h.
#include "bind/register.h"

#if PYLOSS_WITH_CUDA
#include <pybind11/stl.h>

#include <array>

#include "bind/args.h"
#include "cuda/betti_matching.h"
#endif

namespace pyloss {

#if PYLOSS_WITH_CUDA
namespace py = pybind11;

namespace {

using ProblemInts = std::array<int64_t, 11>;
using LossFloats = std::array<double, 6>;

cuda::BettiProblem decode(const ProblemInts& a) {
  cuda::BettiProblem p{};
  p.items = a[0];
  p.rows = a[1];
  p.cols = a[2];
  const int64_t voxels = checked_count("input", {p.items, p.rows, p.cols});
  if (a[3] < 1 || a[3] > 2) bad_argument("dims", std::to_string(a[3]));
  p.dims = int(a[3]);
  p.want[0] = a[4] != 0;
  p.want[1] = p.dims == 2 && a[5] != 0;
  p.superlevel = a[6] != 0;
  p.input = checked_pointer("input", a[7], voxels);
  p.input_dtype = checked_dtype("input", a[8]);
  p.target = optional_pointer(a[9]);
  p.target_dtype = checked_dtype("target", a[10]);
  return p;
}

// Outputs have as many elements as the problem says, which only the caller can know.
template <class T = void>
T* output(const char* name, int64_t address, const cuda::BettiProblem& p) {
  return checked_pointer<T>(name, address, p.items);
}

}  // namespace

void register_betti_matching_cuda(py::module_& m) {
  m.def("cuda_betti_in_double",
        [](const ProblemInts& problem) { return cuda::betti_in_double(decode(problem)); });
  m.def("cuda_betti_matching_scratch_bytes",
        [](const ProblemInts& problem) { return cuda::betti_scratch_bytes(decode(problem)); });
  m.def("cuda_betti_loss", [](const ProblemInts& problem, const LossFloats& numbers, bool extreme,
                              bool essential, int64_t loss, int64_t grad_input, int64_t grad_target,
                              int64_t scratch, int64_t scratch_bytes, int64_t stream) {
    const cuda::BettiProblem p = decode(problem);
    checked_pointer("target", problem[9], p.items);
    cuda::BettiLoss l{};
    l.options.superlevel = p.superlevel;
    l.options.extreme = extreme;
    l.options.essential = essential;
    l.options.matched_weight = numbers[0];
    l.options.unmatched_weight = numbers[1];
    l.target_weight = numbers[2];
    l.options.min_persistence = numbers[3];
    l.options.dim_weight[0] = numbers[4];
    l.options.dim_weight[1] = numbers[5];
    l.loss = output("loss", loss, p);
    l.grad_input = optional_pointer(grad_input);
    l.grad_target = optional_pointer(grad_target);
    if (l.grad_input && !is_float(p.input_dtype)) bad_argument("grad_input", "input is no float");
    if (l.grad_target && !is_float(p.target_dtype)) {
      bad_argument("grad_target", "target is no float");
    }
    py::gil_scoped_release nogil;
    cuda::betti_loss(p, l, optional_pointer(scratch), scratch_bytes, optional_pointer(stream));
  });
  m.def("cuda_betti_pairs", [](const ProblemInts& problem, int64_t birth, int64_t death,
                               int64_t mate, int64_t essential, int64_t scratch,
                               int64_t scratch_bytes, int64_t stream) {
    const cuda::BettiProblem p = decode(problem);
    cuda::BettiTables t{};
    t.birth = output<int32_t>("birth", birth, p);
    t.death = output<int32_t>("death", death, p);
    t.mate = p.target ? output<int32_t>("mate", mate, p) : optional_pointer<int32_t>(mate);
    t.essential = optional_pointer<int32_t>(essential);
    py::gil_scoped_release nogil;
    cuda::betti_pairs(p, t, optional_pointer(scratch), scratch_bytes, optional_pointer(stream));
  });
}
#else
void register_betti_matching_cuda(pybind11::module_&) {}
#endif

}  // namespace pyloss
