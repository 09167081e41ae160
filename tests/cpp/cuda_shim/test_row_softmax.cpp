// Runs the CUDA row-softmax kernels on the CPU shim, over random problems, and compares them with
// plain loops in double. Every problem runs in four thread orders and over other rests of memory,
// whose outputs must be equal to the last bit. Arguments: number of problems, seed, and optionally
// the only problem to run, or --few: without the checks of many rows.
#include <cstdio>
#include <cstdlib>
#include <set>

#include "cuda/row_softmax.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;

constexpr double kInf = HUGE_VAL;
const double kNan = std::nan("");
constexpr double kHuge = 1e15;

double get(const void* p, DType t, int64_t i) {
  double v = 0;
  dispatch_float(t, [&](auto tag) {
    using T = decltype(tag);
    v = double(to_float(static_cast<const T*>(p)[i]));
  });
  return v;
}
void put(void* p, DType t, int64_t i, double v) {
  dispatch_float(t, [&](auto tag) {
    using T = decltype(tag);
    static_cast<T*>(p)[i] = FromFloat<T>::of(v);
  });
}

// A tensor of `size` elements that starts `offset` elements after an address aligned to 16.
struct Buffer {
  DType type;
  int64_t size, offset;
  std::vector<char> bytes;

  void make(DType t, int64_t n, int64_t off = 0) {
    type = t;
    size = n;
    offset = off;
    // Inputs are made while it is all ones, which is NaN in every type.
    bytes.assign((n + off) * dtype_size(t) + 16, char(shim::settings.poison));
  }
  char* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes.data());
    return bytes.data() + (16 - at % 16) % 16 + offset * dtype_size(type);
  }
  double at(int64_t i) { return get(data(), type, i); }
  void set(int64_t i, double v) { put(data(), type, i, v); }
};

struct Case {
  RowSoftmaxProblem p{};
  Buffer x, prob, mix, weight, token, tangent, grad_loss, grad_extras;
  std::vector<char> labels, labels2;
  Strides out_strides{};
  int64_t out_size = 0;
  int64_t out_offset = 0;
  DType real = DType::kF32;
  bool extras = false, index = false, grad = false;
  int multiprocessors = 4, shared_bytes = 0;
  std::string text;

  int64_t offset(const Strides& s, int64_t row, int64_t c) const {
    return row / p.inner * s.outer + row % p.inner * s.inner + c * s.cls;
  }
  int64_t label(const std::vector<char>& l, int64_t row) const {
    return load_index(l.data(), p.target_dtype, row);
  }
};

// ---- The reference -----------------------------------------------------------------------------

struct RefRow {
  bool ignored = false, bad = false;
  std::vector<double> x, z, zp, r, nll, p;  // zp = dz/dx
  double m = 0, lse = 0, token = 1, loss = 0, z_part = 0, entropy = 0, logprob = 0;
  int64_t y = -1, y2 = -1, argmax = -1, rank = 0;
};

double f_value(const RowSoftmaxOptions& o, double nll, bool soft) {
  if (!soft) nll = std::min(nll, o.max_nll);
  if (o.loss == LossKind::kFocal) return std::pow(-std::expm1(-nll), o.gamma) * nll;
  if (o.loss == LossKind::kPoly1) return nll - o.poly1 * std::expm1(-nll);
  if (o.loss == LossKind::kLdr) return o.temperature * (nll - o.offset);
  if (o.loss == LossKind::kRelaxed) {
    const double a = o.relaxation, miss = -std::expm1(-nll);
    if (miss <= a) return 0;
    return (1 - a) * (std::log1p(-a) + nll) + a * std::log(a / miss);
  }
  const double a = 1 - o.tau;
  return a == 0 ? nll : std::expm1(a * nll) / a;
}
double f_slope(const RowSoftmaxOptions& o, double nll, bool soft) {
  if (!soft && nll > o.max_nll) return 0;
  if (o.loss == LossKind::kFocal) {
    const double p = std::exp(-nll), miss = -std::expm1(-nll);
    if (miss == 0 || p == 0) return p == 0 ? 1 : 0;
    return std::pow(miss, o.gamma) + o.gamma * std::pow(miss, o.gamma - 1) * p * nll;
  }
  if (o.loss == LossKind::kPoly1) return 1 + o.poly1 * std::exp(-nll);
  if (o.loss == LossKind::kLdr) return o.temperature;
  if (o.loss == LossKind::kRelaxed) {
    const double a = o.relaxation, miss = -std::expm1(-nll);
    return miss <= a ? 0 : (1 - a) - a * std::exp(-nll) / miss;
  }
  return o.tau == 1 ? 1 : std::exp((1 - o.tau) * nll);
}

