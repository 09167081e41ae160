// Runs the CUDA kernels of ALDR-KL on the CPU shim, over random rows, in four thread orders and
// over other rests of memory, whose outputs must be equal to the last bit. lambda must solve its
// equation, the values follow the definition at that lambda, and the gradients that of the values,
// in float64. Arguments: number of problems, seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/aldr.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using aldr::Problem;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

bool close(double a, double b, double size, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::fabs(a - b) <= tolerance * (std::fabs(b) + size);
}

struct Row {
  double next, value;  // lambda0 - KL / kappa, and the loss, at lambda
  std::vector<double> gradient;
};

Row definition(const Problem& p, const std::vector<double>& x, int64_t y, double lambda) {
  const size_t n = x.size();
  double mean = 0;
  for (double v : x) mean += std::fabs(v) / double(n);
  const double s = !p.l1 ? 1 : mean == 0 ? 0 : 1 / (mean + 1e-12);
  std::vector<double> v(n), p_of(n);
  double top = -HUGE_VAL, sum = 0, entropy = 0;
  for (size_t j = 0; j < n; ++j) {
    v[j] = (s * x[j] - (int64_t(j) == y ? p.margin : 0)) / lambda;
    top = std::max(top, v[j]);
  }
  for (double u : v) sum += std::exp(u - top);
  for (size_t j = 0; j < n; ++j) {
    p_of[j] = std::exp(v[j] - top) / sum;
    if (p_of[j] > 0) entropy -= p_of[j] * std::log(p_of[j]);
  }
  const double log_n = std::log(double(n)), kappa = p.alpha * log_n / p.lambda0;
  Row r;
  r.next = n > 1 ? p.lambda0 - std::max(0.0, log_n - entropy) / kappa : p.lambda0;
  const double off = lambda - p.lambda0;
  r.value = lambda * (top + std::log(sum) - v[size_t(y)] - log_n) - kappa / 2 * off * off;
  double pull = 0;
  for (size_t j = 0; j < n; ++j) {
    const double g = p_of[j] - (int64_t(j) == y);
    pull += g * s * x[j];
    r.gradient.push_back(s * g);
  }
  if (!p.l1) return r;
  for (size_t j = 0; j < n; ++j) {
    const double sign = x[j] > 0 ? 1 : x[j] < 0 ? -1 : 0;
    r.gradient[j] -= s * sign * pull / double(n);
  }
  return r;
}

