// Runs the CUDA sorting networks on the CPU shim, over random problems, and compares them with
// plain loops in double over lists of comparators. Nothing here knows how the kernels work.
// Every problem runs in four thread orders and over other rests of memory, whose outputs must be
// equal to the last bit.
// Arguments: number of problems, seed, and optionally the only problem to run, or --few: without
// the large ones.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>

#include "cuda/sorting_network.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using cuda::SortingCall;
using cuda::SortingTask;
using sorting::Distribution;
using sorting::Network;
using Doubles = std::vector<double>;

const double kNan = std::nan(""), kInf = HUGE_VAL;
int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

// ---- The definition ----------------------------------------------------------------------------

using Layers = std::vector<std::vector<std::pair<int, int>>>;  // (lo, hi)

Layers network(Network kind, int n) {
  Layers layers;
  int t = 0;
  while ((1 << t) < n) ++t;
  if (kind == Network::kBitonic) {
    const int wires = 1 << t, absent = wires - n;
    for (int block = 0; block < t; ++block) {
      for (int step = 0; step <= block; ++step) {
        const int m = 1 << (block - step);
        layers.emplace_back();
        for (int i = absent; i < wires; ++i) {
          if (i & m) continue;
          const int a = i - absent, b = a + m;
          layers.back().push_back((i >> (block + 1)) & 1 ? std::pair{b, a} : std::pair{a, b});
        }
      }
    }
  } else if (kind == Network::kOddEven) {
    for (int l = 0; l < n && n > 1; ++l) {
      layers.emplace_back();
      for (int i = l % 2; i + 1 < n; i += 2) layers.back().push_back({i, i + 1});
    }
  } else if (kind == Network::kBatcher) {
    for (int p = (1 << t) / 2; p > 0; p /= 2) {
      for (int q = (1 << t) / 2, r = 0, d = p;; d = q - p, q /= 2, r = p) {
        layers.emplace_back();
        for (int i = 0; i + d < n; ++i) {
          if ((i & p) == r) layers.back().push_back({i, i + d});
        }
        if (q == p) break;
      }
    }
  } else {
    // Any list of comparators is a network for the kernels that read a table.
    for (int l = 0; l < 2 * n / 3; ++l) {
      layers.emplace_back();
      for (int i = l % 3; i + 2 < n; i += 4 - l % 2) {
        layers.back().push_back(l % 4 ? std::pair{i, i + 2} : std::pair{i + 1, i});
      }
    }
  }
  return layers;
}

struct Mix {
  double alpha, beta, slope, d, lo, hi;
};

Mix compare(Distribution kind, double s, double lambda, double lo, double hi) {
  const double d = hi - lo, g = std::fabs(d), pi = std::acos(-1.0);
  if (std::isnan(lo) || std::isnan(hi)) return {kNan, kNan, kNan, kNan, kNan, kNan};
  if (std::isinf(lo) || std::isinf(hi) || std::isinf(s * d)) {
    if (lo == hi) return {0.5, 0.5, 0, 0, lo, hi};
    const bool ordered = lo < hi;
    return {ordered ? 1.0 : 0.0, ordered ? 0.0 : 1.0, 0, 0, std::min(lo, hi), std::max(lo, hi)};
  }
  const double u = s * g;
  double tau = 0, slope = 0;
  switch (kind) {
    case Distribution::kLogistic:
      tau = std::exp(-u) / (1 + std::exp(-u));
      slope = s * tau * (1 - tau);
      break;
    case Distribution::kLogisticPhi: {
      const double w = g + 1e-10, v = u * std::pow(w, -lambda);
      tau = std::exp(-v) / (1 + std::exp(-v));
      slope = s * std::pow(w, -lambda) * (1 - lambda * g / w) * tau * (1 - tau);
      break;
    }
    case Distribution::kGaussian:
      tau = std::erfc(u / std::sqrt(2.0)) / 2;
      slope = s * std::exp(-u * u / 2) / std::sqrt(2 * pi);
      break;
    case Distribution::kCauchy:
      tau = u > 1 ? std::atan(1 / u) / pi : 0.5 - std::atan(u) / pi;
      slope = s / (pi * (1 + u * u));
      break;
    case Distribution::kReciprocal:
      tau = 1 / (2 + u);
      slope = s / ((2 + u) * (2 + u));
      break;
    case Distribution::kOptimal:
      tau = u <= 0.25 ? 0.5 - u : 1 / (16 * u);
      slope = u <= 0.25 ? s : s / (16 * u * u);
      break;
  }
  const double alpha = d < 0 ? tau : 1 - tau, beta = d < 0 ? 1 - tau : tau;
  return {alpha, beta, slope, d, std::min(lo, hi) + tau * g, std::max(lo, hi) - tau * g};
}