RefRow reference_row(Case& c, int64_t row, const std::vector<double>* logits = nullptr) {
  const RowSoftmaxProblem& p = c.p;
  const RowSoftmaxOptions& o = p.options;
  RefRow r;
  const int64_t n = p.classes;
  const bool labels = p.kind != TargetKind::kDense, mixed = p.kind == TargetKind::kMix;
  if (p.token_weight) r.token = c.token.at(row);
  if (labels) r.y = c.label(c.labels, row);
  if (mixed) r.y2 = c.label(c.labels2, row);
  if (labels && (r.y == o.ignore_index || (mixed && r.y2 == o.ignore_index))) {
    r.ignored = true;
    return r;
  }
  r.bad = labels && (!in_range(r.y, n) || (mixed && !in_range(r.y2, n)));
  r.m = -kInf;
  double sum = 0;
  bool nan = r.bad;
  for (int64_t j = 0; j < n; ++j) {
    const double x = logits ? (*logits)[j] : c.x.at(c.offset(p.x_strides, row, j));
    const double t = o.logit_scale * x;
    const double s = o.softcap > 0 ? o.softcap * std::tanh(t / o.softcap) : t;
    const double slope = o.softcap > 0 ? 1 - s / o.softcap * (s / o.softcap) : 1;
    r.x.push_back(x);
    r.z.push_back(s / o.temperature - (j == r.y ? o.margin : 0));
    r.zp.push_back(o.logit_scale / o.temperature * slope);
    if (std::isnan(r.z[j])) nan = true;
    if (std::isnan(r.z[j]) && (r.argmax < 0 || !std::isnan(r.z[r.argmax]))) r.argmax = j;
    if (r.argmax < 0 || r.z[j] > r.z[r.argmax]) r.argmax = j;
    r.m = std::fmax(r.m, r.z[j]);
  }
  for (int64_t j = 0; j < n; ++j) sum += std::exp(r.z[j] - r.m);
  nan = nan || !std::isfinite(r.m);
  if (nan) {
    r.bad = true;
    r.loss = r.lse = r.z_part = r.entropy = r.logprob = r.m = kNan;
    if (labels && (!in_range(r.y, n) || (mixed && !in_range(r.y2, n)))) r.argmax = -1;
    return r;
  }
  r.lse = r.m + std::log(sum);
  for (int64_t j = 0; j < n; ++j) {
    double others = 0;  // exact also where p_j is near 1
    if (r.z[j] == r.m) {
      for (int64_t k = 0; k < n; ++k) others += k == j ? 0 : std::exp(r.z[k] - r.m);
    }
    r.nll.push_back(r.z[j] == r.m ? std::log1p(others) : r.lse - r.z[j]);
    r.p.push_back(std::exp(-r.nll[j]));
    if (r.p[j] > 0) r.entropy += r.p[j] * r.nll[j];
    const double w = p.weight ? c.weight.at(j) : 1;
    const double lambda = mixed ? c.mix.at(row) : 1, keep = 1 - o.smoothing;
    double q = 0;
    if (labels) {
      if (j == r.y) q += lambda;
      if (j == r.y2) q += 1 - lambda;
    } else {
      q = c.prob.at(c.offset(p.target_strides, row, j));
    }
    r.r.push_back(w * (keep * q + o.spread));
    if (r.r[j] != 0) r.loss += r.r[j] * f_value(o, r.nll[j], p.soft());
    if (labels) r.rank += r.z[j] > r.z[r.y];
  }
  r.z_part = o.z_loss * r.lse * r.lse;
  if (labels) r.logprob = -r.nll[r.y];
  return r;
}

// d(out)/dx for upstream g_loss, g_z of the two parts and cotangents of lse, logprob, entropy.
// `scale` receives the size of the largest term that went into an entry: what errors are measured
// against where terms cancel.
std::vector<double> reference_gradient(Case& c, const RefRow& r, double g_loss, double g_z,
                                       const double* cotangents, double* scale = nullptr) {
  if (scale) *scale = 0;
  const int64_t n = c.p.classes;
  if (r.ignored) return std::vector<double>(n, 0.0);
  // A label out of range makes the denominator of a weighted mean NaN, and with it every gradient.
  if (r.bad || std::isnan(g_loss)) return std::vector<double>(n, kNan);
  const RowSoftmaxOptions& o = c.p.options;
  const double c_lse = cotangents ? cotangents[0] : 0, c_logprob = cotangents ? cotangents[1] : 0;
  const double c_entropy = cotangents ? cotangents[2] : 0;
  std::vector<double> g(n), share(n, 0.0);
  double total = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (r.r[j] != 0) share[j] = g_loss * r.r[j] * f_slope(o, r.nll[j], c.p.soft());
    if (j == r.y) share[j] -= c_logprob;
    total += share[j];
  }
  total += c_lse + g_z * 2 * o.z_loss * r.lse;
  for (int64_t j = 0; j < n; ++j) {
    // p_j total - share_j, without cancellation where one share is all there is
    double rest = 0;
    if (r.p[j] > 0.5) {
      for (int64_t k = 0; k < n; ++k) rest += k == j ? 0 : r.p[k];
    } else {
      rest = 1 - r.p[j];
    }
    g[j] = r.p[j] * (total - share[j]) - share[j] * rest;
    if (r.p[j] > 0) g[j] -= c_entropy * r.p[j] * (r.entropy - r.nll[j]);
    if (scale) {
      const double term = std::fmax(std::fabs(r.p[j] * total), std::fabs(share[j] * rest));
      // 1 - tanh^2 has the absolute error of tanh^2.
      const double slope = o.softcap > 0 ? o.logit_scale / o.temperature : r.zp[j];
      *scale = std::fmax(*scale, term * std::fabs(slope));
    }
    g[j] *= r.zp[j];
  }
  return g;
}

// ---- Running -----------------------------------------------------------------------------------

struct Outputs {
  Buffer loss, stats, norm, extras, grad_forward, grad, hvp, hvp_rows, hvp_extras;
  std::vector<int64_t> index;

  std::vector<char> bits() {
    std::vector<char> all;
    for (Buffer* b :
         {&loss, &stats, &norm, &extras, &grad_forward, &grad, &hvp, &hvp_rows, &hvp_extras}) {
      if (!b->bytes.empty()) {
        all.insert(all.end(), b->data(), b->data() + b->size * dtype_size(b->type));
      }
    }
    const char* i = reinterpret_cast<const char*>(index.data());
    all.insert(all.end(), i, i + index.size() * sizeof(int64_t));
    return all;
  }
};

