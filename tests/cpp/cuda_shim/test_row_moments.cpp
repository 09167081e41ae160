// Runs the CUDA row-moments kernels on the CPU shim, over random problems, in four thread orders
// and over other rests of memory, whose outputs must be equal to the last bit, and compares them
// with plain sums in double. Arguments: number of problems, seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/row_moments.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using namespace pyloss::row_moments;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

bool close(double a, double b, double size, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (std::fabs(b) + size);
}

template <class T>
T from_double(double x) {
  if constexpr (sizeof(T) == 8) {
    return T(x);
  } else {
    return FromFloat<T>::of(float(x));
  }
}

// How the classes lie: side by side, in rows that begin anywhere; (N, C, d); all of it apart.
enum class Layout { kRows, kInner, kApart, kCount };

struct Memory {
  Strides strides;
  int64_t count;
};

Memory memory_of(const Problem& p, Layout layout, int64_t gap) {
  if (layout == Layout::kRows) {
    const int64_t pitch = p.classes + gap;
    return {{p.inner * pitch, 1, pitch}, p.rows() * pitch};
  }
  const int64_t step = layout == Layout::kApart ? 2 : 1;
  const int64_t line = p.inner * step + gap;
  return {{p.classes * line, line, step}, p.outer * p.classes * line};
}

int64_t place(const Problem& p, const Strides& s, int64_t row, int64_t c) {
  return offset_of(s, p.inner, row) + c * s.cls;
}

template <class T>
void check(std::mt19937_64& rnd, bool is_long) {
  using R = std::conditional_t<sizeof(T) == 8, double, float>;
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  Problem p{};
  p.outer = below(4);
  p.inner = below(3) == 0 ? 1 + below(40) : 1;
  p.classes = is_long ? 1000 + below(1200) : 1 + below(90);
  if (is_long && p.outer > 0) p.outer = 1;
  p.dtype = sizeof(T) == 8 ? DType::kF64 : sizeof(T) == 4 ? DType::kF32 : DType::kBF16;
  if constexpr (std::is_same_v<T, F16>) p.dtype = DType::kF16;
  p.target_dtype = DType::kI64;
  p.ignore_index = -100;
  const Layout layout = Layout(below(int64_t(Layout::kCount)));
  const Memory in = memory_of(p, layout, below(3));
  const Memory out = memory_of(p, below(4) == 0 ? Layout::kApart : layout, below(3));
  p.x_strides = in.strides;

  const size_t rows = size_t(p.rows());
  std::normal_distribution<double> normal;
  const double shift = below(3) == 0 ? 50 : 0;
  const int64_t begin = below(4);  // of memory, which need not be aligned for vectors
  std::vector<T> x(size_t(in.count + begin));
  for (T& v : x) v = from_double<T>(normal(rnd) + shift);
  std::vector<int64_t> target(rows);
  for (int64_t& y : target) y = below(5) == 0 ? -100 : below(9) == 0 ? -1 : below(p.classes);
  std::vector<R> grad(kCount * rows);
  for (R& g : grad) g = R(normal(rnd));
  p.x = x.data() + begin;
  p.target = target.data();

  char text[160];
  std::snprintf(text, sizeof text, "%lld x %lld x %lld, dtype %d, layout %d, shift %g",
                (long long)p.outer, (long long)p.classes, (long long)p.inner, int(p.dtype),
                int(layout), shift);
  std::vector<R> first;
  std::vector<T> first_dx;
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<R> moments(kCount * rows);
    std::vector<T> dx(size_t(out.count));
    shim::poison(moments);
    shim::poison(dx);
    try {
      cuda::row_moments_forward(p, moments.data(), nullptr);
      cuda::row_moments_backward(p, {moments.data(), grad.data(), dx.data(), out.strides}, nullptr);
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + text);
      return;
    }
    if (run > 0) {
      require(shim::same_bytes(first.data(), moments.data(), moments.size() * sizeof(R), run) &&
                  shim::same_bytes(first_dx.data(), dx.data(), dx.size() * sizeof(T), run),
              std::string("the order of threads, or old memory, changes the result, ") + text);
      continue;
    }
    first = moments;
    first_dx = dx;
    const double tolerance = sizeof(R) == 8 ? 1e-11 : 1e-5, half = sizeof(T) == 2 ? 1e-2 : 0;
    for (int64_t row = 0; row < p.rows(); ++row) {
      const int64_t y = target[size_t(row)];
      const auto at = [&](int64_t c) {
        return double(to_float(x[size_t(begin + place(p, in.strides, row, c))]));
      };
      double mean = 0, var = 0;
      for (int64_t c = 0; c < p.classes; ++c) mean += at(c) / double(p.classes);
      for (int64_t c = 0; c < p.classes; ++c) var += (at(c) - mean) * (at(c) - mean);
      var /= double(p.classes);
      double want[kCount] = {0, 0, 0, 0};
      if (y == -1) {
        for (double& w : want) w = std::nan("");
      } else if (y >= 0) {
        const double all[kCount] = {at(y), at(y) - mean, mean, var};
        std::copy(all, all + kCount, want);
      }
      double g[kCount];
      for (size_t k = 0; k < kCount; ++k) {
        require(close(double(moments[k * rows + size_t(row)]), want[k], 1 + shift, tolerance),
                "moment " + std::to_string(k) + ", " + text);
        g[k] = double(grad[k * rows + size_t(row)]);
      }
      for (int64_t c = 0; c < p.classes; ++c) {
        double d = 2 * g[kVar] * (at(c) - mean) / double(p.classes) +
                   (g[kMean] - g[kOffset]) / double(p.classes);
        if (c == y) d += g[kTarget] + g[kOffset];
        if (y < 0) d = y == -1 ? std::nan("") : 0;
        const double found = double(to_float(dx[size_t(place(p, out.strides, row, c))]));
        require(close(found, d, 1 + shift, tolerance + half), std::string("gradient, ") + text);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  shim::dtypes_in_turn(cases,
                       [&](auto number, int64_t i) { check<decltype(number)>(rnd, i % 20 >= 18); });
  std::printf("%lld checks, %lld failed\n", (long long)checked, (long long)failed);
  return failed == 0 && checked > 0 ? 0 : 1;
}