// One item.
struct Reference {
  const Layers& layers;
  int n;
  Doubles x, y;
  std::vector<std::vector<Mix>> mixes;
  std::vector<Doubles> alpha_grad;
  bool bad = false;

  Reference(const Layers& l, Distribution kind, double s, double lambda, const double* values,
            int count)
      : layers(l), n(count), x(values, values + count), y(x) {
    for (double v : x) bad |= std::isnan(v);
    for (const auto& layer : layers) {
      mixes.emplace_back();
      for (const auto& [lo, hi] : layer) {
        const Mix m = compare(kind, s, lambda, y[size_t(lo)], y[size_t(hi)]);
        mixes.back().push_back(m);
        y[size_t(lo)] = m.lo;
        y[size_t(hi)] = m.hi;
      }
      alpha_grad.emplace_back(layer.size(), 0.0);
    }
    if (bad) y.assign(size_t(n), kNan);
  }

  // A row through the layers; with t, x_lo - x_hi before each comparator.
  void push(Doubles* row, bool reversed, std::vector<Doubles>* t) const {
    const size_t count = layers.size();
    if (t) t->assign(count, {});
    for (size_t k = 0; k < count; ++k) {
      const size_t l = reversed ? count - 1 - k : k;
      for (size_t c = 0; c < layers[l].size(); ++c) {
        double &lo = (*row)[size_t(layers[l][c].first)], &hi = (*row)[size_t(layers[l][c].second)];
        const Mix& m = mixes[l][c];
        if (t) (*t)[l].push_back(lo - hi);
        const double a = lo, b = hi;
        lo = m.alpha * a + m.beta * b;
        hi = m.beta * a + m.alpha * b;
      }
    }
  }
  // Back, from the gradient of the pushed row to that of the row.
  void pull(Doubles* g, bool reversed, const std::vector<Doubles>& t) {
    const size_t count = layers.size();
    for (size_t k = 0; k < count; ++k) {
      const size_t l = reversed ? k : count - 1 - k;
      for (size_t c = 0; c < layers[l].size(); ++c) {
        double &lo = (*g)[size_t(layers[l][c].first)], &hi = (*g)[size_t(layers[l][c].second)];
        alpha_grad[l][c] += (lo - hi) * t[l][c];
        const double a = lo, b = hi;
        lo = mixes[l][c].alpha * a + mixes[l][c].beta * b;
        hi = mixes[l][c].beta * a + mixes[l][c].alpha * b;
      }
    }
  }
  Doubles values_backward(Doubles g) const {
    for (size_t l = layers.size(); l-- > 0;) {
      for (size_t c = 0; c < layers[l].size(); ++c) {
        double &lo = g[size_t(layers[l][c].first)], &hi = g[size_t(layers[l][c].second)];
        const Mix& m = mixes[l][c];
        const double e = (alpha_grad[l][c] - (lo - hi) * m.d) * m.slope, a = lo, b = hi;
        lo = m.alpha * a + m.beta * b - e;
        hi = m.beta * a + m.alpha * b + e;
      }
    }
    for (int i = 0; i < n; ++i) {
      if (std::isinf(x[size_t(i)])) g[size_t(i)] = 0;
      if (bad) g[size_t(i)] = kNan;
    }
    return g;
  }
};

// ---- Problems ----------------------------------------------------------------------------------

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  double unit() { return double(engine() >> 11) * 0x1p-53; }
  bool chance(double p) { return unit() < p; }
  double normal() { return std::normal_distribution<double>()(engine); }
};

// A buffer of float or double, between guards.
struct Buffer {
  std::vector<unsigned char> bytes;
  bool wide;
  size_t count;
  static constexpr size_t kGuard = 64;

