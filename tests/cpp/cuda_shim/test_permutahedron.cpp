// Runs the CUDA permutahedron kernels on the CPU shim, over random small rows, in four thread
// orders and over other rests of memory, whose outputs must be equal to the last bit, and compares
// them with the definition: the regression by its min-max formula, of which nothing is pooled, and
// sums over its blocks. Arguments: number of problems, seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/permutahedron.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using permutahedron::Problem;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

bool close(double a, double b, double size, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (std::fabs(b) + size);
}

double log_sum_exp(const std::vector<double>& v, size_t a, size_t b) {
  double top = v[a], sum = 0;
  for (size_t i = a; i < b; ++i) top = std::max(top, v[i]);
  for (size_t i = a; i < b; ++i) sum += std::exp(v[i] - top);
  return top + std::log(sum);
}

double mean(const std::vector<double>& v, size_t a, size_t b) {
  double sum = 0;
  for (size_t i = a; i < b; ++i) sum += v[i];
  return sum / double(b - a);
}

struct Row {
  std::vector<double> y, dx;
};

// One row with distinct numbers, infinite ones among them, or with a NaN.
Row definition(const Problem& p, const std::vector<double>& x, const std::vector<double>& g) {
  const size_t n = x.size();
  Row r{std::vector<double>(n, 0), std::vector<double>(n, 0)};
  for (double v : x) {
    if (!std::isnan(v)) continue;
    std::fill(r.y.begin(), r.y.end(), std::nan(""));
    r.dx = r.y;
    return r;
  }
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return p.rank ? x[i] > x[j] : x[i] < x[j]; });
  size_t begin = 0, end = n;
  const auto infinite = [&](size_t i) { return std::isinf(x[order[i]]); };
  for (; begin < n && infinite(begin); ++begin) {
  }
  for (; end > begin && infinite(end - 1); --end) {
  }
  const auto fix = [&](size_t a, size_t b) {
    for (size_t i = a; i < b; ++i) {
      r.y[p.rank ? order[i] : i] =
          p.rank ? double(n) - 0.5 * double(a + b - 1) - (p.centred ? 0.5 * double(n + 1) : 0)
                 : x[order[i]];
    }
  };
  fix(0, begin);
  fix(end, n);
  std::vector<double> s(n), w(n), lw(n);
  for (size_t i = begin; i < end; ++i) {
    s[i] = p.rank ? x[order[i]] / p.strength : -x[order[i]];
    w[i] = p.rank ? double(n - i) : double(n - i) / p.strength;
    lw[i] = p.rank ? std::log(w[i]) : w[i];
  }
  const auto value = [&](size_t a, size_t b) {
    const double vs = p.kl ? log_sum_exp(s, a, b) : mean(s, a, b);
    const double vw = p.kl ? log_sum_exp(lw, a, b) : mean(w, a, b);
    return p.rank ? vs - vw : vw - vs;
  };
  for (size_t i = begin; i < end; ++i) {
    // min over a <= i of the max over b > i; the arguments are the block.
    double low = HUGE_VAL;
    size_t a0 = i, b0 = i + 1;
    for (size_t a = begin; a <= i; ++a) {
      double high = -HUGE_VAL;
      size_t at = i + 1;
      for (size_t b = i + 1; b <= end; ++b) {
        const double v = value(a, b);
        if (v > high) high = v, at = b;
      }
      if (high < low) low = high, a0 = a, b0 = at;
    }
    if (p.rank) {
      r.y[order[i]] = p.kl ? std::exp(s[i] - low) : s[i] - low;
    } else {
      r.y[i] = low - w[i];
    }
    double up = 0, mass = 0;
    for (size_t k = a0; k < b0; ++k) {
      const double share = p.kl ? std::exp(s[k] - s[a0]) : 1.0;
      up += p.rank ? share * g[order[k]] : g[k];
      mass += share;
    }
    const double share = p.kl ? std::exp(s[i] - s[a0]) : 1.0;
    const double factor = p.kl ? r.y[order[i]] : 1.0;  // of ranks as they are
    if (p.rank && p.centred) r.y[order[i]] -= 0.5 * double(n + 1);
    r.dx[order[i]] = p.rank ? factor * (g[order[i]] - up / mass) / p.strength : up * share / mass;
  }
  return r;
}

// Rows that a warp keeps in shared memory; more than one block of them; rows that are too long.
enum class Size { kSmall, kMany, kLong };

