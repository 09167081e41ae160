// Python boundary of Lion-K: decodes and checks, releases the GIL, calls the kernels.
#include "cpu/lion_k.h"
#include "common/compiler.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "bind/args.h"
#include "bind/register.h"
#if PYLOSS_WITH_CUDA
#include "bind/on_device.h"
#include "cuda/lion_k.h"
#endif

namespace py = pybind11;

namespace pyloss {
namespace {

PYLOSS_RECORD(Options, kappa, rounding, maximize, lr, beta1, beta2, weight_decay, e, seed, step);
// One tuple an array, with an entry for each tensor; `given`, `compensation` and `position` are
// empty where nothing reads them.
PYLOSS_RECORD(Problem, x_dtype, g_dtype, m_dtype, size, x, g, m, given, compensation, position,
              options);

lion_k::Options decode_options(const Reader<Options>& r) {
  lion_k::Options o{};
  o.kappa = r.code<lion_k::Kappa>(Options::kappa, lion_k::kKappaCount);
  o.rounding = r.code<lion_k::Rounding>(Options::rounding, lion_k::kRoundingCount);
  o.maximize = r.flag(Options::maximize);
  o.lr = r.number(Options::lr);
  o.beta1 = r.number(Options::beta1);
  o.beta2 = r.number(Options::beta2);
  o.weight_decay = r.number(Options::weight_decay);
  o.e = r.number(Options::e);
  o.seed = r.integer(Options::seed);
  o.step = r.integer(Options::step);
  const bool divides = o.kappa == lion_k::Kappa::kHuber || o.kappa == lion_k::Kappa::kSmooth;
  if (!std::isfinite(o.e) || o.e < 0 || (divides && o.e == 0)) r.bad(Options::e, "out of range");
  return o;
}

// A call, and what it points to.
struct Decoded {
  std::vector<lion_k::Tensor> tensors;
  std::vector<int64_t> first;
  lion_k::Problem problem{};
};

template <class T = void>
T* entry(const Reader<Problem>& r, Problem::Field f, Py_ssize_t i, int64_t n) {
  const int64_t address = r.integer(f, i);
  if (address < 0 || (address == 0 && n > 0)) r.bad(f, "no data at this address");
  return reinterpret_cast<T*>(address);
}

Decoded decode(const py::handle& record) {
  const Reader<Problem> r(record);
  Decoded d;
  lion_k::Problem& p = d.problem;
  p.x_dtype = r.floating(Problem::x_dtype);
  p.g_dtype = r.floating(Problem::g_dtype);
  p.m_dtype = r.floating(Problem::m_dtype);
  p.options = decode_options(r.record<Options>(Problem::options));
  p.count = int64_t(r.length(Problem::size));
  const bool given = p.options.kappa == lion_k::Kappa::kGiven;
  const bool half = p.x_dtype == DType::kBF16 || p.x_dtype == DType::kF16;
  const bool compensated = half && p.options.rounding == lion_k::Rounding::kCompensated;
  const bool stochastic = half && p.options.rounding == lion_k::Rounding::kStochastic;
  const auto expect = [&](Problem::Field f, bool wanted) {
    if (int64_t(r.length(f)) != (wanted ? p.count : 0)) r.bad(f, "wrong number of tensors");
  };
  for (const auto f : {Problem::x, Problem::g, Problem::m}) expect(f, true);
  expect(Problem::given, given);
  expect(Problem::compensation, compensated);
  expect(Problem::position, stochastic);
  d.tensors.resize(size_t(p.count));
  d.first.resize(size_t(p.count) + 1);
  int64_t total = 0;
  for (Py_ssize_t i = 0; i < Py_ssize_t(p.count); ++i) {
    lion_k::Tensor& t = d.tensors[size_t(i)];
    t.n = r.integer(Problem::size, i);
    checked_count("size", {t.n});
    t.x = entry(r, Problem::x, i, t.n);
    t.g = entry<const void>(r, Problem::g, i, t.n);
    t.m = entry(r, Problem::m, i, t.n);
    t.given = given ? entry<const void>(r, Problem::given, i, t.n) : nullptr;
    t.compensation = compensated ? entry(r, Problem::compensation, i, t.n) : nullptr;
    t.position = stochastic ? r.integer(Problem::position, i) : 0;
    d.first[size_t(i)] = total;
    if (add_overflows(total, lion_k::padded(t.n), &total)) {
      r.bad(Problem::size, "size overflows");
    }
  }
  d.first[size_t(p.count)] = total;
  p.tensors = d.tensors.data();
  p.first = d.first.data();
  return d;
}

}  // namespace

void register_lion_k(py::module_& m) {
  declare_records<Options, Problem>(m, "lion_k");
  m.def("lion_k_step", [](py::handle problem, int64_t threads) {
    const Decoded d = decode(problem);
    without_gil(cpu::lion_k_step, d.problem, checked_threads(threads));
  });

#if PYLOSS_WITH_CUDA
  m.def("cuda_lion_k_step", [](py::handle problem, int64_t lr, int64_t found_inf, int64_t step,
                               int64_t device, int64_t stream) {
    const Decoded d = decode(problem);
    const cuda::LionKScalars scalars{optional_pointer<const float>("lr", lr),
                                     optional_pointer<const float>("found_inf", found_inf),
                                     optional_pointer<const float>("step", step)};
    on_device(device, cuda::lion_k_step, d.problem, scalars, optional_pointer("stream", stream));
  });
#endif
}

}  // namespace pyloss