  void make(size_t n, bool is_wide, unsigned char fill) {
    count = n, wide = is_wide;
    bytes.assign(n * (wide ? 8 : 4) + 2 * kGuard, fill);
  }
  void* data() { return bytes.data() + kGuard; }
  double get(size_t i) const {
    if (wide) {
      double v;
      std::memcpy(&v, bytes.data() + kGuard + 8 * i, 8);
      return v;
    }
    float v;
    std::memcpy(&v, bytes.data() + kGuard + 4 * i, 4);
    return double(v);
  }
  // Returns what is stored.
  double put(size_t i, double v) {
    if (wide) {
      std::memcpy(bytes.data() + kGuard + 8 * i, &v, 8);
      return v;
    }
    const float f = float(v);
    std::memcpy(bytes.data() + kGuard + 4 * i, &f, 4);
    return double(f);
  }
  bool guards(unsigned char fill) const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (bytes[i] != fill || bytes[bytes.size() - 1 - i] != fill) return false;
    }
    return true;
  }
};

struct Case {
  sorting::Problem p{};
  SortingCall c{};
  Layers layers;
  std::vector<int32_t> table, offsets, first, count;
  Buffer x, f, g, gy;
  Doubles xs, fs, gs, gys;
  std::string text;
  int orders = 4;
  bool wide() const { return p.dtype == DType::kF64; }
};

const char* kTasks[] = {"sort",        "sort_bwd",        "apply", "apply_bwd",
                        "permutation", "permutation_bwd", "loss"};

void prepare(Case& c) {
  const sorting::Problem& p = c.p;
  const bool splitter = p.network == Network::kSplitter;
  c.layers = network(p.network, int(p.n));
  if (splitter) {
    c.offsets = {0};
    for (const auto& layer : c.layers) {
      for (const auto& [lo, hi] : layer) c.table.push_back(lo), c.table.push_back(hi);
      c.offsets.push_back(int32_t(c.table.size() / 2));
    }
    c.p.table = c.table.data();
    c.p.offsets = c.offsets.data();
    c.p.layers = int32_t(c.layers.size());
  }
  c.text = std::string(kTasks[int(c.c.task)]) + " " + std::to_string(p.items) + "x" +
           std::to_string(p.n) + " network " + std::to_string(int(p.network)) + " distribution " +
           std::to_string(int(p.distribution)) + (c.wide() ? " f64" : " f32") + " s " +
           std::to_string(p.steepness) + " width " + std::to_string(c.c.features.width) +
           " shared " + std::to_string(shim::settings.shared_bytes) + " SMs " +
           std::to_string(shim::settings.multiprocessors);
}

void fill(Random& rnd, Buffer& b, Doubles& values, size_t n, bool wide,
          const std::function<double()>& make) {
  b.make(n, wide, 0x7b);
  values.resize(n);
  for (size_t i = 0; i < n; ++i) values[i] = b.put(i, make());
  (void)rnd;
}

bool is_apply(SortingTask t) {
  return t == SortingTask::kApply || t == SortingTask::kApplyBackward;
}

// `odd`: probability of each of infinity, a tie and NaN.
void fill_inputs(Random& rnd, Case& c, double odd) {
  const sorting::Problem& p = c.p;
  const size_t values = size_t(p.items * p.n);
  double last = 0;
  fill(rnd, c.x, c.xs, values, c.wide(), [&] {
    const double r = rnd.unit();
    if (r < odd) return rnd.chance(0.5) ? kInf : -kInf;
    if (r < 2 * odd) return last;
    return last = rnd.normal();
  });
  if (odd > 0 && rnd.chance(0.3)) {
    for (size_t k = size_t(1 + rnd.below(3)); k > 0; --k) {
      const size_t i = size_t(rnd.below(int64_t(values)));
      c.xs[i] = c.x.put(i, kNan);
    }
  }
  const auto normal = [&] { return rnd.normal(); };
  const size_t entries = size_t(p.n * (is_apply(c.c.task) ? c.c.features.width : p.n));
  if (is_apply(c.c.task)) {
    fill(rnd, c.f, c.fs, entries * (c.c.features.shared ? 1 : size_t(p.items)), c.wide(), normal);
  }
  if (c.c.task == SortingTask::kApplyBackward || c.c.task == SortingTask::kPermutationBackward) {
    fill(rnd, c.g, c.gs, entries * size_t(p.items), c.wide(), normal);
  }
  fill(rnd, c.gy, c.gys, values, c.wide(), normal);
  for (size_t i = 0; i < values; ++i) {
    c.first.push_back(int32_t(rnd.below(p.n)));
    c.count.push_back(int32_t(rnd.chance(0.8) ? 1 : 1 + rnd.below(3)));
    if (rnd.chance(0.02)) c.first.back() = rnd.chance(0.5) ? -7 : INT32_MAX;
  }
}

