// Tensor attention in every instruction set that this CPU has, against loops in double.
#include "cpu/tensor_attention.h"

#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "instruction_sets.h"

using namespace pyloss;
using namespace pyloss::cpu;

namespace {

struct Data {
  TensorAttentionProblem p{};
  std::vector<float> q, k[2], v[2], mask[2], dout, dlse;
};

std::vector<float> draw(std::mt19937& g, int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& f : x) f = normal(g);
  return x;
}

Data make(int64_t heads, int64_t kv_heads, int64_t n_q, int64_t n_1, int64_t n_2, int64_t d,
          int64_t dv, bool causal, int64_t w1, int64_t w2, int64_t offset, bool masks) {
  std::mt19937 g(1);
  Data data;
  TensorAttentionProblem& p = data.p;
  p.batch = 1;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.n_q = n_q;
  p.d = d;
  p.dv = dv;
  p.dtype = DType::kF32;
  p.scale = 1.0 / std::sqrt(double(d));
  data.q = draw(g, heads * n_q * d);
  data.dout = draw(g, heads * n_q * dv);
  data.dlse = draw(g, heads * n_q);
  const int64_t n[2] = {n_1, n_2}, window[2] = {w1, w2};
  for (int x = 0; x < 2; ++x) {
    data.k[x] = draw(g, kv_heads * n[x] * d);
    data.v[x] = draw(g, kv_heads * n[x] * dv);
    if (masks) data.mask[x] = draw(g, heads * n_q * n[x]);
    p.axes[x].band = {n[x], window[x], offset, causal};
  }
  p.axes[1].bias_k = 0.25;
  p.axes[1].bias_v = 1.0;
  return data;
}

// The pointers, once `data` has its final place.
void connect(Data& data) {
  TensorAttentionProblem& p = data.p;
  const auto strides = [](int64_t* s, int64_t heads, int64_t n, int64_t width) {
    s[0] = heads * n * width;
    s[1] = n * width;
    s[2] = width;
  };
  p.q = data.q.data();
  strides(p.q_strides, p.heads, p.n_q, p.d);
  for (int x = 0; x < 2; ++x) {
    TensorAttentionAxis& axis = p.axes[x];
    axis.k = data.k[x].data();
    axis.v = data.v[x].data();
    axis.mask = data.mask[x].empty() ? nullptr : data.mask[x].data();
    strides(axis.k_strides, p.kv_heads, axis.band.n, p.d);
    strides(axis.v_strides, p.kv_heads, axis.band.n, p.dv);
    strides(axis.mask_strides, p.heads, p.n_q, axis.band.n);
  }
}

struct Results {
  std::vector<double> out, lse, dq, dk[2], dv[2], dmask[2];
};

// Formulas of the header, triple by triple.
Results by_loops(const Data& data) {
  const TensorAttentionProblem& p = data.p;
  const Band &a = p.axes[0].band, &b = p.axes[1].band;
  Results r;
  r.out.assign(p.heads * p.n_q * p.dv, 0);
  r.lse.assign(p.heads * p.n_q, -infinity_<double>());
  r.dq.assign(data.q.size(), 0);
  for (int x = 0; x < 2; ++x) {
    r.dk[x].assign(data.k[x].size(), 0);
    r.dv[x].assign(data.v[x].size(), 0);
    r.dmask[x].assign(p.heads * p.n_q * p.axes[x].band.n, 0);
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    const int64_t g = h / p.group();
    for (int64_t i = 0; i < p.n_q; ++i) {
      const int64_t row = h * p.n_q + i;
      const float* q = &data.q[row * p.d];
      const auto key = [&](int x, int64_t j) {
        return &data.k[x][(g * p.axes[x].band.n + j) * p.d];
      };
      const auto value = [&](int x, int64_t j) {
        return &data.v[x][(g * p.axes[x].band.n + j) * p.dv];
      };
      const auto each = [&](auto&& fn) {
        for (int64_t j = a.begin(i); j < a.end(i); ++j) {
          for (int64_t k = b.begin(i); k < b.end(i); ++k) {
            double s = 0;
            for (int64_t l = 0; l < p.d; ++l)
              s += double(q[l]) * key(0, j)[l] * (key(1, k)[l] + 0.25);
            s *= p.scale;
            if (!data.mask[0].empty()) s += data.mask[0][row * a.n + j];
            if (!data.mask[1].empty()) s += data.mask[1][row * b.n + k];
            fn(j, k, s);
          }
        }
      };
      double most = -infinity_<double>(), sum = 0;
      each([&](int64_t, int64_t, double s) { most = std::max(most, s); });
      each([&](int64_t, int64_t, double s) { sum += std::exp(s - most); });
      if (sum == 0) continue;
      r.lse[row] = most + std::log(sum);
      each([&](int64_t j, int64_t k, double s) {
        for (int64_t c = 0; c < p.dv; ++c) {
          r.out[row * p.dv + c] +=
              std::exp(s - r.lse[row]) * value(0, j)[c] * (value(1, k)[c] + 1.0);
        }
      });
      double delta = -data.dlse[row];
      const float* dout = &data.dout[row * p.dv];
      for (int64_t c = 0; c < p.dv; ++c) delta += dout[c] * r.out[row * p.dv + c];
      each([&](int64_t j, int64_t k, double s) {
        const double prob = std::exp(s - r.lse[row]);
        double dp = 0;
        for (int64_t c = 0; c < p.dv; ++c) {
          const double v1 = value(0, j)[c], v2 = value(1, k)[c] + 1.0;
          dp += dout[c] * v1 * v2;
          r.dv[0][(g * a.n + j) * p.dv + c] += prob * dout[c] * v2;
          r.dv[1][(g * b.n + k) * p.dv + c] += prob * dout[c] * v1;
        }
        const double ds = prob * (dp - delta);
        for (int64_t l = 0; l < p.d; ++l) {
          const double k1 = key(0, j)[l], k2 = key(1, k)[l] + 0.25;
          r.dq[row * p.d + l] += p.scale * ds * k1 * k2;
          r.dk[0][(g * a.n + j) * p.d + l] += p.scale * ds * q[l] * k2;
          r.dk[1][(g * b.n + k) * p.d + l] += p.scale * ds * q[l] * k1;
        }
        r.dmask[0][row * a.n + j] += ds;
        r.dmask[1][row * b.n + k] += ds;
      });
    }
  }
  return r;
}

