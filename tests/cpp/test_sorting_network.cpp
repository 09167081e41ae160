// Sorting networks in every instruction set that this CPU has, against loops in double whose
// gradients are finite differences; and the ranks of target values.
#include "cpu/sorting_network.h"

#include <cstdio>
#include <functional>
#include <limits>
#include <random>

#include "check.h"
#include "cpu/sorting_network_plan.h"
#include "cpu/sorting_network_ranks.h"
#include "instruction_sets.h"

using namespace pyloss;
using namespace pyloss::cpu;
using sorting::Distribution;
using sorting::Network;

namespace {

using Row = std::vector<double>;

// Exact in float32, so that every kernel sees the same.
Row draw(std::mt19937& g, int64_t n) {
  std::normal_distribution<float> normal;
  Row x(n);
  for (double& v : x) v = normal(g);
  return x;
}

// --- by loops ------------------------------------------------------------------------------------

double wrong_side(Distribution f, double ad, double s, double lambda) {
  const double u = s * ad;
  switch (f) {
    case Distribution::kLogistic:
      return 1 / (1 + std::exp(u));
    case Distribution::kLogisticPhi:
      return 1 / (1 + std::exp(u / std::pow(ad + 1e-10, lambda)));
    case Distribution::kGaussian:
      return std::erfc(u / std::sqrt(2.0)) / 2;
    case Distribution::kCauchy:
      return std::atan2(1.0, u) / std::acos(-1.0);
    case Distribution::kReciprocal:
      return 1 / (2 + u);
    default:
      return u > 0.25 ? 1 / (16 * u) : 0.5 - u;
  }
}

struct Relaxed {
  Row y, p;  // [n], [n][n]
};

Relaxed relax(const sorting::Problem& problem, Row x) {
  const Net net(problem);
  const int64_t n = problem.n;
  Row p(n * n);
  for (int64_t i = 0; i < n; ++i) p[i * n + i] = 1;
  for (int l = 0; l < net.layers; ++l) {
    for (int32_t c = 0; c < net.layer[l].count; ++c) {
      const sorting::Comparator pair = net.at(l, c);
      const double d = x[pair.hi] - x[pair.lo];
      const double tau =
          wrong_side(problem.distribution, std::abs(d), problem.steepness, problem.art_lambda);
      const double alpha = d < 0 ? tau : 1 - tau, beta = 1 - alpha;
      const auto mix = [&](double* lo, double* hi) {
        const double low = alpha * *lo + beta * *hi, high = beta * *lo + alpha * *hi;
        *lo = low;
        *hi = high;
      };
      mix(&x[pair.lo], &x[pair.hi]);
      for (int64_t i = 0; i < n; ++i) mix(&p[i * n + pair.lo], &p[i * n + pair.hi]);
    }
  }
  return {x, p};
}

double cross_entropy(sorting::Loss kind, const Row& p, const std::vector<int32_t>& first,
                     int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < n; ++r) {
      const double q = r == first[i], w = p[i * n + r];
      if (kind != sorting::Loss::kBce) {
        sum -= q * std::log(std::max(w, 1e-30)) / double(n);
      } else {
        sum -= (q * std::max(std::log(w), -100.0) + (1 - q) * std::max(std::log1p(-w), -100.0)) /
               double(n * n);
      }
    }
  }
  return sum;
}

Row gradient(const std::function<double(const Row&)>& f, Row x) {
  constexpr double kStep = 1e-6;
  Row g(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + kStep;
    const double above = f(x);
    x[i] = at - kStep;
    g[i] = (above - f(x)) / (2 * kStep);
    x[i] = at;
  }
  return g;
}

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// --- a case --------------------------------------------------------------------------------------

struct Case {
  int64_t items;
  int32_t n;
  Network network;
  Distribution distribution;
};