struct Results {
  Doubles y, out, loss, gx, gf;
};

Results expected(const Case& c) {
  const sorting::Problem& p = c.p;
  const size_t n = size_t(p.n), items = size_t(p.items), width = size_t(c.c.features.width);
  const SortingTask task = c.c.task;
  Results r;
  if (c.c.features.shared) r.gf.assign(n * width, 0.0);
  for (size_t item = 0; item < items; ++item) {
    Reference ref(c.layers, p.distribution, p.steepness, p.art_lambda, &c.xs[item * n], int(n));
    Doubles gy(n, 0.0);
    if (task == SortingTask::kSortBackward ||
        (task == SortingTask::kPermutationBackward && c.c.gy)) {
      gy.assign(c.gys.begin() + long(item * n), c.gys.begin() + long(item * n + n));
    }
    r.y.insert(r.y.end(), ref.y.begin(), ref.y.end());
    const bool apply = is_apply(task), sort = task <= SortingTask::kSortBackward;
    const size_t rows = sort ? 0 : apply ? width : n;
    const bool reversed = apply && !c.c.features.transpose;
    Doubles out(n * rows), gf(n * rows);
    double loss = 0;
    for (size_t k = 0; k < rows; ++k) {
      Doubles row(n, 0.0);
      if (!apply) row[k] = 1;
      for (size_t i = 0; i < n && apply; ++i) {
        row[i] = c.fs[((c.c.features.shared ? 0 : item * n) + i) * width + k];
      }
      std::vector<Doubles> t;
      ref.push(&row, reversed, &t);
      if (ref.bad) row.assign(n, kNan);
      const auto at = [&](size_t i) { return apply ? i * rows + k : k * n + i; };
      for (size_t i = 0; i < n; ++i) out[at(i)] = row[i];
      Doubles g(n, 0.0);
      if (task == SortingTask::kLoss) {
        for (size_t i = 0; i < n; ++i) {
          const int64_t a = c.first[item * n + k], count = c.c.count ? c.count[item * n + k] : 1;
          const double q = int64_t(i) >= a && int64_t(i) < a + count ? 1.0 / double(count) : 0.0;
          const double v = row[i];
          if (c.c.loss_kind == sorting::Loss::kBce) {
            const double v1 = v > 1 ? 1.0 : v, mean = 1.0 / double(n * n);
            loss -= mean * (q * std::fmax(std::log(v1), -100) +
                            (1 - q) * std::fmax(std::log1p(-v1), -100));
            g[i] = mean * (v1 - q) / std::fmax(v1 * (1 - v1), 1e-12);
          } else if (q > 0) {
            loss -= q * std::log(std::fmax(v, 1e-30)) / double(n);
            g[i] = v < 1e-30 ? 0 : -q / v / double(n);
          }
          if (ref.bad) loss = kNan;
        }
      } else if (!c.gs.empty()) {
        for (size_t i = 0; i < n; ++i) g[i] = c.gs[item * n * rows + at(i)];
      }
      ref.pull(&g, reversed, t);
      for (size_t i = 0; i < n; ++i) gf[at(i)] = ref.bad ? kNan : g[i];
    }
    r.out.insert(r.out.end(), out.begin(), out.end());
    r.loss.push_back(loss);
    if (c.c.features.shared) {
      for (size_t i = 0; i < gf.size(); ++i) r.gf[i] += gf[i];
    } else {
      r.gf.insert(r.gf.end(), gf.begin(), gf.end());
    }
    const Doubles gx = ref.values_backward(gy);
    r.gx.insert(r.gx.end(), gx.begin(), gx.end());
  }
  return r;
}