Outputs run(Case& c, int number) {
  shim::start_run(number);
  shim::settings.multiprocessors = c.multiprocessors;
  shim::settings.shared_bytes = c.shared_bytes;
  const RowSoftmaxProblem& p = c.p;
  const int64_t n = p.rows();
  const bool none = p.options.reduction == Reduction::kNone;
  Outputs o;
  o.loss.make(c.real, none ? n : 1);
  o.stats.make(c.real, 6 * n);
  o.norm.make(c.real, kNormCount);
  o.extras.make(c.real, kExtraCount * n);
  o.index.assign(kIndexCount * n, int64_t(shim::settings.poison * 0x0101010101010101ull));
  o.grad.make(p.dtype, c.out_size, c.out_offset);

  RowSoftmaxForward f{};
  f.loss = o.loss.data();
  f.loss_dtype = c.real;
  f.stats = o.stats.data();
  f.norm = o.norm.data();
  f.extras = c.extras ? o.extras.data() : nullptr;
  f.index = c.index ? o.index.data() : nullptr;
  if (c.grad) {
    o.grad_forward.make(p.dtype, c.out_size, c.out_offset);
    f.grad = o.grad_forward.data();
    f.grad_strides = c.out_strides;
  }
  const int64_t bytes = cuda::row_softmax_scratch_bytes(p);
  Buffer scratch;
  scratch.make(DType::kU8, bytes);
  cuda::row_softmax_forward(p, f, scratch.data(), bytes, nullptr);

  RowSoftmaxBackward b{};
  b.grad_loss = c.grad_loss.data();
  b.grad_extras = c.extras ? c.grad_extras.data() : nullptr;
  b.stats = f.stats;
  b.norm = f.norm;
  b.extras = f.extras;
  b.grad = o.grad.data();
  b.grad_strides = c.out_strides;
  cuda::row_softmax_backward(p, b, nullptr);

  // In place: the same bits over the logits.
  Buffer copy = c.x;
  RowSoftmaxProblem in_place = p;
  in_place.x = copy.data();
  RowSoftmaxBackward over = b;
  over.grad = copy.data();
  over.grad_strides = p.x_strides;
  cuda::row_softmax_backward(in_place, over, nullptr);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < p.classes; ++j) {
      const double a = copy.at(c.offset(p.x_strides, r, j));
      const double e = o.grad.at(c.offset(c.out_strides, r, j));
      if (!(a == e || (std::isnan(a) && std::isnan(e)))) {
        throw std::runtime_error("the in-place gradient differs");
      }
    }
  }

  if (!p.soft()) {
    o.hvp.make(p.dtype, c.out_size, c.out_offset);
    o.hvp_rows.make(c.real, n);
    o.hvp_extras.make(c.real, 3 * n);
    RowSoftmaxHvp h{};
    h.backward = b;
    h.backward.grad = o.hvp.data();
    h.v = c.tangent.data();
    h.v_strides = p.x_strides;
    h.grad_rows = o.hvp_rows.data();
    h.grad_grad_extras = c.extras ? o.hvp_extras.data() : nullptr;
    cuda::row_softmax_hvp(p, h, nullptr);
  }
  return o;
}

// ---- Checks ------------------------------------------------------------------------------------

int64_t checked = 0, failed = 0;
std::set<std::string> reported;  // one line per problem and quantity

bool expect(const Case& c, const std::string& what, int64_t row, double got, double want,
            double rel, double abs) {
  ++checked;
  const bool ok = std::isnan(want)   ? std::isnan(got)
                  : std::isinf(want) ? got == want
                                     : std::fabs(got - want) <= abs + rel * std::fabs(want);
  if (!ok && ++failed > 0 && reported.size() < 20 && reported.insert(c.text + what).second) {
    std::printf("FAILED %s row %lld: got %.9g, want %.9g\n  %s\n", what.c_str(),
                static_cast<long long>(row), got, want, c.text.c_str());
  }
  return ok;
}

