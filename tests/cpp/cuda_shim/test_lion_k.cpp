// Runs the CUDA kernel of Lion-K on the CPU shim, over random lists of tensors, in four thread
// orders and over other rests of memory, whose outputs must be equal to the last bit, and compares
// them with the formula in double. Arguments: number of problems, seed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/lion_k.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;
using lion_k::Kappa;
using lion_k::Rounding;

int64_t checked = 0, failed = 0;

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

double get(DType t, const std::vector<char>& bytes, int64_t i) {
  double found = 0;
  dispatch_float(t, [&](auto zero) {
    using T = decltype(zero);
    found = double(to_float(reinterpret_cast<const T*>(bytes.data())[i]));
  });
  return found;
}
void set(DType t, std::vector<char>* bytes, int64_t i, double v) {
  dispatch_float(t, [&](auto zero) {
    using T = decltype(zero);
    T& to = reinterpret_cast<T*>(bytes->data())[i];
    if constexpr (std::is_same_v<T, double>) {
      to = v;
    } else {
      to = FromFloat<T>::of(float(v));
    }
  });
}

double slope(Kappa kappa, double c, double e) {
  const double sign = c > 0 ? 1 : c < 0 ? -1 : 0;
  switch (kappa) {
    case Kappa::kL1:
      return sign;
    case Kappa::kSoft:
      return std::fabs(c) > e ? sign : 0;
    case Kappa::kHuber:
      return std::max(-e, std::min(e, c)) / e;
    default:
      return c / std::sqrt(c * c + e * e);
  }
}

// The spacing of a half type about v; of the others what their arithmetic loses.
double spacing(DType t, double v) {
  const double size = std::max(std::fabs(v), 1e-30);
  if (t == DType::kF64) return 1e-14 * (1 + size);
  if (t == DType::kF32) return 4e-7 * (1 + size);
  const int bits = t == DType::kBF16 ? 7 : 10;
  return std::ldexp(1.0, std::max(std::ilogb(size), t == DType::kF16 ? -14 : -126) - bits);
}

// Arrays of one tensor, at an offset of some elements so that not all are aligned.
struct Arrays {
  int64_t n, skip;
  std::vector<char> x, g, m, given, rest;
};

