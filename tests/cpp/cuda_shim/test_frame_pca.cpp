// Runs the CUDA frame_pca kernels on the CPU shim, over random problems, in four thread orders and
// over other rests of memory, whose outputs must be equal to the last bit. The axes are those of
// the covariance in double (V' C V is diagonal, V orthogonal, oriented), the gradient is compared
// with the closed form in double at the kernel's own axes. Arguments: number of problems, seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/frame_pca.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using namespace pyloss::frame_pca;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

template <class T>
T from_double(double x) {
  if constexpr (sizeof(T) == 8) {
    return T(x);
  } else {
    return FromFloat<T>::of(float(x));
  }
}

// One cloud in double, around what the kernel found.
template <class T, class R, int D>
struct Cloud {
  const T* x;
  const R* weight;  // or null
  int64_t count;
  bool centred;

  double w(int64_t i) const { return weight ? double(weight[i]) : 1; }
  double at(int64_t i, int k) const {
    const double v = double(to_float(x[i * D + k]));
    return w(i) == 0 && !(v - v == 0) ? 0 : v;
  }
  double total() const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += w(i);
    return sum;
  }
  double centre(int k) const {
    double sum = 0, all = total();
    for (int64_t i = 0; i < count; ++i) sum += w(i) * at(i, k);
    return centred && all != 0 ? sum / all : 0;
  }
  double product(int k, int j) const {
    const double t[2] = {centre(k), centre(j)};
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += w(i) * (at(i, k) - t[0]) * (at(i, j) - t[1]);
    return sum;
  }
};

template <class T, class R, int D>
void check_forward(const Cloud<T, R, D>& cloud, const R* row, double size, double tolerance,
                   const std::string& text) {
  using At = Row<D>;
  const double total = cloud.total();
  require(std::fabs(row[At::kTotal] - total) <= tolerance * (1 + total), "weight, " + text);
  double c[D][D], trace = 0;
  bool finite = true;
  for (int k = 0; k < D; ++k) {
    for (int j = 0; j < D; ++j) c[k][j] = cloud.product(k, j);
    trace += c[k][k];
    finite = finite && c[k][k] - c[k][k] == 0;
  }
  if (!finite) {
    for (int k = 0; k < D * D; ++k) require(std::isnan(row[k]), "axes of NaN, " + text);
    return;
  }
  for (int k = 0; k < D; ++k) {
    require(std::fabs(row[At::kCentre + k] - cloud.centre(k)) <= tolerance * (1 + size),
            "centre, " + text);
  }
  const double bound = tolerance * (trace + size * size * tolerance) + 1e-300;
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j < D; ++j) {
      double dot = 0, turned = 0;
      for (int r = 0; r < D; ++r) {
        dot += double(row[r * D + i]) * double(row[r * D + j]);
        for (int s = 0; s < D; ++s) {
          turned += double(row[r * D + i]) * c[r][s] * double(row[s * D + j]);
        }
      }
      require(std::fabs(dot - (i == j)) <= tolerance, "orthogonal, " + text);
      const double want = i == j ? double(row[At::kValues + i]) : 0;
      require(std::fabs(turned - want) <= bound, "diagonal, " + text);
    }
    if (i > 0) require(row[At::kValues + i] >= row[At::kValues + i - 1], "ascending, " + text);
    double top = 0;
    for (int r = 0; r < D; ++r) {
      if (std::fabs(row[r * D + i]) > std::fabs(top)) top = row[r * D + i];
    }
    require(top > 0, "oriented, " + text);
  }
}

template <class T, class R, int D>
void check_backward(const Cloud<T, R, D>& cloud, const R* row, const R* grad, const T* dx,
                    const R* dw, double gap, double tolerance, const std::string& text) {
  using At = Row<D>;
  double kernel[At::kWidth], upstream[At::kWidth];
  for (int k = 0; k < At::kWidth; ++k) kernel[k] = row[k], upstream[k] = grad[k];
  // G[r][s] = sum_ij V_ri inner_ij V_sj, from the definitions.
  double g[D][D] = {}, size = 0;
  for (int i = 0; i < D; ++i) {
    for (int j = 0; j < D; ++j) {
      double inner = i == j ? upstream[At::kValues + i] : 0;
      const double apart = kernel[At::kValues + j] - kernel[At::kValues + i];
      if (std::fabs(apart) > gap * kernel[At::kValues + D - 1]) {
        for (int r = 0; r < D; ++r) inner += kernel[r * D + i] * upstream[r * D + j] / apart;
      }
      size += std::fabs(inner);
      for (int r = 0; r < D; ++r) {
        for (int s = 0; s < D; ++s) {
          g[r][s] += kernel[r * D + i] * inner * kernel[s * D + j] / 2;
          g[s][r] += kernel[r * D + i] * inner * kernel[s * D + j] / 2;
        }
      }
    }
  }
  const double total = kernel[At::kTotal];
  for (int64_t i = 0; i < cloud.count; ++i) {
    double of_weight = upstream[At::kTotal], far = 1;
    for (int k = 0; k < D; ++k) far += std::fabs(cloud.at(i, k) - kernel[At::kCentre + k]);
    for (int k = 0; k < D; ++k) {
      const double d = cloud.at(i, k) - kernel[At::kCentre + k];
      const double shift = cloud.centred && total != 0 ? upstream[At::kCentre + k] / total : 0;
      double along = 0;
      for (int j = 0; j < D; ++j) along += g[k][j] * (cloud.at(i, j) - kernel[At::kCentre + j]);
      of_weight += d * (along + shift);
      const double want = cloud.w(i) * (2 * along + shift);
      const double found = double(to_float(dx[i * D + k]));
      const double bound = tolerance * (1 + size + std::fabs(shift)) * far * (1 + cloud.w(i));
      const bool both = std::isnan(want) && std::isnan(found);
      require(
          both || std::fabs(found - want) <= bound + (sizeof(T) == 2 ? 1e-2 : 0) * std::fabs(want),
          "gradient, " + text);
    }
    if (!dw) continue;
    const bool both = std::isnan(of_weight) && std::isnan(double(dw[i]));
    require(both || std::fabs(dw[i] - of_weight) <= tolerance * (3 + size) * far * far,
            "gradient of a weight, " + text);
  }
}