template <class R>
struct Data {
  explicit Data(const Case& c) {
    std::mt19937 g(7);
    const int64_t n = c.n;
    p.dtype = sizeof(R) == 8 ? DType::kF64 : DType::kF32;
    p.items = c.items;
    p.n = c.n;
    p.network = c.network;
    p.distribution = c.distribution;
    p.steepness = 1;  // so that no entry of P comes near 0 or 1, where rounding decides on the loss
    p.art_lambda = 0.25;
    for (int64_t b = 0; b < c.items; ++b) {
      const Row row = draw(g, n), gy = draw(g, n), gp = draw(g, n * n);
      std::vector<int32_t> order(n);
      for (int32_t i = 0; i < n; ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), g);
      const Relaxed found = relax(p, row);
      const auto append = [](auto& to, const Row& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      append(y, found.y);
      append(matrix, found.p);
      append(x, row);
      append(cotangent_y, gy);
      append(cotangent_p, gp);
      first.insert(first.end(), order.begin(), order.end());
      append(gx_y, gradient([&](const Row& v) { return dot(relax(p, v).y, gy); }, row));
      append(gx_p, gradient([&](const Row& v) { return dot(relax(p, v).p, gp); }, row));
      for (int kind = 0; kind < 2; ++kind) {
        const auto loss = [&](const Row& v) {
          return cross_entropy(sorting::Loss(kind), relax(p, v).p, order, n);
        };
        losses[kind].push_back(loss(row));
        append(gx_loss[kind], gradient(loss, row));
      }
    }
    p.x = x.data();
  }
  Data(const Data&) = delete;  // p points into it

  sorting::Problem p{};
  std::vector<R> x, cotangent_y, cotangent_p;
  std::vector<int32_t> first;
  Row y, matrix, gx_y, gx_p, losses[2], gx_loss[2];  // wanted
};

template <class R>
void compare(const char* level, const char* name, const Case& c, const std::vector<R>& found,
             const Row& want, double tolerance) {
  double error = 0, size = 1e-3;
  bool finite = true;
  for (size_t i = 0; i < want.size(); ++i) {
    finite = finite && std::isfinite(found[i]);
    error = std::max(error, std::abs(double(found[i]) - want[i]));
    size = std::max(size, std::abs(want[i]));
  }
  if (!finite || error > tolerance * size) {
    std::fprintf(stderr, "%s, %s, %zu bytes, (%d, %d), network %d, distribution %d: %g of %g\n",
                 level, name, sizeof(R), int(c.items), c.n, int(c.network), int(c.distribution),
                 error, size);
  }
  CHECK(finite && error <= tolerance * size);
}

template <class R>
void check(const char* level, const Case& c, const Data<R>& data) {
  const sorting::Problem& p = data.p;
  const bool wide = sizeof(R) == 8;
  const double values = wide ? 1e-12 : 4e-6, slopes = wide ? 3e-6 : 2e-4;  // of the differences
  const int64_t size = p.items * p.n;
  std::vector<R> y(size), gx(size), matrix(size * p.n), loss(p.items);

  sorting_sort(p, y.data(), 1);
  compare(level, "sort", c, y, data.y, values);
  sorting_sort_backward(p, data.cotangent_y.data(), gx.data(), 1);
  compare(level, "sort backward", c, gx, data.gx_y, slopes);
  sorting_permutation(p, y.data(), matrix.data(), 2);
  compare(level, "y of P", c, y, data.y, values);
  compare(level, "P", c, matrix, data.matrix, values);
  sorting_permutation_backward(p, nullptr, data.cotangent_p.data(), gx.data(), 2);
  compare(level, "P backward", c, gx, data.gx_p, slopes);
  for (int kind = 0; kind < 2; ++kind) {
    const SortingTargets targets{TargetOrder::kRanks, data.first.data(), DType::kI32, nullptr,
                                 sorting::Loss(kind)};
    sorting_loss(p, targets, Reduction::kNone, loss.data(), gx.data(), 1);
    compare(level, "loss", c, loss, data.losses[kind], values);
    compare(level, "loss backward", c, gx, data.gx_loss[kind], slopes);
    sorting_loss(p, targets, Reduction::kNone, loss.data(), nullptr, 1);
    compare(level, "loss alone", c, loss, data.losses[kind], values);
  }

  // P^T x is the sort, and P^T and P of the unit matrix are the matrix's rows and columns.
  std::vector<R> out(size);
  sorting_apply(p, {data.x.data(), false, true, 1}, out.data(), 1);
  compare(level, "P^T x", c, out, data.y, values);
  std::vector<R> unit(p.n * p.n), product(size * p.n);
  for (int64_t i = 0; i < p.n; ++i) unit[i * p.n + i] = 1;
  sorting_apply(p, {unit.data(), true, false, p.n}, product.data(), 1);
  compare(level, "P I", c, product, data.matrix, values);
  sorting_apply_backward(p, {unit.data(), true, false, p.n}, data.cotangent_p.data(), gx.data(),
                         nullptr, 1);
  compare(level, "P I backward", c, gx, data.gx_p, slopes);
}