void check(Case& c, Outputs& o) {
  const RowSoftmaxProblem& p = c.p;
  const RowSoftmaxOptions& opt = p.options;
  const int64_t n = p.rows(), classes = p.classes;
  const bool fp64 = p.dtype == DType::kF64, none = opt.reduction == Reduction::kNone;
  // tau < 1 multiplies the error of the nll by its slope.
  const double rel = (fp64 ? 1e-11 : 2e-5) * (opt.tau < 1 ? 4 : 1) * (opt.softcap > 0 ? 4 : 1);
  const double out_rel = p.dtype == DType::kBF16 ? 0x1p-8 : p.dtype == DType::kF16 ? 0x1p-10 : rel;
  const double out_abs = p.dtype == DType::kF16 ? 1e-7 : fp64 ? 1e-13 : 1e-30;

  std::vector<RefRow> rows;
  double loss_weight = 0, z_weight = 0, weight_sum = 0;
  bool bad_weight = false;
  for (int64_t j = 0; j < classes; ++j) weight_sum += p.weight ? c.weight.at(j) : 1;
  for (int64_t r = 0; r < n; ++r) {
    rows.push_back(reference_row(c, r));
    const RefRow& row = rows.back();
    if (row.ignored) continue;
    double mass = 1;
    if (p.kind != TargetKind::kDense && p.weight) {
      const double lambda = p.kind == TargetKind::kMix ? c.mix.at(r) : 1;
      const auto of = [&](int64_t y) { return in_range(y, classes) ? c.weight.at(y) : kNan; };
      mass = lambda * of(row.y) + (p.kind == TargetKind::kMix ? (1 - lambda) * of(row.y2) : 0);
    }
    loss_weight += mass * row.token;
    z_weight += row.token;
    bad_weight = bad_weight || std::isnan(mass);
  }
  double a = 1, b = 1;
  if (opt.reduction == Reduction::kMean) {
    a = 1 / (opt.num_items > 0 ? opt.num_items : loss_weight);
    b = 1 / (opt.num_items > 0 ? opt.num_items : z_weight);
  }
  bool empty = true;
  for (const RefRow& r : rows) empty = empty && r.ignored;
  if (opt.reduction == Reduction::kMean && opt.num_items <= 0 && opt.zero_if_empty) {
    if (loss_weight == 0) a = 0;
    if (z_weight == 0) b = 0;
  }
  const bool weightless = std::isinf(a);  // only classes of weight 0: 0/0
  expect(c, "norm weight sum", 0, o.norm.at(kNormWeightSum), weight_sum, rel, 0);

  double total = 0;
  for (int64_t r = 0; r < n; ++r) {
    const RefRow& row = rows[r];
    const double loss =
        row.ignored ? 0 : row.token * (a * row.loss + (opt.z_loss != 0 ? b * row.z_part : 0));
    total += loss;
    // The loss of a row whose target is certain is exact to rounding; sums of r_c are not.
    if (none && !(loss > kHuge))
      expect(c, "loss", r, o.loss.at(r), loss, rel,
             fp64 ? 1e-13 : 1e-6 * (1 + std::fabs(row.m)) * row.token * (std::fabs(a)));
    if (c.extras) {
      const double tiny = fp64 ? 1e-12 : 4e-6 * (1 + (opt.softcap > 0) * 4);
      const double lse = o.extras.at(kExtraLse * n + r);
      // Nothing but -inf: -inf is right as well.
      if (!(row.bad && std::isinf(lse))) expect(c, "lse", r, lse, row.lse, rel, tiny);
      if (p.kind != TargetKind::kDense) {
        expect(c, "logprob", r, o.extras.at(kExtraLogprob * n + r), row.logprob, rel, tiny);
      }
      expect(c, "entropy", r, o.extras.at(kExtraEntropy * n + r), row.entropy, rel, tiny * 4);
      const double z_part = o.extras.at(kExtraZLoss * n + r);
      if (!(row.bad && std::isinf(z_part))) {
        expect(c, "z part", r, z_part, opt.z_loss != 0 ? row.z_part : 0, rel * 2, tiny);
      }
    }
    if (c.index) {
      const int64_t argmax = o.index[kIndexArgmax * n + r];
      // A saturated soft cap makes ties that double does not see.
      const bool saturated = opt.softcap > 0 && !fp64 && !row.bad && !row.ignored;
      if (saturated) {
        expect(c, "z of argmax", r, row.z[argmax], row.z[row.argmax], 1e-6, 0);
      } else {
        expect(c, "argmax", r, double(argmax), double(row.argmax), 0, 0);
      }
      if (!row.bad && !saturated)
        expect(c, "rank", r, double(o.index[kIndexRank * n + r]), double(row.rank), 0, 0);
    }

    // Gradients: of the forward for upstream 1, of the backward for the given cotangents.
    const double g = c.grad_loss.at(none ? r : 0) * row.token;
    double cotangents[3] = {0, 0, 0};
    for (int e = 0; c.extras && e < 3; ++e) cotangents[e] = c.grad_extras.at(e * n + r);
    double sa, sb;
    const auto ga = reference_gradient(c, row, row.token * a, row.token * b, nullptr, &sa);
    const auto gb = reference_gradient(c, row, g * a, g * b, cotangents, &sb);
    const auto scale_of = [](const std::vector<double>& v) {
      double s = 0;
      for (double e : v) s = std::fmax(s, std::fabs(e));
      return s;
    };
    // A slope beyond the range of float (tau < 1) leaves nothing to compare.
    const bool finite = !weightless && (row.ignored || row.bad || (sa < kHuge && sb < kHuge));
    const bool one_term = !c.extras && !p.soft() && opt.smoothing == 0 && opt.z_loss == 0 &&
                          p.kind == TargetKind::kIndex && opt.softcap == 0;
    const double share = rel * (one_term ? 0.02 : 1);
    const auto rounded = [&](double v) {  // the element type may overflow
      Buffer one;
      one.make(p.dtype, 1);
      one.set(0, v);
      return std::isinf(one.at(0)) ? one.at(0) : v;
    };
    for (int64_t j = 0; finite && j < classes; ++j) {
      const int64_t at = c.offset(c.out_strides, r, j);
      if (c.grad) {
        expect(c, "gradient in forward", r, o.grad_forward.at(at), rounded(ga[j]), out_rel,
               out_abs + sa * share);
      }
      expect(c, "gradient", r, o.grad.at(at), rounded(gb[j]), out_rel, out_abs + sb * share);
    }

    if (p.soft() || weightless) continue;
    // Second derivative by central differences of the exact gradient.
    if (row.ignored || row.bad || std::isnan(a)) {
      for (int64_t j = 0; j < classes; ++j) {
        expect(c, "hvp", r, o.hvp.at(c.offset(c.out_strides, r, j)), row.ignored ? 0 : kNan, 0, 0);
      }
      continue;
    }
    bool smooth = true;  // no finite difference at -inf or across the truncation
    for (double x : row.x) smooth = smooth && std::isfinite(x);
    if (std::isfinite(opt.max_nll)) smooth = false;
    // The second derivative of (1 - p)^gamma is infinite at p = 1 for gamma < 1.
    if (opt.loss == LossKind::kFocal && opt.gamma < 1 && classes == 1) smooth = false;
    if (!smooth) continue;
    const double step = 1e-5;
    std::vector<double> up = row.x, down = row.x, v(classes);
    double dot = 0, dots[3] = {0, 0, 0};
    const double one[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
    const auto g_row = reference_gradient(c, row, row.token * a, row.token * b, nullptr);
    std::vector<double> g_extra[3];
    for (int e = 0; e < 3; ++e) g_extra[e] = reference_gradient(c, row, 0, 0, one[e]);
    for (int64_t j = 0; j < classes; ++j) {
      v[j] = c.tangent.at(c.offset(p.x_strides, r, j));
      up[j] += step * v[j];
      down[j] -= step * v[j];
      dot += g_row[j] * v[j];
      for (int e = 0; e < 3; ++e) dots[e] += g_extra[e][j] * v[j];
    }
    const auto gu = reference_gradient(c, reference_row(c, r, &up), g * a, g * b, cotangents);
    const auto gd = reference_gradient(c, reference_row(c, r, &down), g * a, g * b, cotangents);
    std::vector<double> want(classes);
    for (int64_t j = 0; j < classes; ++j) want[j] = (gu[j] - gd[j]) / (2 * step);
    const double sh = scale_of(want) + sb + 1e-3;
    const double h_rel = fp64 ? 1e-7 : 2e-4;
    for (int64_t j = 0; j < classes; ++j) {
      expect(c, "hvp", r, o.hvp.at(c.offset(c.out_strides, r, j)), rounded(want[j]),
             std::fmax(out_rel, h_rel), out_abs + h_rel * sh);
    }
    expect(c, "hvp of grad_loss", r, o.hvp_rows.at(r), dot, h_rel, h_rel * (1 + scale_of(g_row)));
    for (int e = 0; c.extras && e < 3; ++e) {
      expect(c, "hvp of grad_extras", r, o.hvp_extras.at(e * n + r), dots[e], h_rel, h_rel * 8);
    }
  }
  if (!none) {
    if (opt.reduction == Reduction::kMean && opt.num_items <= 0 && empty) {
      total = opt.zero_if_empty ? 0 : kNan;
    }
    if (weightless) total = kNan;
    if (bad_weight && opt.reduction == Reduction::kMean && opt.num_items <= 0) total = kNan;
    double size = 0;
    for (const RefRow& row : rows) {
      if (!row.ignored && !row.bad) size += row.token * std::fabs(a) * (1 + std::fabs(row.m));
    }
    if (!(total > kHuge))
      expect(c, "loss", -1, o.loss.at(0), total, rel, (fp64 ? 1e-13 : 1e-6) * size);
  }
}

// ---- Problems ----------------------------------------------------------------------------------

struct Random {
  std::mt19937_64 engine;
  double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }
  double normal() { return std::normal_distribution<double>()(engine); }
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool chance(double p) { return uniform() < p; }
  template <class T>
  T pick(std::initializer_list<T> of) {
    return *(of.begin() + below(int64_t(of.size())));
  }
};

