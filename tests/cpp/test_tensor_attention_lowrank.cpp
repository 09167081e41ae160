// Near-linear tensor attention in every instruction set that this CPU has, in float and double,
// against loops over all tuples of keys with the polynomial in the place of exp.
#include "cpu/tensor_attention_lowrank.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "instruction_sets.h"

using namespace pyloss;
using namespace pyloss::cpu;

namespace {

template <class R>
struct Data {
  LowrankProblem p{};
  std::vector<R> q, dout, dlse;
  std::vector<std::vector<R>> k, v;
  std::vector<std::vector<uint8_t>> masks;
};

template <class R>
std::vector<R> draw(std::mt19937& g, int64_t n, double low = -1) {
  std::uniform_real_distribution<double> uniform(low, 1);
  std::vector<R> x(n);
  for (R& f : x) f = R(uniform(g));
  return x;
}

struct Shape {
  int64_t batch, heads, kv_heads, n_q;
  std::vector<int64_t> n;
  int64_t d, dv, degree;
  bool masks = false, causal = false;
  std::vector<int64_t> windows{};
  int64_t offset = 0;
};

template <class R>
Data<R> make(const Shape& s) {
  std::mt19937 g(1);
  Data<R> data;
  LowrankProblem& p = data.p;
  p.batch = s.batch;
  p.heads = s.heads;
  p.kv_heads = s.kv_heads;
  p.n_q = s.n_q;
  p.d = s.d;
  p.dv = s.dv;
  p.dtype = sizeof(R) == 8 ? DType::kF64 : DType::kF32;
  p.centre = 0.25;
  double c = 1;  // all p(x) here are positive
  for (int64_t t = 0; t <= s.degree; c /= double(++t) * double(s.d)) p.coefficients.push_back(c);
  const int64_t rows = s.batch * s.heads * s.n_q, heads = s.batch * s.kv_heads;
  data.q = draw<R>(g, rows * s.d);
  data.dout = draw<R>(g, rows * s.dv);
  data.dlse = draw<R>(g, rows);
  for (size_t x = 0; x < s.n.size(); ++x) {
    LowrankAxis axis{};
    axis.band = {s.n[x], s.windows.empty() ? 0 : s.windows[x], s.offset, s.causal};
    p.axes.push_back(axis);
    data.k.push_back(draw<R>(g, heads * s.n[x] * s.d));
    data.v.push_back(draw<R>(g, heads * s.n[x] * s.dv));
    std::vector<uint8_t> mask(s.masks ? heads * s.n[x] : 0);
    for (size_t j = 0; j < mask.size(); ++j) {
      mask[j] = g() % 3 != 0;
      if (mask[j]) continue;  // what a mask hides is not looked at
      for (int64_t l = 0; l < s.d; ++l) data.k[x][j * s.d + l] = R(NAN);
      for (int64_t c = 0; c < s.dv; ++c) data.v[x][j * s.dv + c] = R(NAN);
    }
    data.masks.push_back(mask);
  }
  return data;
}

// The pointers, once `data` has its final place.
template <class R>
void connect(Data<R>& data) {
  LowrankProblem& p = data.p;
  const auto strides = [](int64_t* s, int64_t heads, int64_t n, int64_t width) {
    s[0] = heads * n * width;
    s[1] = n * width;
    s[2] = width;
  };
  p.q = data.q.data();
  strides(p.q_strides, p.heads, p.n_q, p.d);
  for (size_t x = 0; x < p.axes.size(); ++x) {
    LowrankAxis& axis = p.axes[x];
    axis.k = data.k[x].data();
    axis.v = data.v[x].data();
    strides(axis.k_strides, p.kv_heads, axis.band.n, p.d);
    strides(axis.v_strides, p.kv_heads, axis.band.n, p.dv);
    axis.mask = data.masks[x].empty() ? nullptr : data.masks[x].data();
    axis.mask_strides[0] = p.kv_heads * axis.band.n;
    axis.mask_strides[1] = axis.band.n;
  }
}

using Row = std::vector<double>;
struct Results {
  Row out, lse, y, dq;
  std::vector<Row> dk, dv;
};

// fn(j) for every tuple of keys that query i of key head `head` sees.
template <class R, class Fn>
void each_tuple(const Data<R>& data, int64_t head, int64_t i, std::vector<int64_t>& j, Fn&& fn) {
  const size_t x = j.size();
  if (x == data.p.axes.size()) return fn(j);
  const Band& band = data.p.axes[x].band;
  for (int64_t key = band.begin(i); key < band.end(i); ++key) {
    if (!data.masks[x].empty() && !data.masks[x][head * band.n + key]) continue;
    j.push_back(key);
    each_tuple(data, head, i, j, fn);
    j.pop_back();
  }
}

template <class R>
Results by_loops(const Data<R>& data) {
  const LowrankProblem& p = data.p;
  const size_t m = p.axes.size();
  const int64_t rows = p.batch * p.heads * p.n_q;
  Results r;
  r.out.assign(rows * p.dv, 0);
  r.lse.assign(rows, -infinity_<double>());
  r.y.assign(rows, 0);
  r.dq.assign(data.q.size(), 0);
  for (size_t x = 0; x < m; ++x) {
    r.dk.emplace_back(data.k[x].size(), 0.0);
    r.dv.emplace_back(data.v[x].size(), 0.0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % p.n_q, h = row / p.n_q % p.heads, b = row / p.n_q / p.heads;
    const int64_t head = b * p.kv_heads + h / p.group();
    const R* q = &data.q[row * p.d];
    const auto key = [&](size_t x, int64_t j) { return (head * p.axes[x].band.n + j) * p.d; };
    const auto value = [&](size_t x, int64_t j) { return (head * p.axes[x].band.n + j) * p.dv; };
    // The product of feature l of q and all keys but that of axis `without`.
    const auto feature = [&](const std::vector<int64_t>& j, int64_t l, int64_t without) {
      double f = without < 0 ? 1.0 : double(q[l]);
      for (size_t x = 0; x < m; ++x) {
        if (int64_t(x) != without) f *= data.k[x][key(x, j[x]) + l];
      }
      return f;
    };
    const auto values = [&](const std::vector<int64_t>& j, int64_t c, int64_t without) {
      double f = 1;
      for (size_t x = 0; x < m; ++x) {
        if (int64_t(x) != without) f *= data.v[x][value(x, j[x]) + c];
      }
      return f;
    };
    // p(S) and its derivative.
    const auto weight = [&](const std::vector<int64_t>& j) {
      double s = 0, f = 0, slope = 0;
      for (int64_t l = 0; l < p.d; ++l) s += q[l] * feature(j, l, -1);
      for (int64_t t = p.degree(); t >= 0; --t) {
        slope = slope * s + f;
        f = f * s + p.coefficients[t];
      }
      return std::pair<double, double>(f, slope);
    };
    std::vector<int64_t> tuple;
    bool any = false;
    each_tuple(data, head, i, tuple, [&](const std::vector<int64_t>& j) {
      const double f = weight(j).first;
      any = true;
      r.y[row] += f;
      for (int64_t c = 0; c < p.dv; ++c) r.out[row * p.dv + c] += f * values(j, c, -1);
    });
    if (!any) continue;
    const double y = r.y[row];
    r.lse[row] = std::log(y) + p.centre;
    double dot = data.dlse[row];
    for (int64_t c = 0; c < p.dv; ++c) {
      r.out[row * p.dv + c] /= y;
      dot -= data.dout[row * p.dv + c] * r.out[row * p.dv + c];
    }
    each_tuple(data, head, i, tuple, [&](const std::vector<int64_t>& j) {
      const auto [f, slope] = weight(j);
      double df = dot / y;
      for (int64_t c = 0; c < p.dv; ++c) {
        const double dn = data.dout[row * p.dv + c] / y;
        df += dn * values(j, c, -1);
        for (size_t x = 0; x < m; ++x) {
          r.dv[x][value(x, j[x]) + c] += dn * f * values(j, c, int64_t(x));
        }
      }
      for (int64_t l = 0; l < p.d; ++l) {
        r.dq[row * p.d + l] += df * slope * feature(j, l, -1);
        for (size_t x = 0; x < m; ++x) {
          r.dk[x][key(x, j[x]) + l] += df * slope * feature(j, l, int64_t(x));
        }
      }
    });
  }
  return r;
}

template <class R>
void compare(const char* level, const char* name, const std::vector<R>& got, const Row& want) {
  const double tolerance = sizeof(R) == 8 ? 1e-12 : 1e-5;
  double size = 1e-30, error = 0;
  bool same_kind = got.size() == want.size();
  for (size_t i = 0; same_kind && i < got.size(); ++i) {
    if (!std::isfinite(want[i])) {
      same_kind = double(got[i]) == want[i];
    } else {
      size = std::max(size, std::fabs(want[i]));
      error = std::max(error, std::fabs(got[i] - want[i]));
      same_kind = std::isfinite(got[i]);
    }
  }
  if (!same_kind || error > tolerance * size) {
    std::fprintf(stderr, "%s, %s: error %g of %g\n", level, name, error, size);
  }
  CHECK(same_kind && error <= tolerance * size);
}

// Exactly so many bytes, which hold NaN before the call.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    std::memset(data_, 0xff, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* get() const { return data_; }

 private:
  char* data_;
};

template <class R>
void check(const char* level, const Data<R>& data, const Results& want, int threads,
           std::vector<R>* all) {
  const LowrankProblem& p = data.p;
  const size_t m = p.axes.size();
  const int64_t count = monomial_count(p.d, p.degree());
  std::vector<R> out(want.out.size()), lse(want.lse.size()), y(want.y.size()), dq(want.dq.size());
  std::vector<std::vector<R>> states(m), dk(m), dv(m);
  LowrankForward f{out.data(), lse.data(), y.data(), {}};
  for (size_t x = 0; x < m; ++x) {
    states[x].resize(p.scans() ? 0 : p.batch * p.kv_heads * count * (p.dv + 1));
    f.states.push_back(states[x].data());
  }
  Scratch forward_scratch(tensor_attention_lowrank_forward_scratch(p, threads));
  CHECK(tensor_attention_lowrank_forward(p, f, forward_scratch.get(), threads) == 0);
  compare(level, "out", out, want.out);
  compare(level, "lse", lse, want.lse);
  compare(level, "y", y, want.y);

  LowrankBackward b{};
  b.dout = data.dout.data();
  const int64_t strides[3] = {p.heads * p.n_q * p.dv, p.n_q * p.dv, p.dv};
  std::copy(strides, strides + 3, b.dout_strides);
  b.dlse = data.dlse.data();
  b.out = out.data();
  b.y = y.data();
  b.dq = dq.data();
  for (size_t x = 0; x < m; ++x) {
    b.states.push_back(states[x].data());
    dk[x].resize(want.dk[x].size());
    dv[x].resize(want.dv[x].size());
    b.dk.push_back(dk[x].data());
    b.dv.push_back(dv[x].data());
  }
  Scratch backward_scratch(tensor_attention_lowrank_backward_scratch(p, threads));
  tensor_attention_lowrank_backward(p, b, backward_scratch.get(), threads);
  compare(level, "dq", dq, want.dq);
  *all = out;
  all->insert(all->end(), dq.begin(), dq.end());
  for (size_t x = 0; x < m; ++x) {
    compare(level, "dk", dk[x], want.dk[x]);
    compare(level, "dv", dv[x], want.dv[x]);
    all->insert(all->end(), dk[x].begin(), dk[x].end());
    all->insert(all->end(), dv[x].begin(), dv[x].end());
  }
}

template <class R>
void check_levels(const Shape& shape) {
  Data<R> data = make<R>(shape);
  connect(data);
  const Results want = by_loops(data);
  for_all_instruction_sets([&](const char* level) {
    std::vector<R> one, three;
    check(level, data, want, 1, &one);
    check(level, data, want, 3, &three);
    CHECK(one.size() == three.size() &&
          std::memcmp(one.data(), three.data(), one.size() * sizeof(R)) == 0);
  });
}

void check_all(const Shape& shape) {
  check_levels<float>(shape);
  check_levels<double>(shape);
}

void check_flags() {
  Data<float> data = make<float>({1, 1, 1, 3, {4, 4}, 2, 2, 1});
  connect(data);
  LowrankProblem& p = data.p;
  std::vector<float> out(6), lse(3), y(3), states[2];
  for (auto& s : states) s.resize(9);
  const LowrankForward f{out.data(), lse.data(), y.data(), {states[0].data(), states[1].data()}};
  Scratch scratch(tensor_attention_lowrank_forward_scratch(p, 1));
  const auto flags = [&] { return tensor_attention_lowrank_forward(p, f, scratch.get(), 1); };
  CHECK(flags() == 0);
  p.coefficients = {-1.0, 0.0};
  CHECK(flags() == kNotPositive);
  p.coefficients = {1.0, 0.0};
  data.q[0] = float(NAN);
  CHECK(flags() == kNotFinite);
}

}  // namespace