template <class T, int D>
void check(std::mt19937_64& rnd, bool is_long) {
  using R = std::conditional_t<sizeof(T) == 8, double, float>;
  constexpr int kWidth = Row<D>::kWidth;
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  Problem p{};
  p.clouds = is_long ? 1 + below(2) : below(4) == 0 ? 30 + below(40) : below(5);
  p.dim = D;
  p.dtype = sizeof(T) == 8 ? DType::kF64 : sizeof(T) == 4 ? DType::kF32 : DType::kBF16;
  if constexpr (std::is_same_v<T, F16>) p.dtype = DType::kF16;
  p.offsets_dtype = DType::kI64;
  p.centred = below(3) != 0;
  const bool is_ragged = below(2) == 0, is_weighted = below(2) == 0;
  const int64_t each = is_long ? 2050 + below(300) : below(50);
  std::vector<int64_t> ends(size_t(p.clouds) + 1);
  for (size_t c = 1; c < ends.size(); ++c) {
    ends[c] = ends[c - 1] + (is_ragged ? (is_long ? each + below(200) : below(50)) : each);
  }
  p.points = ends.back();
  if (is_ragged) p.offsets = ends.data();

  std::normal_distribution<double> normal;
  const double shift = below(3) == 0 ? 20 : 0;
  const int kind = int(below(4));  // even, flat, one line, all the same
  std::vector<T> x(size_t(p.points) * D);
  for (size_t i = 0; i < x.size(); ++i) {
    const double spread = kind == 0 || i % D == 0 ? 1 : kind == 1 && i % D == 1 ? 2 : 0;
    x[i] = from_double<T>(shift + (kind == 3 ? 0 : spread * normal(rnd)));
  }
  std::vector<R> weight(size_t(p.points));
  for (R& w : weight) w = below(4) == 0 ? R(0) : R(std::fabs(normal(rnd)));
  if (is_weighted) p.weight = weight.data();
  if (p.points > 0 && below(5) == 0) x[size_t(below(int64_t(x.size())))] = from_double<T>(NAN);
  p.x = x.data();
  std::vector<R> grad(size_t(p.clouds) * kWidth);
  for (R& g : grad) g = R(normal(rnd));

  char text[160];
  std::snprintf(text, sizeof text, "%lld clouds of %lld points in %d, dtype %d, kind %d%s%s%s",
                (long long)p.clouds, (long long)p.points, D, int(p.dtype), kind,
                is_ragged ? ", ragged" : "", is_weighted ? ", weighted" : "",
                p.centred ? ", centred" : "");
  const double gap = sizeof(R) == 8 ? 1e-8 : 1e-3;
  std::vector<R> first, first_dw;
  std::vector<T> first_dx;
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<R> frames(grad.size()), dw(weight.size());
    std::vector<T> dx(x.size());
    shim::poison(frames);
    shim::poison(dx);
    shim::poison(dw);
    try {
      cuda::frame_pca_forward(p, frames.data(), nullptr);
      cuda::frame_pca_backward(
          p, {frames.data(), grad.data(), dx.data(), is_weighted ? dw.data() : nullptr, gap},
          nullptr);
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + text);
      return;
    }
    if (!is_weighted) dw.clear();
    if (run > 0) {
      require(shim::same_bytes(first.data(), frames.data(), frames.size() * sizeof(R), run) &&
                  shim::same_bytes(first_dx.data(), dx.data(), dx.size() * sizeof(T), run) &&
                  shim::same_bytes(first_dw.data(), dw.data(), dw.size() * sizeof(R), run),
              std::string("the order of threads, or old memory, changes the result, ") + text);
      continue;
    }
    first = frames;
    first_dx = dx;
    first_dw = dw;
    const double tolerance = sizeof(R) == 8 ? 1e-11 : 2e-5;
    for (int64_t c = 0; c < p.clouds; ++c) {
      const int64_t begin = ends[size_t(c)];
      const Cloud<T, R, D> cloud{x.data() + begin * D,
                                 is_weighted ? weight.data() + begin : nullptr,
                                 ends[size_t(c) + 1] - begin, p.centred};
      const R* row = frames.data() + c * kWidth;
      check_forward(cloud, row, shift + 4, tolerance, text);
      check_backward(cloud, row, grad.data() + c * kWidth, dx.data() + begin * D,
                     is_weighted ? dw.data() + begin : nullptr, gap, tolerance, text);
    }
  }
}

template <class T>
void check_of(std::mt19937_64& rnd, bool is_long) {
  rnd() % 3 == 0 ? check<T, 2>(rnd, is_long) : check<T, 3>(rnd, is_long);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  shim::dtypes_in_turn(
      cases, [&](auto number, int64_t i) { check_of<decltype(number)>(rnd, i % 20 >= 18); });
  std::printf("%lld checks, %lld failed\n", (long long)checked, (long long)failed);
  return failed == 0 && checked > 0 ? 0 : 1;
}