const char* layout_names[] = {"rows", "padded rows", "(N, C, d)", "transposed", "every other"};

void make_case(Random& rnd, Case& c) {
  RowSoftmaxProblem& p = c.p;
  RowSoftmaxOptions& o = p.options;
  p.dtype = rnd.pick({DType::kF64, DType::kF32, DType::kF32, DType::kBF16, DType::kF16});
  c.real = p.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const int layout = rnd.chance(0.5) ? int(rnd.below(2)) : int(rnd.below(5));
  p.classes = rnd.pick<int64_t>({1, 2, 3, 7, 31, 32, 33, 40, 63, 64, 65, 127, 257, 300, 515});
  p.outer = rnd.pick<int64_t>({1, 2, 3, 5});
  if (rnd.chance(0.2)) p.classes = rnd.pick<int64_t>({1100, 2100, 2309});
  if (rnd.chance(0.08)) {  // long enough to split
    p.classes = rnd.pick<int64_t>({4200, 9001, 12345});
    p.outer = rnd.pick<int64_t>({1, 2});
  }
  if (p.classes < 100 && rnd.chance(0.1)) p.outer = 40;
  // Several rows for a team, one after the other.
  if (p.classes > 32 && p.classes < 3000 && rnd.chance(0.15)) p.outer = p.classes > 2048 ? 37 : 90;
  // Enough rows side by side for a lane each, their classes split among warps.
  if (layout == 3 && p.classes > 32 && p.classes < 300 && rnd.chance(0.4)) p.outer = 1100;
  p.inner = layout == 2 ? rnd.pick<int64_t>({1, 2, 5}) : 1;
  const int64_t n = p.rows(), classes = p.classes;

  int64_t x_size = n * classes;
  switch (layout) {
    case 0:
      p.x_strides = {classes, 1, 1};
      break;
    case 1:
      p.x_strides = {classes + rnd.below(9), 1, 1};
      x_size = p.outer * p.x_strides.outer;
      break;
    case 2:
      p.x_strides = {classes * p.inner, p.inner, 1};
      break;
    case 3:
      p.x_strides = {1, p.outer, 1};
      break;
    default:
      p.x_strides = {classes * 2, 2, 1};
      x_size = n * classes * 2;
  }
  c.out_strides = p.x_strides;
  c.out_size = x_size;
  const int64_t x_offset = rnd.chance(0.5) ? 0 : rnd.below(8);
  c.out_offset = rnd.chance(0.7) ? x_offset : rnd.below(8);
  if (rnd.chance(0.15)) {  // a dense output of a strided input
    c.out_strides = {classes * p.inner, p.inner, 1};
    c.out_size = n * classes;
  }

  o.logit_scale = rnd.chance(0.7) ? 1 : rnd.pick({0.5, 1.7, -1.3});
  o.temperature = rnd.chance(0.7) ? 1 : 0.8;
  o.softcap = rnd.chance(0.8) ? 0 : 5;
  o.tau = rnd.chance(0.5) ? 1 : rnd.pick({0.0, 0.5, 0.999999, 1.5, 1.7, 2.0});
  o.max_nll = rnd.chance(0.85) ? kInf : -std::log(0.05);
  o.z_loss = rnd.chance(0.7) ? 0 : 1e-2;
  o.smoothing = rnd.chance(0.7) ? 0 : rnd.pick({0.1, 1.0});
  o.reduction = rnd.pick({Reduction::kNone, Reduction::kMean, Reduction::kSum});
  o.num_items = o.reduction == Reduction::kMean && rnd.chance(0.3) ? 7 : 0;
  o.zero_if_empty = rnd.chance(0.3);
  o.ignore_index = rnd.chance(0.7) ? -100 : 0;
  o.loss = LossKind::kCompSum;
  o.gamma = 0;
  p.kind = rnd.pick({TargetKind::kIndex, TargetKind::kIndex, TargetKind::kMix, TargetKind::kDense});
  if (p.kind != TargetKind::kDense && rnd.chance(0.15)) {
    o.loss = LossKind::kFocal;
    o.gamma = rnd.pick({0.5, 1.0, 2.0});
    o.tau = 1;
    o.smoothing = 0;
  }
  o.poly1 = o.relaxation = o.margin = o.offset = 0;
  if (p.kind != TargetKind::kDense && o.loss == LossKind::kCompSum && rnd.chance(0.3)) {
    o.loss = rnd.pick({LossKind::kPoly1, LossKind::kRelaxed, LossKind::kLdr});
    o.poly1 = rnd.pick({-1.0, 0.5, 2.0});
    o.relaxation = rnd.pick({0.1, 0.6});
    o.offset = std::log(double(p.classes));
    o.tau = 1;
    o.smoothing = 0;
  }
  if (p.kind == TargetKind::kIndex && o.smoothing == 0 && rnd.chance(0.2))
    o.margin = rnd.pick({0.5, 5.0, 200.0});
  if (p.kind == TargetKind::kDense || o.smoothing > 0) o.max_nll = kInf;
  o.spread = o.smoothing / double(p.classes);

  c.x.make(p.dtype, x_size, x_offset);
  c.tangent.make(p.dtype, x_size, x_offset);
  const double spread = rnd.pick({0.5, 3.0, 8.0}),
               shift = rnd.chance(0.8) || o.softcap > 0 ? 0 : 100;
  for (int64_t r = 0; r < n; ++r) {
    const bool masked = o.smoothing == 0 && p.kind != TargetKind::kDense && rnd.chance(0.2);
    for (int64_t j = 0; j < classes; ++j) {
      double v = shift + spread * rnd.normal();
      if (masked && rnd.chance(0.3)) v = o.softcap > 0 ? -1e30 : o.logit_scale > 0 ? -kInf : kInf;
      if (rnd.chance(0.1)) v = std::round(v);  // ties
      c.x.set(c.offset(p.x_strides, r, j), v);
      c.tangent.set(c.offset(p.x_strides, r, j), rnd.normal());
    }
    if (rnd.chance(0.04)) {
      const double sick = rnd.pick({kNan, kInf});
      c.x.set(c.offset(p.x_strides, r, rnd.below(classes)), sick);
      if (rnd.chance(0.5)) c.x.set(c.offset(p.x_strides, r, rnd.below(classes)), sick);
    }
  }
  p.x = c.x.data();

  if (p.kind == TargetKind::kDense) {
    p.target_dtype = rnd.chance(0.5) ? p.dtype : rnd.pick({DType::kF32, DType::kBF16, DType::kF16});
    if (p.dtype == DType::kF64) p.target_dtype = DType::kF64;
    p.target_strides = rnd.chance(0.5) ? Strides{classes * p.inner, p.inner, 1}
                                       : Strides{classes * p.inner, 1, classes};
    c.prob.make(p.target_dtype, n * classes);
    for (int64_t r = 0; r < n; ++r) {
      double sum = 0;
      std::vector<double> q(classes);
      for (double& e : q) sum += e = rnd.chance(0.3) ? 0 : rnd.uniform();
      for (int64_t j = 0; j < classes; ++j) {
        c.prob.set(c.offset(p.target_strides, r, j), sum > 0 ? q[j] / sum : 1.0 / double(classes));
      }
    }
    p.target = c.prob.data();
  } else {
    p.target_dtype = rnd.pick({DType::kI64, DType::kI32, DType::kU8});
    const auto fill = [&](std::vector<char>* labels) {
      labels->assign(n * dtype_size(p.target_dtype), 0);
      for (int64_t r = 0; r < n; ++r) {
        int64_t y = rnd.below(classes);
        if (rnd.chance(0.15)) y = o.ignore_index;
        if (rnd.chance(0.03)) y = rnd.pick<int64_t>({classes, classes + 1000, -1});
        if (p.target_dtype == DType::kU8) (*labels)[r] = char(uint8_t(y));
        if (p.target_dtype == DType::kI32)
          reinterpret_cast<int32_t*>(labels->data())[r] = int32_t(y);
        if (p.target_dtype == DType::kI64) reinterpret_cast<int64_t*>(labels->data())[r] = y;
      }
    };
    fill(&c.labels);
    p.target = c.labels.data();
    if (p.kind == TargetKind::kMix) {
      fill(&c.labels2);
      if (rnd.chance(0.2)) c.labels2 = c.labels;
      p.target2 = c.labels2.data();
      c.mix.make(c.real, n);
      for (int64_t r = 0; r < n; ++r) c.mix.set(r, rnd.pick({0.0, 0.3, 0.9, 1.0}));
      p.mix = c.mix.data();
    }
    // An ignored row must not be read: whatever comes from it would be NaN.
    for (int64_t r = 0; r < n; ++r) {
      if (!reference_row(c, r).ignored) continue;
      for (int64_t j = 0; j < classes; ++j) c.x.set(c.offset(p.x_strides, r, j), kNan);
    }
  }
  if (rnd.chance(0.3)) {
    c.weight.make(c.real, classes);
    for (int64_t j = 0; j < classes; ++j)
      c.weight.set(j, rnd.chance(0.1) ? 0 : 0.5 + rnd.uniform());
    p.weight = c.weight.data();
  }
  if (rnd.chance(0.2)) {
    c.token.make(c.real, n);
    for (int64_t r = 0; r < n; ++r) c.token.set(r, 0.5 + rnd.uniform());
    p.token_weight = c.token.data();
  }
  c.extras = rnd.chance(0.3);
  c.index = rnd.chance(0.4);
  c.grad = o.reduction != Reduction::kNone && !c.extras && rnd.chance(0.7);
  c.grad_loss.make(c.real, n);
  c.grad_extras.make(c.real, 3 * n);
  for (int64_t r = 0; r < n; ++r) c.grad_loss.set(r, rnd.normal());
  for (int64_t r = 0; r < 3 * n; ++r) {
    const bool none = p.kind == TargetKind::kDense && r / n == kExtraLogprob;  // has no label
    c.grad_extras.set(r, none ? 0 : rnd.normal());
  }
  c.multiprocessors = rnd.pick({1, 4, 64});
  c.shared_bytes = rnd.chance(0.7) ? 228 * 1024 : 20 * 1024;

  char text[512];
  std::snprintf(
      text, sizeof text,
      "dtype %d kind %d layout %s outer %lld inner %lld classes %lld tau %g max_nll %g "
      "focal %d gamma %g margin %g z %g smooth %g reduction %d num %g cap %g scale %g temp %g "
      "weight %d token %d extras %d index %d grad %d sm %d shared %d",
      int(p.dtype), int(p.kind), layout_names[layout], (long long)p.outer, (long long)p.inner,
      (long long)p.classes, o.tau, o.max_nll, int(o.loss), o.gamma, o.margin, o.z_loss, o.smoothing,
      int(o.reduction), o.num_items, o.softcap, o.logit_scale, o.temperature, p.weight != nullptr,
      p.token_weight != nullptr, c.extras, c.index, c.grad, c.multiprocessors, c.shared_bytes);
  c.text = text;
}

