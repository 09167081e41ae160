// Runs the CUDA segment kernels on the CPU shim, over random problems, in four thread orders and
// over other rests of memory, whose outputs must be equal to the last bit, and compares them with
// plain sums in double. Arguments: number of problems, seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/segment.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using namespace pyloss::segment;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (std::fabs(b) + 1);
}

template <class T>
T from_double(double x) {
  if constexpr (sizeof(T) == 8) {
    return T(x);
  } else {
    return FromFloat<T>::of(float(x));
  }
}

// What a fold finds in values x (and y) of a column.
void fold_of(Fold f, const std::vector<double>& x, const std::vector<double>& y, double m,
             double* out) {
  const double n = double(x.size()), inf = HUGE_VAL;
  double sum = 0, prod = 1, least = inf, most = -inf, ties = 0, factors = 1, zeros = 0, inner = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += x[i];
    prod *= x[i];
    least = std::fmin(least, x[i]);
    most = std::fmax(most, x[i]);
    ties += x[i] == m;
    factors *= x[i] == 0 ? 1 : x[i];
    zeros += x[i] == 0;
    inner += x[i] * y[i];
  }
  double exps = 0, squares = 0;
  for (double v : x) {
    exps += std::exp(v - most);
    squares += (v - sum / n) * (v - sum / n);
  }
  out[1] = 0;
  switch (f) {
    case Fold::kSum:
      out[0] = sum;
      break;
    case Fold::kMean:
      out[0] = sum / n;
      break;
    case Fold::kProd:
      out[0] = prod;
      break;
    case Fold::kMin:
      out[0] = least;
      break;
    case Fold::kMax:
      out[0] = most;
      break;
    case Fold::kLogSumExp:
      out[0] = x.empty() ? -inf : most + std::log(exps);
      break;
    case Fold::kMoments:
      out[0] = sum / n;
      out[1] = squares / n;
      break;
    case Fold::kSoftmax:
      out[0] = most;
      out[1] = exps;
      break;
    case Fold::kTies:
      out[0] = ties;
      break;
    case Fold::kFactors:
      out[0] = factors;
      out[1] = zeros;
      break;
    default:
      out[0] = inner;
  }
}