template <class R>
void check(std::mt19937_64& rnd, Size size) {
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  Problem p{};
  p.rows = size == Size::kMany ? 70 : size == Size::kLong ? 2 : below(5);
  p.n = size == Size::kMany ? 5 : size == Size::kLong ? 1800 : 1 + below(80);
  p.dtype = sizeof(R) == 8 ? DType::kF64 : DType::kF32;
  p.rank = below(2) != 0;
  p.kl = below(2) != 0;
  p.centred = below(2) != 0;
  const double strengths[] = {0.05, 0.4, 1.3, 8.0};
  p.strength = strengths[below(4)];
  const size_t n = size_t(p.n), count = size_t(p.rows) * n;
  std::normal_distribution<double> normal;
  std::vector<R> x(count), g(count), sorted(count);
  std::vector<int64_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    x[i] = R(normal(rnd));
    g[i] = R(normal(rnd));
    if (below(12) == 0) x[i] = R(below(2) ? HUGE_VAL : -HUGE_VAL);
    if (below(60) == 0) x[i] = R(std::nan(""));
  }
  for (size_t row = 0; row < size_t(p.rows); ++row) {
    const R* v = x.data() + row * n;
    std::vector<int64_t> o(n);
    std::iota(o.begin(), o.end(), int64_t(0));
    // As torch.sort: NaN above infinity.
    const auto less = [&](int64_t i, int64_t j) {
      return v[j] != v[j] ? v[i] == v[i] : v[i] < v[j];
    };
    std::stable_sort(o.begin(), o.end(),
                     [&](int64_t i, int64_t j) { return p.rank ? less(j, i) : less(i, j); });
    for (size_t i = 0; i < n; ++i) {
      order[row * n + i] = o[i];
      sorted[row * n + i] = v[o[i]];
    }
  }
  char text[160];
  std::snprintf(text, sizeof text, "rows %lld n %lld %s %s %s%s strength %g", (long long)p.rows,
                (long long)p.n, sizeof(R) == 8 ? "f64" : "f32", p.rank ? "rank" : "sort",
                p.kl ? "kl" : "l2", p.centred ? " centred" : "", p.strength);
  std::vector<R> first;
  std::vector<int32_t> first_packed;
  const int64_t scratch_bytes = cuda::permutahedron_scratch_bytes(p);
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<R> out(2 * count);  // y, dx
    std::vector<int32_t> packed(count);
    std::vector<double> scratch(size_t(scratch_bytes) / 8 + 1);
    shim::poison(out);
    shim::poison(packed);
    shim::poison(scratch);
    try {
      cuda::permutahedron_forward(p, sorted.data(), order.data(), out.data(), packed.data(),
                                  scratch.data(), scratch_bytes, nullptr);
      cuda::permutahedron_backward(p, g.data(), p.kl ? x.data() : nullptr, packed.data(),
                                   out.data() + count, nullptr);
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + text);
      return;
    }
    if (run > 0) {
      require(shim::same_bytes(first.data(), out.data(), out.size() * sizeof(R), run) &&
                  packed == first_packed,
              std::string("the order of threads, or old memory, changes the result, ") + text);
      continue;
    }
    first = out;
    first_packed = packed;
    for (size_t row = 0; row < size_t(p.rows); ++row) {
      const size_t at = row * n;
      const std::vector<double> xs(x.begin() + long(at), x.begin() + long(at + n));
      const std::vector<double> gs(g.begin() + long(at), g.begin() + long(at + n));
      const Row want = definition(p, xs, gs);
      const double tolerance = sizeof(R) == 8 ? 1e-10 : 2e-6;
      for (size_t i = 0; i < n; ++i) {
        require(close(double(out[at + i]), want.y[i], 1, tolerance), std::string("y, ") + text);
        require(close(double(out[count + at + i]), want.dx[i], 4 / std::min(p.strength, 1.0),
                      tolerance),
                std::string("dx, ") + text);
      }
    }
  }
}

void check_refusals() {
  Problem p{};
  p.rows = 2;
  p.n = 3;
  p.strength = 1;
  p.dtype = DType::kF32;
  bool caught = false;
  char memory[512] = {};
  try {
    cuda::permutahedron_forward(p, memory, reinterpret_cast<int64_t*>(memory), memory,
                                reinterpret_cast<int32_t*>(memory), memory, 8, nullptr);
  } catch (const std::invalid_argument&) {
    caught = true;
  }
  require(caught, "too little scratch memory");
  p.rows = 0;
  cuda::permutahedron_forward(p, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr);
  cuda::permutahedron_backward(p, nullptr, nullptr, nullptr, nullptr, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  for (int64_t i = 0; i < cases; ++i) {
    const Size size = i % 30 >= 28 ? Size::kLong : i % 5 == 0 ? Size::kMany : Size::kSmall;
    if (i % 2 == 0) {
      check<float>(rnd, size);
    } else {
      check<double>(rnd, size);
    }
  }
  check_refusals();
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