int main() {
  // batch, heads, kv heads, n_q, n of each axis, d, dv, degree, masks
  check_all({1, 1, 1, 5, {6, 7}, 3, 2, 2});
  check_all({2, 2, 1, 9, {10, 5}, 4, 3, 3, true});
  check_all({1, 1, 1, 70, {65, 20}, 16, 17, 2});
  check_all({1, 1, 1, 3, {1100, 3}, 3, 2, 2, true});  // chunks of blocks
  check_all({1, 1, 1, 9, {10, 9}, 2, 0, 5});
  check_all({1, 1, 1, 4, {3, 4, 5}, 3, 2, 2, true});
  check_all({1, 1, 1, 4, {30}, 20, 33, 2});
  check_all({1, 1, 1, 4, {5, 0}, 3, 2, 1});
  check_all({1, 1, 1, 4, {5, 6}, 3, 2, 0});
  check_all({1, 1, 1, 4, {5, 6}, 1, 2, 4});
  // .., causal, windows, offset
  check_all({1, 1, 1, 70, {70, 70}, 3, 2, 2, false, true});
  check_all({2, 4, 2, 66, {90, 40}, 4, 3, 3, true, true, {}, 20});
  check_all({1, 1, 1, 150, {150, 150}, 3, 4, 2, false, true, {20, 7}});
  check_all({1, 1, 1, 200, {200, 200}, 2, 1, 2, true, true, {66, 1}});
  check_all({1, 1, 1, 400, {400}, 3, 2, 2, true, true, {200}});
  check_all({1, 1, 1, 300, {300, 40}, 2, 2, 2, false, false, {90, 0}, -8});
  check_all({1, 1, 1, 30, {300}, 2, 3, 1, false, false, {70}, 150});
  check_all({1, 1, 1, 5, {40, 30, 9}, 3, 2, 2, true, true, {30, 0, 4}, 10});
  check_all({1, 1, 1, 40, {30}, 20, 17, 3, false, true});  // tiles
  check_all({1, 1, 1, 9, {9, 8}, 3, 2, 0, false, true});
  check_all({1, 1, 1, 9, {9, 0}, 3, 2, 2, false, true});
  check_all({1, 1, 1, 20, {20, 20}, 3, 2, 2, false, true, {5, 5}, -int64_t(INT32_MAX)});
  check_all({1, 1, 1, 20, {20, 20}, 3, 2, 2, false, true, {INT32_MAX, 0}, INT32_MAX - 10});
  check_flags();
  CHECK(monomial_count(16, 2) == 153 && monomial_count(64, 2) == 2145);
  CHECK(monomial_count(128, 3) == 366145 && monomial_count(1 << 20, 4) == -1);
  return check_result();
}