// ---- The small things --------------------------------------------------------------------------

void require(bool ok, const char* what) {
  ++checked;
  if (ok) return;
  ++failed;
  std::printf("FAILED %s\n", what);
}

void check_scale() {
  for (DType t : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16}) {
    const DType real = t == DType::kF64 ? t : DType::kF32;
    for (int64_t offset : {0, 1, 3}) {
      for (int64_t n : {1, 5, 100, 5000}) {
        for (double by : {1.0, -0.5, HUGE_VAL}) {
          Buffer b, factor;
          b.make(t, n, offset);
          factor.make(real, 1);
          factor.set(0, by);
          for (int64_t i = 0; i < n; ++i) b.set(i, double(i % 17));
          cuda::scale_inplace(b.data(), t, n, factor.data(), nullptr);
          bool ok = true;
          for (int64_t i = 0; i < n; ++i) {
            ok = ok && b.at(i) == (i % 17 == 0 ? 0.0 : by * double(i % 17));
          }
          require(ok, "scale_inplace");
        }
      }
    }
  }
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __shfl_xor_sync(0xffffffffu, 0, 1);
  }
}

void check_shim() {
  bool caught = false;
  try {
    shim::run(dim3(1), dim3(32), 0, [] { divergent_kernel(); });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  require(caught, "a divergent barrier is reported");
}

// No rows: a mean is 0/0, or 0 when asked for; a sum is 0.
void check_empty() {
  for (int64_t classes : {0, 5, 40}) {
    for (int wanted = 0; wanted < 3; ++wanted) {
      RowSoftmaxProblem p{};
      p.inner = 1;
      p.classes = classes;
      p.dtype = DType::kF32;
      p.x_strides = {classes, 1, 1};
      p.target_dtype = DType::kI64;
      p.options.logit_scale = p.options.temperature = p.options.tau = 1;
      p.options.max_nll = kInf;
      p.options.reduction = wanted == 2 ? Reduction::kSum : Reduction::kMean;
      p.options.zero_if_empty = wanted == 1;
      Buffer loss, norm;
      loss.make(DType::kF32, 1);
      norm.make(DType::kF32, kNormCount);
      RowSoftmaxForward f{};
      f.loss = loss.data();
      f.loss_dtype = DType::kF32;
      f.norm = norm.data();
      cuda::row_softmax_forward(p, f, nullptr, 0, nullptr);
      cuda::row_softmax_backward(p, {}, nullptr);
      require(wanted == 0 ? std::isnan(loss.at(0)) : loss.at(0) == 0, "no rows");
    }
  }
}

// The relative error of fp32 losses and gradients over thirty decades, far from zero too.
void check_accuracy() {
  for (double tau : {0.0, 0.5, 1.0, 1.7, 2.0}) {
    for (double shift : {0.0, 1e4}) {
      Case c;
      RowSoftmaxProblem& p = c.p;
      const int64_t n = 24, classes = 300;
      p.outer = n;
      p.inner = 1;
      p.classes = classes;
      p.dtype = DType::kF32;
      p.x_strides = c.out_strides = {classes, 1, 1};
      p.target_dtype = DType::kI64;
      p.options.logit_scale = p.options.temperature = 1;
      p.options.tau = tau;
      p.options.max_nll = kInf;
      p.options.ignore_index = -100;
      p.options.reduction = Reduction::kNone;
      c.out_size = n * classes;
      c.multiprocessors = 4;
      c.shared_bytes = 228 * 1024;
      c.x.make(DType::kF32, n * classes);
      c.tangent.make(DType::kF32, n * classes);
      c.grad_loss.make(DType::kF32, n);
      c.labels.resize(n * sizeof(int64_t));
      Random rnd{std::mt19937_64(5)};
      for (int64_t r = 0; r < n; ++r) {
        const int64_t y = rnd.below(classes);
        reinterpret_cast<int64_t*>(c.labels.data())[r] = y;
        c.grad_loss.set(r, 1);
        for (int64_t j = 0; j < classes; ++j) {
          c.x.set(r * classes + j, shift + rnd.normal() + (j == y ? 3.5 * double(r) - 12 : 0));
          c.tangent.set(r * classes + j, 0);
        }
      }
      p.x = c.x.data();
      p.target = c.labels.data();
      Outputs o = run(c, 0);
      char text[64];
      std::snprintf(text, sizeof text, "tau %g shift %g", tau, shift);
      c.text = text;
      for (int64_t r = 0; r < n; ++r) {
        const RefRow row = reference_row(c, r);
        const double nll = row.nll[row.y];
        const auto bound = [&](double v) {
          return (8 + std::fabs(std::log(std::fabs(v))) + std::fabs(1 - tau) * nll) * 0x1p-23;
        };
        expect(c, "accurate loss", r, o.loss.at(r), row.loss, bound(row.loss), 0);
        const auto g = reference_gradient(c, row, 1, 1, nullptr);
        for (int64_t j = 0; j < classes; ++j) {
          if (std::fabs(g[j]) < 1e-30) continue;
          expect(c, "accurate gradient", r, o.grad.at(r * classes + j), g[j], bound(g[j]), 0);
        }
      }
    }
  }
}

// Sums over rows in several blocks.
void check_many_rows() {
  Case c;
  RowSoftmaxProblem& p = c.p;
  const int64_t n = 20000, classes = 2;
  p.outer = n;
  p.inner = 1;
  p.classes = classes;
  p.dtype = DType::kF32;
  p.x_strides = {classes, 1, 1};
  p.target_dtype = DType::kI64;
  p.options.logit_scale = p.options.temperature = p.options.tau = 1;
  p.options.max_nll = kInf;
  p.options.ignore_index = -100;
  p.options.reduction = Reduction::kMean;
  Buffer x, loss, stats, norm, scratch;
  x.make(DType::kF32, n * classes);
  std::vector<int64_t> y(n);
  double want = 0;
  int64_t rows = 0;
  for (int64_t r = 0; r < n; ++r) {
    const double d = double(r % 13) / 4;
    x.set(2 * r, d);
    x.set(2 * r + 1, 0);
    y[r] = r % 7 == 0 ? -100 : r % 2;
    if (y[r] < 0) continue;
    want += std::log1p(std::exp(y[r] == 0 ? -d : d));
    ++rows;
  }
  p.x = x.data();
  p.target = y.data();
  loss.make(DType::kF32, 1);
  stats.make(DType::kF32, 4 * n);
  norm.make(DType::kF32, kNormCount);
  const int64_t bytes = cuda::row_softmax_scratch_bytes(p);
  require(bytes > 0, "scratch for partial sums");
  scratch.make(DType::kU8, bytes);
  RowSoftmaxForward f{};
  f.loss = loss.data();
  f.loss_dtype = DType::kF32;
  f.stats = stats.data();
  f.norm = norm.data();
  cuda::row_softmax_forward(p, f, scratch.data(), bytes, nullptr);
  expect(c, "mean of many rows", -1, loss.at(0), want / double(rows), 1e-6, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  const uint64_t seed = argc > 2 ? uint64_t(std::atoll(argv[2])) : 0;
  const bool few = argc > 3 && std::strcmp(argv[3], "--few") == 0;
  const int64_t only = argc > 3 && !few ? std::atoll(argv[3]) : -1;
  for (int64_t i = 0; i < cases; ++i) {
    if (only >= 0 && i != only) continue;
    Random rnd{std::mt19937_64(seed * 1000003 + uint64_t(i))};
    Case c;
    shim::start_run(0);
    make_case(rnd, c);
    c.text = "problem " + std::to_string(i) + ": " + c.text;
    try {
      std::vector<char> first;
      for (int k = 0; k < shim::kRuns; ++k) {
        Outputs o = run(c, k);
        if (k == 0) {
          check(c, o);
          first = o.bits();
        } else {
          ++checked;
          const std::vector<char> later = o.bits();
          if (!shim::same_bytes(first.data(), later.data(), first.size(), k) && ++failed <= 20) {
            std::printf("FAILED: the order of threads, or old memory, changes the result\n  %s\n",
                        c.text.c_str());
          }
        }
      }
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED: %s\n  %s\n", e.what(), c.text.c_str());
    }
  }
  shim::settings = {};
  if (only < 0) {
    check_scale();
    check_shim();
    check_empty();
    if (!few) {
      check_many_rows();
      check_accuracy();
    }
  }
  std::printf("%lld problems, %lld checks, %lld failed\n", static_cast<long long>(cases),
              static_cast<long long>(checked), static_cast<long long>(failed));
  return failed != 0 || checked == 0;
}