void check(std::mt19937_64& rnd) {
  const auto below = [&](int64_t n) { return int64_t(rnd() % uint64_t(n)); };
  std::normal_distribution<double> normal;
  const DType dtypes[] = {DType::kF64, DType::kF32, DType::kBF16, DType::kF16};
  lion_k::Problem p{};
  p.x_dtype = dtypes[below(4)];
  p.g_dtype = below(2) ? p.x_dtype : dtypes[below(4)];
  p.m_dtype = below(2) ? p.x_dtype : dtypes[below(4)];
  const DType wide = p.x_dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  const bool half = dtype_size(p.x_dtype) == 2;
  lion_k::Options& o = p.options;
  o.kappa = Kappa(below(lion_k::kKappaCount));
  o.rounding = half ? Rounding(below(lion_k::kRoundingCount)) : Rounding::kNearest;
  o.maximize = below(2) != 0;
  o.lr = 0.01, o.beta1 = 0.9, o.beta2 = 0.98, o.weight_decay = 0.5, o.e = 0.05;
  o.seed = below(1000), o.step = 3;
  const bool given = o.kappa == Kappa::kGiven, kept = o.rounding == Rounding::kCompensated;
  p.count = below(8) == 0 ? 130 : below(4);
  std::vector<Arrays> all(static_cast<size_t>(p.count));
  for (Arrays& a : all) {
    a.n = p.count > 100 ? below(6) : below(10) == 0 ? 9000 : below(70);
    a.skip = below(3);
    for (auto [bytes, t] : {std::pair{&a.x, p.x_dtype},
                            {&a.g, p.g_dtype},
                            {&a.m, p.m_dtype},
                            {&a.given, wide},
                            {&a.rest, p.x_dtype}}) {
      const bool small = bytes == &a.rest;
      bytes->resize(size_t((a.n + a.skip) * dtype_size(t)));
      for (int64_t i = 0; i < a.n + a.skip; ++i) {
        set(t, bytes, i, normal(rnd) * (small ? 1e-4 : below(20) ? 0.3 : 1e-7));
      }
    }
  }
  const float lr = 0.02f, step = 5, found_inf = below(6) == 0, *none = nullptr;
  const cuda::LionKScalars scalars{below(2) ? &lr : none, below(2) ? &found_inf : none,
                                   below(2) ? &step : none};
  const bool skips = scalars.found_inf && found_inf != 0;
  const double rate = scalars.lr ? double(lr) : o.lr;
  char text[160];
  std::snprintf(text, sizeof text, "%lld tensors, dtypes %d %d %d, kappa %d, rounding %d%s",
                (long long)p.count, int(p.x_dtype), int(p.g_dtype), int(p.m_dtype), int(o.kappa),
                int(o.rounding), skips ? ", skipped" : "");

  std::vector<Arrays> first;
  for (int run = 0; run < shim::kRuns; ++run) {
    shim::start_run(run);
    std::vector<Arrays> now = all;
    std::vector<lion_k::Tensor> tensors;
    for (Arrays& a : now) {
      const auto at = [&](std::vector<char>& v, DType t) {
        return v.data() + a.skip * dtype_size(t);
      };
      tensors.push_back({at(a.x, p.x_dtype), at(a.g, p.g_dtype), at(a.m, p.m_dtype),
                         given ? at(a.given, wide) : nullptr,
                         kept ? at(a.rest, p.x_dtype) : nullptr, a.n, int64_t(tensors.size())});
    }
    p.tensors = tensors.data();
    try {
      cuda::lion_k_step(p, scalars, nullptr);
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + text);
      return;
    }
    for (size_t k = 0; k < now.size() && run > 0; ++k) {
      require(now[k].x == first[k].x && now[k].m == first[k].m && now[k].rest == first[k].rest,
              std::string("the order of threads, or old memory, changes the result, ") + text);
    }
    if (run == 0) first = now;
  }
  for (size_t k = 0; k < all.size(); ++k) {
    const Arrays &was = all[k], &is = first[k];
    require(is.g == was.g, std::string("g is written, ") + text);
    if (skips) {
      require(is.x == was.x && is.m == was.m && is.rest == was.rest,
              std::string("a skipped step writes, ") + text);
      continue;
    }
    for (int64_t i = 0; i < was.n + was.skip; ++i) {
      const double x = get(p.x_dtype, was.x, i), m = get(p.m_dtype, was.m, i);
      const double found_x = get(p.x_dtype, is.x, i), found_m = get(p.m_dtype, is.m, i);
      if (i < was.skip) {
        require(found_x == x && found_m == m, std::string("writes before its array, ") + text);
        continue;
      }
      const double g = (o.maximize ? -1 : 1) * get(p.g_dtype, was.g, i);
      const double c = o.beta1 * m + (1 - o.beta1) * g;
      // Where the direction jumps, float may be on the other side.
      const double edge = o.kappa == Kappa::kSoft ? std::fabs(std::fabs(c) - o.e) : std::fabs(c);
      if (edge < 1e-6 && (o.kappa == Kappa::kL1 || o.kappa == Kappa::kSoft)) continue;
      const double d = given ? get(wide, was.given, i) : slope(o.kappa, c, o.e);
      const double rest = kept ? get(p.x_dtype, was.rest, i) : 0;
      const double want_x = (x + rest) * (1 - rate * o.weight_decay) - rate * d;
      const double want_m = o.beta2 * m + (1 - o.beta2) * g;
      // To nearest: half the spacing, and what float loses; at random: less than all of it.
      const double lost = wide == DType::kF64 ? 1e-14 : 4e-7;
      const double room = spacing(p.x_dtype, std::max(std::fabs(want_x), std::fabs(found_x)));
      require(std::fabs(found_x - want_x) <=
                  (o.rounding == Rounding::kStochastic ? 1 : 0.51) * room + lost,
              std::string("x, ") + text);
      require(std::fabs(found_m - want_m) <= 0.51 * spacing(p.m_dtype, want_m) + lost,
              std::string("m, ") + text);
      if (kept) {
        const double sum = found_x + get(p.x_dtype, is.rest, i);
        require(std::fabs(sum - want_x) <= room / 200 + lost, std::string("compensation, ") + text);
      }
    }
  }
}