template <class T, class R>
void check(std::mt19937_64& rnd, DType dtype, int64_t classes) {
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  const auto pick = [&](std::initializer_list<double> all) {
    return all.begin()[below(int64_t(all.size()))];
  };
  Problem p{};
  p.rows = classes > 1024 ? 2 : 1 + below(6);
  p.classes = classes;
  p.dtype = dtype;
  p.lambda0 = pick({0.5, 1.0, 10.0});
  p.alpha = pick({1.5, 2.0, 4.0});
  p.margin = pick({0.0, 0.1, 3.0});
  p.ignore_index = -100;
  p.l1 = below(2) != 0;
  const bool online = below(3) == 0;
  std::normal_distribution<double> normal;
  const double size = pick({0.3, 2.0, 8.0});
  std::vector<T> x(size_t(p.rows * classes));
  for (T& v : x) v = FromFloat<T>::of(R(size * normal(rnd)));
  std::vector<int64_t> target(size_t(p.rows), 0);
  std::vector<R> factor(target.size()), start(target.size());
  for (size_t row = 0; row < target.size(); ++row) {
    target[row] = below(6) == 0 ? -100 : below(20) == 0 ? classes : below(classes);
    factor[row] = R(normal(rnd));
    start[row] = R(p.lambda0 * 0.8);
    const bool zero = below(8) == 0, sick = below(12) == 0;
    for (int64_t j = 0; zero && j < classes; ++j) x[row * size_t(classes) + size_t(j)] = T{};
    if (sick) x[row * size_t(classes)] = FromFloat<T>::of(R(std::nan("")));
  }
  p.x = x.data();
  p.target = target.data();
  p.start = online ? start.data() : nullptr;
  char text[160];
  std::snprintf(text, sizeof text, "rows %lld classes %lld dtype %d l1 %d online %d lambda0 %g",
                (long long)p.rows, (long long)classes, int(dtype), p.l1, online, p.lambda0);
  std::vector<R> first;
  std::vector<T> first_grad;
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<R> stats(size_t(aldr::kStatCount * p.rows));
    std::vector<T> grad(2 * x.size());
    shim::poison(stats);
    shim::poison(grad);
    cuda::aldr_forward(p, stats.data(), factor.data(), grad.data(), nullptr);
    cuda::aldr_backward(p, stats.data(), factor.data(), grad.data() + x.size(), nullptr);
    if (run > 0) {
      require(shim::same_bytes(first.data(), stats.data(), stats.size() * sizeof(R), run) &&
                  shim::same_bytes(first_grad.data(), grad.data(), grad.size() * sizeof(T), run),
              std::string("the order of threads, or old memory, changes the result, ") + text);
      continue;
    }
    first = stats;
    first_grad = grad;
    for (size_t row = 0; row < target.size(); ++row) {
      const size_t at = row * size_t(classes), n = target.size();
      const double lambda = double(stats[aldr::kLambda * n + row]);
      const double value = double(stats[aldr::kValue * n + row]);
      std::vector<double> xs;
      bool sick = target[row] == classes;
      for (int64_t j = 0; j < classes; ++j) {
        xs.push_back(double(to_float(x[at + size_t(j)])));
        sick = sick || std::isnan(xs.back());
      }
      const auto gradient = [&](size_t j) { return double(to_float(grad[j])); };
      if (target[row] == -100) {
        require(value == 0 && close(lambda, online ? start[row] : p.lambda0, 0, 1e-6), text);
        for (size_t j = at; j < at + size_t(classes); ++j) {
          require(gradient(j) == 0 && gradient(x.size() + j) == 0, text);
        }
        continue;
      }
      if (sick) {
        require(std::isnan(value), std::string("a sick row, ") + text);
        continue;
      }
      const double tolerance = sizeof(T) == 8 ? 1e-9 : sizeof(T) == 4 ? 3e-5 : 1e-2;
      const double looked_up = online ? double(start[row]) : lambda;
      require(close(lambda, definition(p, xs, target[row], looked_up).next, p.lambda0,
                    sizeof(R) == 8 ? 1e-9 : 5e-6),
              std::string("lambda, ") + text);
      const Row want = definition(p, xs, target[row], lambda);
      require(close(value, want.value, p.lambda0 + size, sizeof(R) == 8 ? 1e-9 : 3e-5),
              std::string("value, ") + text);
      double scale = 0;
      for (double g : want.gradient) scale = std::max(scale, std::fabs(g * double(factor[row])));
      for (size_t j = 0; j < size_t(classes); ++j) {
        const double g = want.gradient[j] * double(factor[row]);
        require(close(gradient(at + j), g, scale, tolerance), std::string("gradient, ") + text);
        require(close(gradient(x.size() + at + j), g, scale, tolerance),
                std::string("gradient of the backward, ") + text);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  for (int64_t i = 0; i < cases; ++i) {
    // A warp's rows, a block's, and some that shared memory does not hold.
    const int64_t classes = i % 20 == 19 ? 40000 : i % 5 == 4 ? 1500 : 1 + int64_t(rnd() % 90);
    switch (i % 4) {
      case 0:
        check<float, float>(rnd, DType::kF32, classes);
        break;
      case 1:
        check<double, double>(rnd, DType::kF64, classes);
        break;
      case 2:
        check<BF16, float>(rnd, DType::kBF16, classes);
        break;
      default:
        check<F16, float>(rnd, DType::kF16, classes);
    }
  }
  Problem none{};
  none.dtype = DType::kF32;
  cuda::aldr_forward(none, nullptr, nullptr, nullptr, nullptr);
  cuda::aldr_backward(none, nullptr, nullptr, nullptr, nullptr);
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