// `tolerance` times the largest finite entry, or times each entry itself.
void same(const Case& c, const char* name, const Buffer& found, const Doubles& want,
          double tolerance, bool each) {
  double scale = 0;
  for (double v : want) scale = std::isfinite(v) ? std::fmax(scale, std::fabs(v)) : scale;
  for (size_t i = 0; i < want.size(); ++i) {
    const double v = found.get(i), w = want[i];
    const double bound = each ? std::fabs(w) * tolerance + 1e-36 : scale * tolerance + 1e-30;
    const bool ok = std::isnan(w) ? std::isnan(v) : v == w || std::fabs(v - w) <= bound;
    if (!ok || i == 0) {
      require(ok, c.text + ": " + name + "[" + std::to_string(i) + "] = " + std::to_string(v) +
                      ", not " + std::to_string(w));
    }
    if (!ok) return;
  }
}

void check(Case& c) {
  sorting::Problem& p = c.p;
  SortingCall& call = c.c;
  const SortingTask task = call.task;
  const size_t values = size_t(p.items * p.n);
  const bool has_out = task == SortingTask::kApply || task == SortingTask::kPermutation;
  const size_t row = size_t(task == SortingTask::kApply ? call.features.width : p.n);
  Results want = expected(c);
  struct Outputs {
    Buffer y, out, loss, gx, gf;
  };
  Outputs before;
  for (int order = 0; order < c.orders; ++order) {
    shim::start_run(order);
    const unsigned char fill = shim::settings.poison;
    Outputs o;
    o.y.make(values, c.wide(), fill);
    o.out.make(has_out ? values * row : 0, c.wide(), fill);
    o.loss.make(size_t(p.items), c.wide(), fill);
    o.gx.make(values, c.wide(), fill);
    const bool want_f = task == SortingTask::kApplyBackward && call.gf;
    o.gf.make(want_f ? want.gf.size() : 0, c.wide(), fill);
    p.x = c.x.data();
    call.features.f = is_apply(task) ? c.f.data() : nullptr;
    call.g = c.gs.empty() ? nullptr : c.g.data();
    if (call.gy || task == SortingTask::kSortBackward) call.gy = c.gy.data();
    call.first = c.first.data();
    if (call.count) call.count = c.count.data();
    const bool forward = task == SortingTask::kSort || task == SortingTask::kPermutation;
    call.y = forward ? o.y.data() : nullptr;
    call.out = has_out ? o.out.data() : nullptr;
    call.loss = task == SortingTask::kLoss ? o.loss.data() : nullptr;
    if (call.gx || task == SortingTask::kSortBackward || task == SortingTask::kApplyBackward ||
        task == SortingTask::kPermutationBackward) {
      call.gx = o.gx.data();
    }
    if (want_f) call.gf = o.gf.data();
    try {
      const int64_t bytes = cuda::sorting_scratch_bytes(p, call);
      std::vector<unsigned char> scratch(size_t(bytes) + 512, fill);
      void* start =
          reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 255) / 256 * 256);
      cuda::sorting_run(p, call, bytes ? start : nullptr, bytes, nullptr);
      require(scratch.back() == fill, c.text + ": past the scratch");
    } catch (const std::exception& e) {
      require(false, c.text + ": " + e.what());
      return;
    }
    for (const Buffer* b : {&o.y, &o.out, &o.loss, &o.gx, &o.gf}) {
      require(b->guards(fill), c.text + ": written outside");
    }
    if (order > 0) {
      const auto same = [order](const Buffer& a, const Buffer& b) {
        return shim::same_bytes(a.bytes.data(), b.bytes.data(), a.bytes.size(), order);
      };
      require(same(before.y, o.y) && same(before.out, o.out) && same(before.loss, o.loss) &&
                  same(before.gx, o.gx) && same(before.gf, o.gf),
              c.text + ": depends on the order of the threads, or on old memory");
      continue;
    }
    before = o;
    const double eps = c.wide() ? 1e-12 : 1e-5;
    const double steep = std::fmax(1.0, p.steepness), many = 1 + 0.1 * double(c.layers.size());
    if (call.y) same(c, "y", o.y, want.y, eps * steep, false);
    if (task == SortingTask::kPermutation) same(c, "P", o.out, want.out, eps * steep * many, true);
    if (task == SortingTask::kApply) same(c, "out", o.out, want.out, eps * steep * many, false);
    if (call.loss) same(c, "loss", o.loss, want.loss, 10 * eps * steep, false);
    if (call.gx) {
      same(c, "gx", o.gx, want.gx, (call.loss ? 100 : 10) * eps * steep * many, false);
    }
    if (want_f) same(c, "gf", o.gf, want.gf, 10 * eps * steep * many, false);
  }
}