template <class R>
void check_all_levels(const Case& c) {
  const Data<R> data(c);
  for_all_instruction_sets([&](const char* level) { check(level, c, data); });
}

// --- ranks ---------------------------------------------------------------------------------------

template <class T>
void check_ranks(DType dtype, int32_t n, int kinds) {
  constexpr int64_t kItems = 5;
  std::mt19937 g(3);
  std::uniform_int_distribution<int> level(-kinds, kinds);
  std::vector<T> v(kItems * n);
  for (T& x : v) x = T(level(g));
  for (TargetOrder order : {TargetOrder::kValues, TargetOrder::kDescending, TargetOrder::kShared,
                            TargetOrder::kSharedDescending}) {
    const bool shared = order >= TargetOrder::kShared;
    const bool descending =
        order == TargetOrder::kDescending || order == TargetOrder::kSharedDescending;
    const SortingRanks found = target_ranks(v.data(), dtype, kItems, n, order, 2);
    CHECK(found.nan_rows.empty() && found.count.empty() == !shared);
    for (int64_t b = 0; b < kItems; ++b) {
      const T* row = v.data() + b * n;
      for (int32_t i = 0; i < n; ++i) {
        int32_t before = 0, equal = 0;
        for (int32_t j = 0; j < n; ++j) {
          before += descending ? row[j] > row[i] : row[j] < row[i];
          before += !shared && j < i && row[j] == row[i];
          equal += row[j] == row[i];
        }
        CHECK(found.first[b * n + i] == before);
        CHECK(!shared || found.count[b * n + i] == equal);
      }
    }
  }
}

void check_nan_rows() {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const float v[] = {1, 0, kNaN, 3, 2, 1, kNaN, kNaN, kNaN};
  const auto ranks = [&](TargetOrder order) {
    return target_ranks(v, DType::kF32, 3, 3, order, 1);
  };
  for (TargetOrder order : {TargetOrder::kValues, TargetOrder::kSharedDescending}) {
    CHECK((ranks(order).nan_rows == std::vector<int64_t>{0, 2}));
  }
  const std::vector<int32_t> first = ranks(TargetOrder::kValues).first;
  CHECK(first[3] == 2 && first[4] == 1 && first[5] == 0);
}

}  // namespace

int main() {
  for (int network = 0; network < 3; ++network) {
    // Rows of the batch as lanes, full and not; rows of P as lanes, in one vector or several.
    for (const auto& [items, n] :
         {std::pair<int64_t, int32_t>{3, 1}, {9, 5}, {17, 13}, {2, 16}, {2, 21}, {1, 40}}) {
      const Case c{items, n, Network(network), Distribution((network + n) % 6)};
      check_all_levels<float>(c);
      check_all_levels<double>(c);
    }
    for (int distribution = 0; distribution < 6; ++distribution) {
      check_all_levels<float>({5, 9, Network(network), Distribution(distribution)});
      check_all_levels<double>({1, 18, Network(network), Distribution(distribution)});
    }
  }
  for (int32_t n : {1, 2, 37, 128, 129, 300}) {
    check_ranks<float>(DType::kF32, n, 20);
    check_ranks<double>(DType::kF64, n, 1000000);
    check_ranks<int64_t>(DType::kI64, n, 3);
    check_ranks<int32_t>(DType::kI32, n, 50);
  }
  check_nan_rows();
  return check_result();
}
