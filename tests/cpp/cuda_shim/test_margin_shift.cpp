// Runs the CUDA margin-shift kernels on the CPU shim, over random problems of all layouts, in four
// thread orders and over other rests of memory, whose outputs must be equal to the last bit, and
// compares them with the definition in double. Arguments: number of problems, seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/margin_shift.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using margin_shift::Backward;
using margin_shift::Problem;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

bool close(double a, double b, double size, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::fabs(a - b) <= tolerance * (std::fabs(b) + size);
}

// A layout of [outer][classes][inner]: how the three lie, and a gap behind rows.
Strides layout_of(const Problem& p, int kind, int64_t gap) {
  switch (kind) {
    case 0:  // as it stands
      return {p.classes * p.inner + gap, p.inner, 1};
    case 1:  // classes innermost
      return {(p.classes + gap) * p.inner, 1, p.classes + gap};
    default:  // classes outermost
      return {p.inner, p.outer * p.inner + gap, 1};
  }
}

int64_t extent(const Problem& p, const Strides& s) {
  return 1 + (p.outer - 1) * s.outer + (p.classes - 1) * s.cls + (p.inner - 1) * s.inner;
}

template <class T>
double number(T v) {
  return double(to_float(v));
}

template <class T>
void check(std::mt19937_64& rnd, int64_t number_of_problem) {
  using R = decltype(to_float(T{}));
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  Problem p{};
  const bool is_long = number_of_problem % 9 == 8;
  p.outer = 1 + below(is_long ? 2 : 6);
  p.inner = below(2) ? 1 : 1 + below(5);
  p.classes = is_long ? 300 + below(5000) : 1 + below(below(2) ? 12 : 200);
  if (number_of_problem % 20 == 7) p.outer = 0;
  p.dtype = sizeof(T) == 8            ? DType::kF64
            : sizeof(T) == 4          ? DType::kF32
            : std::is_same_v<T, BF16> ? DType::kBF16
                                      : DType::kF16;
  p.squared = below(2) != 0;
  p.ignore_index = below(2) ? -100 : 0;
  const int64_t vector = 16 / int64_t(sizeof(T)), rows = p.rows();
  Strides s[4];  // x, adv, dx, dadv
  const int kind = int(below(3));
  const bool same = below(3) != 0, even = below(2) != 0;
  for (Strides& one : s) {
    const int64_t gap =
        even ? (vector - p.classes * (kind == 1 ? 1 : p.inner) % vector) % vector : below(3);
    one = layout_of(p, same ? kind : int(below(3)), gap);
  }
  p.x_strides = s[0];
  p.adv_strides = s[1];
  const size_t room =
      rows ? size_t(std::max({extent(p, s[0]), extent(p, s[1]), extent(p, s[2]), extent(p, s[3])}))
           : 1;
  std::normal_distribution<double> normal;
  std::vector<T> x(room), adv(room);
  for (size_t i = 0; i < room; ++i) {
    x[i] = FromFloat<T>::of(R(normal(rnd)));
    adv[i] = FromFloat<T>::of(R(normal(rnd)));
  }
  std::vector<int64_t> target(size_t(rows) + 1);
  std::vector<R> g(size_t(rows) + 1);
  for (int64_t r = 0; r < rows; ++r) {
    target[size_t(r)] = below(8) == 0    ? p.ignore_index
                        : below(20) == 0 ? p.classes + below(3)
                                         : below(p.classes);
    g[size_t(r)] = R(normal(rnd));
  }
  p.x = x.data();
  p.adv = adv.data();
  p.target = target.data();
  p.target_dtype = DType::kI64;
  const bool want_x = below(4) != 0, want_adv = !want_x || below(4) != 0;
  char text[200];
  std::snprintf(text, sizeof text, "outer %lld classes %lld inner %lld dtype %d%s kind %d%s",
                (long long)p.outer, (long long)p.classes, (long long)p.inner, int(p.dtype),
                p.squared ? " squared" : "", kind, same ? "" : " mixed");
  std::vector<R> first_rows;
  std::vector<T> first;
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<R> sums(2 * size_t(rows) + 1);  // shift, total
    std::vector<T> grads(2 * room);
    shim::poison(sums);
    shim::poison(grads);
    try {
      cuda::margin_shift_forward(p, sums.data(), sums.data() + rows, nullptr);
      const Backward b{g.data(),
                       sums.data(),
                       sums.data() + rows,
                       want_x ? grads.data() : nullptr,
                       s[2],
                       want_adv ? grads.data() + room : nullptr,
                       s[3]};
      cuda::margin_shift_backward(p, b, nullptr);
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + text);
      return;
    }
    if (run > 0) {
      require(shim::same_bytes(first_rows.data(), sums.data(), sums.size() * sizeof(R), run) &&
                  shim::same_bytes(first.data(), grads.data(), grads.size() * sizeof(T), run),
              std::string("the order of threads, or old memory, changes the result, ") + text);
      continue;
    }
    first_rows = sums;
    first = grads;
    const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 1e-2;
    for (int64_t r = 0; r < rows; ++r) {
      const auto at = [&](const Strides& t, int64_t c) {
        return size_t(r / p.inner * t.outer + r % p.inner * t.inner + c * t.cls);
      };
      const int64_t y = target[size_t(r)];
      const bool labelled = y >= 0 && y < p.classes && y != p.ignore_index;
      std::vector<double> d(size_t(p.classes), y == p.ignore_index ? 0 : std::nan(""));
      double squares = labelled || y == p.ignore_index ? 0 : std::nan(""), total = 0;
      const auto e = [&](int64_t c) { return number(adv[at(s[1], c)]) - number(x[at(s[0], c)]); };
      for (int64_t c = 0; labelled && c < p.classes; ++c) {
        d[size_t(c)] = e(y) - e(c);
        squares += d[size_t(c)] * d[size_t(c)];
        total += d[size_t(c)];
      }
      const double shift = p.squared ? squares : std::sqrt(squares);
      require(close(double(sums[size_t(r)]), shift, 0, 1e-5), std::string("shift, ") + text);
      const double up = double(g[size_t(r)]);
      const double c = p.squared ? 2 * up : shift == 0 ? 0 : up / shift;
      for (int64_t j = 0; j < p.classes; ++j) {
        double slope = d[size_t(j)];
        if (labelled) slope = c * (j == y ? total : -d[size_t(j)]);
        const double size = labelled ? std::fabs(c) * double(p.classes) : 0;
        if (want_adv) {
          require(close(number(grads[room + at(s[3], j)]), slope, size, tolerance),
                  std::string("dadv, ") + text);
        }
        if (want_x) {
          require(close(number(grads[at(s[2], j)]), -slope, size, tolerance),
                  std::string("dx, ") + text);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  shim::dtypes_in_turn(cases, [&](auto number, int64_t i) { check<decltype(number)>(rnd, i / 4); });
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