template <class T>
void check(std::mt19937_64& rnd, bool is_long) {
  using R = std::conditional_t<sizeof(T) == 8, double, float>;
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  Problem p{};
  const int64_t widths[] = {1, 1, 2, 3, 33, 70};
  p.width = is_long ? 65 : widths[below(6)];
  p.segments = below(is_long ? 3 : 9) + 1;
  p.dtype = sizeof(T) == 8 ? DType::kF64 : sizeof(T) == 4 ? DType::kF32 : DType::kBF16;
  if constexpr (std::is_same_v<T, F16>) p.dtype = DType::kF16;
  std::vector<int64_t> offsets{0};
  for (int64_t s = 0; s < p.segments; ++s) {
    const int64_t n = below(4) == 0 ? 0 : below(is_long ? 150 : 30);
    offsets.push_back(offsets.back() + n);
  }
  p.rows = offsets.back();
  const bool is_bad = p.segments > 2 && below(12) == 0;  // one goes back
  if (is_bad) offsets[2] = offsets[1] - 1;
  const std::vector<int32_t> narrow(offsets.begin(), offsets.end());
  const bool is_narrow = below(2) == 0;
  p.offsets = is_narrow ? static_cast<const void*>(narrow.data()) : offsets.data();
  p.offsets_dtype = is_narrow ? DType::kI32 : DType::kI64;
  p.x_stride = p.width + below(3);
  p.other_stride = p.width + below(3);

  std::normal_distribution<double> normal;
  const double scale = is_long ? 0.05 : 0.5;
  std::vector<T> x(size_t(p.rows * p.x_stride + 1)), y(size_t(p.rows * p.other_stride + 1));
  for (T& v : x) v = from_double<T>(below(12) == 0 ? 0 : 1 + scale * normal(rnd));
  for (T& v : y) v = from_double<T>(normal(rnd));
  p.x = x.data();
  p.other = y.data();
  const auto x_at = [&](int64_t r, int64_t c) { return double(to_float(x[r * p.x_stride + c])); };
  const auto y_at = [&](int64_t r, int64_t c) {
    return double(to_float(y[r * p.other_stride + c]));
  };
  const size_t each = size_t(p.segments * p.width);
  std::vector<std::vector<R>> given(kMostGiven, std::vector<R>(each + 1));
  for (auto& g : given) {
    for (R& v : g) v = R(0.5 + std::fabs(normal(rnd)));
  }
  const size_t numbers = size_t(windows(p) * 2 * kPartNumbers * p.width);
  const double tolerance = sizeof(R) == 8 ? 1e-11 : 2e-5, half = sizeof(T) == 2 ? 1e-2 : 0;

  for (int code = 0; code < int(Fold::kCount); ++code) {
    const Fold f = Fold(code);
    char text[120];
    std::snprintf(text, sizeof text, "fold %d, %lld x %lld in %lld, dtype %d", code,
                  (long long)p.rows, (long long)p.width, (long long)p.segments, int(p.dtype));
    // A maximum that is there, of the first row.
    for (size_t i = 0; i < each; ++i) {
      const int64_t begin = offsets[i / size_t(p.width)];
      given[0][i] = begin >= 0 && begin < p.rows ? R(x_at(begin, int64_t(i) % p.width)) : R(0);
    }
    for (int i = 0; i < kMostGiven; ++i) p.given[i] = given[size_t(i)].data();
    std::vector<char> first;
    const size_t bytes = each * 2 * 8;
    for (int run = 0; run < shim::kRuns; ++run) {
      shim::start_run(run);
      std::vector<char> out(bytes);
      shim::poison(out);
      std::vector<R> scratch(numbers, R(NAN));
      cuda::segment_fold(p, f, out.data(), scratch.data(), nullptr);
      if (run > 0) {
        require(shim::same_bytes(first.data(), out.data(), bytes, run),
                std::string("order or old memory, ") + text);
        continue;
      }
      first = out;
      for (size_t i = 0; i < each; ++i) {
        const int64_t s = int64_t(i) / p.width, c = int64_t(i) % p.width;
        if (is_bad && (s == 0 || s > 2)) continue;  // by itself in order
        const bool sick = is_bad && s == 1;
        if (is_bad && s == 2) continue;
        std::vector<double> column, other;
        for (int64_t r = offsets[size_t(s)]; r < offsets[size_t(s) + 1]; ++r) {
          column.push_back(x_at(r, c));
          other.push_back(y_at(r, c));
        }
        if (f == Fold::kArgmax) {
          int64_t want = -1;
          for (size_t r = 0; r < column.size() && want < 0; ++r) {
            if (column[r] == double(given[0][i])) want = offsets[size_t(s)] + int64_t(r);
          }
          const int64_t found = reinterpret_cast<const int64_t*>(out.data())[i];
          require(found == (sick ? -1 : want), std::string("argmax, ") + text);
          continue;
        }
        double want[2];
        fold_of(f, column, other, double(given[0][i]), want);
        for (int k = 0; k < results(f); ++k) {
          const double found = double(reinterpret_cast<const R*>(out.data())[size_t(k) * each + i]);
          require(close(found, sick ? NAN : want[k], tolerance * (column.size() > 100 ? 8 : 1)),
                  text);
        }
      }
    }
  }
  for (auto& g : given) {
    for (R& v : g) v = R(0.5 + std::fabs(normal(rnd)));
  }
  for (int code = 0; code < int(Map::kCount); ++code) {
    const Map f = Map(code);
    char text[120];
    std::snprintf(text, sizeof text, "map %d, %lld x %lld in %lld, dtype %d", code,
                  (long long)p.rows, (long long)p.width, (long long)p.segments, int(p.dtype));
    std::vector<T> first;
    for (int run = 0; run < shim::kRuns; ++run) {
      shim::start_run(run);
      std::vector<T> out(size_t(p.rows * p.width) + 1);
      shim::poison(out);
      cuda::segment_map(p, f, out.data(), nullptr);
      if (run > 0) {
        require(shim::same_bytes(first.data(), out.data(), (out.size() - 1) * sizeof(T), run),
                std::string("order or old memory, ") + text);
        continue;
      }
      first = out;
      if (is_bad) continue;
      for (int64_t s = 0; s < p.segments; ++s) {
        const double n = double(offsets[size_t(s) + 1] - offsets[size_t(s)]);
        for (int64_t i = offsets[size_t(s)] * p.width; i < offsets[size_t(s) + 1] * p.width; ++i) {
          const int64_t r = i / p.width, c = i % p.width;
          double g[kMostGiven];
          for (int k = 0; k < kMostGiven; ++k) {
            g[k] = double(given[size_t(k)][size_t(s * p.width + c)]);
          }
          const double v = x_at(r, c);
          const double all[] = {
              g[0],
              g[0] / n,
              v == g[1] ? g[0] / g[2] : 0,
              g[2] == 0 ? g[0] * g[1] / v : 0,
              g[0] * std::exp(v - g[1]),
              (g[0] + 2 * g[1] * (v - g[2])) / n,
              g[1] * std::exp(v - g[2]) + (v == g[2] ? (g[0] - g[1] * g[3]) / g[4] : 0),
              std::exp(v - g[0]) / g[1],
              y_at(r, c) * (v - g[0])};
          require(close(double(to_float(out[size_t(i)])), all[code], tolerance + half), text);
        }
      }
    }
  }
}

// Values but no segment: NaN, and no offset behind the only one is read.
void check_no_segments() {
  const std::vector<int64_t> offsets{0};
  const std::vector<float> x(5, 1.0f);
  Problem p{};
  p.rows = 5;
  p.width = 1;
  p.dtype = DType::kF32;
  p.offsets_dtype = DType::kI64;
  p.x = x.data();
  p.x_stride = 1;
  p.offsets = offsets.data();
  std::vector<float> out(5);
  shim::start_run(0);
  cuda::segment_map(p, Map::kSpread, out.data(), nullptr);
  for (const float v : out) require(std::isnan(v), "a value of no segment");
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  check_no_segments();
  shim::dtypes_in_turn(cases,
                       [&](auto number, int64_t i) { check<decltype(number)>(rnd, i % 5 == 0); });
  std::printf("%lld checks, %lld failed\n", (long long)checked, (long long)failed);
  return failed == 0 && checked > 0 ? 0 : 1;
}