void choose(Random& rnd, Case& c, SortingTask task) {
  c.c.task = task;
  c.c.features.transpose = rnd.chance(0.5);
  c.c.features.shared = is_apply(task) && rnd.chance(0.4);
  c.c.features.width = is_apply(task) ? rnd.below(20) / 2 + (rnd.chance(0.9) ? 1 : 0) : 0;
  c.c.loss_kind = sorting::Loss(rnd.below(3));
  // Any address says "wanted"; check() sets it.
  if (task == SortingTask::kPermutationBackward && rnd.chance(0.5)) c.c.gy = &c;
  if (task == SortingTask::kLoss && rnd.chance(0.8)) c.c.gx = &c;
  if (task == SortingTask::kApplyBackward && rnd.chance(0.7)) c.c.gf = &c;
  static const int32_t some = 1;
  if (rnd.chance(0.6)) c.c.count = &some;
  c.p.art_lambda = rnd.chance(0.5) ? 0.25 : 0.4;
}

void random_case(Random& rnd, int64_t number) {
  Case c;
  const SortingTask task = SortingTask(number % cuda::kSortingTaskCount);
  c.p.network = Network(rnd.below(4));
  c.p.distribution = Distribution(rnd.below(6));
  // Derivatives of logistic_phi at near ties are beyond float.
  const bool phi = c.p.distribution == Distribution::kLogisticPhi;
  c.p.dtype = phi || rnd.chance(0.5) ? DType::kF64 : DType::kF32;
  const double r = rnd.unit();
  c.p.n = r < 0.85 ? 1 + rnd.below(40) : r < 0.9 ? 41 + rnd.below(60) : r < 0.95 ? 100 : 128;
  c.p.items = c.p.n > 40 ? 1 : 1 + rnd.below(c.p.n < 5 ? 40 : 5);
  // bce's gradient 1 / (1 - p) amplifies the rounding of a p near 1.
  const bool loss = task == SortingTask::kLoss;
  c.p.steepness = loss && c.p.dtype == DType::kF32 ? 0.7 : rnd.chance(0.3) ? 1.3 : 10.0;
  shim::settings.multiprocessors = int(1 + rnd.below(5));
  const int shared[] = {228, 164, 24, 9};
  const int kib = shared[rnd.below(c.p.n > 40 ? 3 : 4)];
  shim::settings.shared_bytes = kib * 1024;
  if (rnd.chance(0.3)) c.c.scratch_limit = 1 + rnd.below(20000);
  choose(rnd, c, task);
  prepare(c);
  c.text = "problem " + std::to_string(number) + ": " + c.text;
  fill_inputs(rnd, c, rnd.chance(0.5) ? 0.06 : 0.0);
  check(c);
}

// Chosen sizes, without what is odd about values.
void sized(SortingTask task, Network network, int64_t items, int64_t n, int64_t width, DType dtype,
           int shared_kib, int orders, int64_t scratch_limit = 0) {
  Random rnd{std::mt19937_64(1 + uint64_t(n))};
  Case c;
  if (scratch_limit > 0) c.c.scratch_limit = scratch_limit;
  c.p.network = network;
  c.p.distribution = Distribution::kCauchy;
  c.p.dtype = dtype;
  c.p.n = n;
  c.p.items = items;
  c.p.steepness = 2;
  shim::settings.multiprocessors = 2;
  shim::settings.shared_bytes = shared_kib * 1024;
  choose(rnd, c, task);
  if (is_apply(task)) c.c.features.width = width;
  c.orders = orders;
  prepare(c);
  fill_inputs(rnd, c, 0.0);
  check(c);
}