void compare(const char* level, const char* name, const std::vector<float>& got,
             const std::vector<double>& want, double tolerance) {
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

void check(const char* level, const Data& data, const Results& want) {
  const TensorAttentionProblem& p = data.p;
  const bool masks = !data.mask[0].empty();
  std::vector<float> out(want.out.size()), lse(want.lse.size()), dq(want.dq.size());
  std::vector<float> dk[2], dv[2], dmask[2];
  const auto aligned = [](std::vector<char>& x) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(x.data()) + 63) / 64 * 64);
  };
  std::vector<char> scratch(tensor_attention_forward_scratch(p, 2) + 64);
  tensor_attention_forward(p, {out.data(), lse.data()}, aligned(scratch), 2);
  compare(level, "out", out, want.out, 2e-5);
  compare(level, "lse", lse, want.lse, 1e-5);

  TensorAttentionBackward b{};
  b.dout = data.dout.data();
  const int64_t strides[3] = {p.heads * p.n_q * p.dv, p.n_q * p.dv, p.dv};
  std::copy(strides, strides + 3, b.dout_strides);
  b.dlse = data.dlse.data();
  b.out = out.data();
  b.lse = lse.data();
  b.dq = dq.data();
  for (int x = 0; x < 2; ++x) {
    dk[x].resize(want.dk[x].size());
    dv[x].resize(want.dv[x].size());
    b.dk[x] = dk[x].data();
    b.dv[x] = dv[x].data();
    if (masks) {
      dmask[x].assign(want.dmask[x].size(), 0.0f);
      b.dmask[x] = dmask[x].data();
    }
  }
  scratch.resize(tensor_attention_backward_scratch(p, masks, 2) + 64);
  tensor_attention_backward(p, b, aligned(scratch), 2);
  compare(level, "dq", dq, want.dq, 1e-4);
  for (int x = 0; x < 2; ++x) {
    compare(level, x ? "dk2" : "dk1", dk[x], want.dk[x], 1e-4);
    compare(level, x ? "dv2" : "dv1", dv[x], want.dv[x], 1e-4);
    if (masks) compare(level, x ? "dmask2" : "dmask1", dmask[x], want.dmask[x], 1e-4);
  }
}

void check_all_levels(Data data) {
  connect(data);
  const Results want = by_loops(data);
  for_all_instruction_sets([&](const char* level) { check(level, data, want); });
}

}  // namespace

int main() {
  // heads, kv heads, n_q, n_1, n_2, d, dv, causal, w1, w2, offset, masks
  check_all_levels(make(1, 1, 5, 6, 7, 3, 2, false, 0, 0, 0, false));
  check_all_levels(make(2, 1, 33, 30, 37, 16, 17, false, 0, 0, 0, true));
  check_all_levels(make(1, 1, 40, 40, 40, 33, 8, true, 0, 0, 0, false));
  check_all_levels(make(2, 2, 70, 70, 70, 8, 8, true, 5, 33, 0, false));
  check_all_levels(make(1, 1, 70, 70, 70, 8, 8, true, 33, 5, 0, true));
  check_all_levels(make(1, 1, 20, 50, 40, 8, 8, false, 6, 9, 7, true));
  check_all_levels(make(1, 1, 30, 20, 20, 8, 8, true, 0, 0, -8, false));
  check_all_levels(make(1, 1, 3, 300, 530, 4, 4, false, 0, 0, 0, false));
  check_all_levels(make(1, 1, 130, 3, 200, 4, 4, false, 0, 0, 0, false));
  return check_result();
}