// What the step is given the random numbers of: seed, step, place of the tensor in the list, and
// element, in the second block of a tensor too. Bits as the common code has them.
template <class T>
void check_bits(DType t, bool on_device) {
  const int64_t n = 5001;
  const float step = 8;
  std::vector<char> x(size_t(n * 2)), g(size_t(n * 2)), given(size_t(n * 4));
  std::vector<char> m(size_t(n * 2)), other_m(size_t(n * 2));
  for (int64_t i = 0; i < n; ++i) set(t, &x, i, 1 + double(i) / 7);
  const std::vector<char> before = x;
  std::vector<char> other = x;
  const lion_k::Tensor tensors[] = {
      {other.data(), g.data(), other_m.data(), given.data(), nullptr, n, 4},
      {x.data(), g.data(), m.data(), given.data(), nullptr, n, 9}};
  lion_k::Problem p{};
  p.tensors = tensors, p.count = 2, p.x_dtype = p.g_dtype = p.m_dtype = t;
  p.options.kappa = Kappa::kGiven, p.options.rounding = Rounding::kStochastic;
  p.options.lr = 0.01, p.options.weight_decay = 0.5, p.options.seed = 77, p.options.step = 3;
  cuda::lion_k_step(p, {nullptr, nullptr, on_device ? &step : nullptr}, nullptr);
  const uint32_t key = lion_k::tensor_key(77, on_device ? 8 : 3, 9);
  const float decay = lion_k::factors<float>(p.options, p.options.lr).decay;
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float kept = to_float(reinterpret_cast<const T*>(before.data())[i]) * decay;
    const T want = lion_k::round_stochastic(T{}, kept, lion_k::random_bits(key, uint32_t(i)));
    wrong += reinterpret_cast<const T*>(x.data())[i].bits != want.bits;
  }
  require(wrong == 0, "the random bits of a step");
  require(other != x, "two tensors have the same random numbers");
}

// Infinity has nothing to round, and a number that overflows its type nothing to make up for.
void check_overflow() {
  std::vector<char> x(2), zero(8), rest(2), given(4);
  set(DType::kF16, &x, 0, 60000), set(DType::kF32, &given, 0, -20000);
  const lion_k::Tensor tensor{x.data(), zero.data(), zero.data(), given.data(), rest.data(), 1, 0};
  lion_k::Problem p{};
  p.tensors = &tensor, p.count = 1, p.x_dtype = p.g_dtype = p.m_dtype = DType::kF16;
  p.options.kappa = Kappa::kGiven, p.options.rounding = Rounding::kCompensated, p.options.lr = 1;
  cuda::lion_k_step(p, {}, nullptr);
  require(std::isinf(get(DType::kF16, x, 0)), "the overflow of a half type");
  require(get(DType::kF16, rest, 0) == 0, "the compensation of what has overflowed");
  for (const DType t : {DType::kBF16, DType::kF16}) {
    std::vector<char> many(32), none(32);
    for (int64_t i = 0; i < 16; ++i) set(t, &many, i, HUGE_VAL);
    const lion_k::Tensor infinite{many.data(), none.data(), none.data(), nullptr, nullptr, 16, 0};
    p.tensors = &infinite, p.x_dtype = p.g_dtype = p.m_dtype = t;
    p.options.kappa = Kappa::kL1, p.options.rounding = Rounding::kStochastic;
    cuda::lion_k_step(p, {}, nullptr);
    for (int64_t i = 0; i < 16; ++i) require(std::isinf(get(t, many, i)), "rounded infinity");
  }
}

// The mean of many roundings is the number that was rounded.
void check_mean() {
  for (const DType t : {DType::kBF16, DType::kF16}) {
    const int64_t n = 20000;
    std::vector<char> x(size_t(n * 2)), g(size_t(n * 2)), m(size_t(n * 2));
    for (int64_t i = 0; i < n; ++i) set(t, &x, i, i % 2 ? 1.0 : -3 * 0x1p-20);
    lion_k::Tensor tensor{x.data(), g.data(), m.data(), nullptr, nullptr, n, 0};
    lion_k::Problem p{};
    p.tensors = &tensor, p.count = 1, p.x_dtype = p.g_dtype = p.m_dtype = t;
    p.options.rounding = Rounding::kStochastic;
    p.options.lr = 1e-3, p.options.weight_decay = 0.5;
    cuda::lion_k_step(p, {}, nullptr);
    double large = 0, tiny = 0;
    for (int64_t i = 0; i < n; ++i) (i % 2 ? large : tiny) += get(t, x, i) / double(n / 2);
    // Five standard deviations of such a mean.
    require(std::fabs(large - (1 - 5e-4)) < 7e-5, "the mean of rounded numbers");
    require(std::fabs(tiny + 3 * 0x1p-20 * (1 - 5e-4)) < 6e-10,
            "the mean of rounded small numbers");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  std::mt19937_64 rnd(argc > 2 ? uint64_t(std::atoll(argv[2])) : 0);
  for (int64_t i = 0; i < cases; ++i) check(rnd);
  check_mean();
  for (const bool on_device : {false, true}) {
    check_bits<BF16>(DType::kBF16, on_device);
    check_bits<F16>(DType::kF16, on_device);
  }
  check_overflow();
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