void check_sizes(bool few) {
  using T = SortingTask;
  const DType f32 = DType::kF32, f64 = DType::kF64;
  // Several tiles of rows a block, forward.
  sized(T::kPermutation, Network::kBitonic, 1, 100, 0, f64, 228, 2, 1);
  sized(T::kApply, Network::kOddEven, 2, 60, 33, f32, 228, 2, 1);
  // A window and single layers.
  sized(T::kSortBackward, Network::kBitonic, 1, 4097, 0, f32, 228, 1);
  if (few) return;
  // All rows of t in shared memory; in segments; in global memory.
  for (int kib : {228, 40, 16}) {
    sized(T::kPermutationBackward, Network::kBitonic, 1, 100, 0, f64, kib, 1);
    sized(T::kPermutationBackward, Network::kOddEven, 1, 70, 0, f64, kib, 1);
    sized(T::kLoss, Network::kBatcher, 1, 128, 0, f64, kib, 1);
  }
  // More than a comparator a thread, and features of large rows.
  sized(T::kApplyBackward, Network::kBitonic, 1, 1100, 3, f64, 228, 2);
  sized(T::kApplyBackward, Network::kBatcher, 1, 1030, 4, f32, 100, 1);
  sized(T::kPermutation, Network::kBitonic, 1, 300, 0, f32, 228, 1);
  sized(T::kSortBackward, Network::kBitonic, 1, 4096, 0, f64, 228, 1);
  sized(T::kSort, Network::kBatcher, 1, 3000, 0, f32, 228, 1);
  // Beyond one block: windows and single layers.
  sized(T::kSort, Network::kBitonic, 2, 9000, 0, f64, 228, 2);
  sized(T::kSortBackward, Network::kBitonic, 1, 16384, 0, f64, 228, 1);
  sized(T::kApplyBackward, Network::kBitonic, 1, 5000, 2, f64, 228, 1);
  sized(T::kApply, Network::kBatcher, 1, 5000, 1, f64, 228, 1);
  sized(T::kSortBackward, Network::kBatcher, 1, 4500, 0, f64, 228, 1);
  sized(T::kSort, Network::kOddEven, 1, 4099, 0, f32, 228, 1);
  sized(T::kSortBackward, Network::kOddEven, 1, 4100, 0, f64, 228, 1);
  sized(T::kApply, Network::kOddEven, 1, 4098, 1, f64, 228, 1);
}

// The loops above against difference quotients, so that one mistake cannot be in both.
void check_reference() {
  Random rnd{std::mt19937_64(3)};
  for (int kind = 0; kind < 4; ++kind) {
    Case c;
    c.p.network = Network(kind);
    c.p.distribution = Distribution::kGaussian;
    c.p.dtype = DType::kF64;
    c.p.n = 6;
    c.p.items = 1;
    c.p.steepness = 1.5;
    choose(rnd, c, SortingTask::kLoss);
    c.c.loss_kind = sorting::Loss(kind % 3);
    prepare(c);
    fill_inputs(rnd, c, 0.0);
    const Doubles gx = expected(c).gx, xs = c.xs;
    for (size_t i = 0; i < 6; ++i) {
      const double h = 1e-5;
      c.xs = xs;
      c.xs[i] += h;
      const double up = expected(c).loss[0];
      c.xs[i] -= 2 * h;
      const double quotient = (up - expected(c).loss[0]) / (2 * h);
      require(std::fabs(quotient - gx[i]) < 1e-7, "the reference's own gradient");
    }
  }
}

void check_refusals() {
  const auto refused = [](const sorting::Problem& p, const SortingCall& c) {
    try {
      cuda::sorting_scratch_bytes(p, c);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  sorting::Problem p{};
  SortingCall c{};
  p.items = 1, p.n = 8, p.dtype = DType::kF32, p.steepness = 1;
  require(!refused(p, c), "an ordinary problem is accepted");
  p.n = 0;
  require(refused(p, c), "no wires");
  p.n = 5000;
  require(!refused(p, c), "many values");
  c.task = SortingTask::kPermutation;
  require(refused(p, c), "a matrix of many wires");
  p.n = 8, p.dtype = DType::kF16;
  require(refused(p, c), "half precision");
  p.dtype = DType::kF32, p.network = Network::kSplitter;
  require(refused(p, c), "no table");
  p.network = Network::kBitonic;
  c.task = SortingTask::kApply, c.features.width = 1;
  bool caught = false;
  try {
    cuda::sorting_run(p, c, &p, 1, nullptr);
  } catch (const std::invalid_argument&) {
    caught = true;
  }
  require(caught, "too little scratch memory");
  p.items = 0;
  cuda::sorting_run(p, c, nullptr, 0, nullptr);
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
    random_case(rnd, i);
  }
  if (only < 0) {
    check_reference();
    check_sizes(few);
    check_refusals();
  }
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
