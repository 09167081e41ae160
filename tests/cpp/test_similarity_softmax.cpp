// Statistics and gradients over all pairs of rows in every instruction set that this CPU has, in
// float and double, against loops over the pairs; and the rounds in which pairs of blocks are run.
#include "cpu/similarity_softmax.h"

#include <cmath>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/similarity_softmax_rounds.h"
#include "instruction_sets.h"

using namespace pyloss;
using namespace pyloss::cpu;

namespace {

template <class R>
struct Data {
  std::vector<R> q, k;
  std::vector<int64_t> target, query_ids, key_ids;
  SimilarityProblem p{};
};

// Queries beyond one block of 64, keys beyond two; widths that are no whole vectors.
template <class R>
Data<R> make(bool itself, int flags, double scale) {
  std::mt19937 g(1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  Data<R> x;
  const int64_t n = itself ? 141 : 70, m = 141, d = 19;
  x.q.resize(n * d);
  x.k.resize(m * d);
  for (R& f : x.q) f = R(uniform(g));
  for (R& f : x.k) f = R(uniform(g));
  for (int64_t i = 0; i < n; ++i) x.target.push_back(i % 5 ? int64_t(g() % m) : -1);
  for (int64_t j = 0; j < m; ++j) x.key_ids.push_back(g() % 7);
  for (int64_t i = 0; i < n; ++i) x.query_ids.push_back(itself ? x.key_ids[i] : g() % 7);
  x.p.n = n;
  x.p.m = m;
  x.p.d = d;
  x.p.dtype = sizeof(R) == 8 ? DType::kF64 : DType::kF32;
  x.p.itself = itself;
  x.p.scale = scale;
  x.p.kinds.first = 2;
  x.p.kinds.flags = flags;
  return x;
}

// The pointers, once `x` has its final place.
template <class R>
void point(Data<R>& x) {
  x.p.queries = x.q.data();
  x.p.keys = x.p.itself ? x.q.data() : x.k.data();
  x.p.kinds.target = x.target.data();
  if (x.p.kinds.flags & 3) {
    x.p.kinds.query_ids = x.query_ids.data();
    x.p.kinds.key_ids = x.key_ids.data();
  }
}

template <class R, class S>
void near(const std::vector<R>& found, const std::vector<S>& wanted, double tolerance) {
  double worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double error = std::fabs(double(found[i]) - double(wanted[i]));
    const bool same = double(found[i]) == double(wanted[i]);  // infinities
    worst = std::max(worst, same ? 0 : error / (1 + std::fabs(double(wanted[i]))));
    if (std::isnan(double(found[i]))) worst = INFINITY;
  }
  CHECK(worst <= tolerance);
}

template <class R>
void check(bool itself, int flags, double scale) {
  Data<R> x = make<R>(itself, flags, scale);
  point(x);
  const SimilarityProblem& p = x.p;
  const int64_t n = p.n, m = p.m, d = p.d;
  const R* keys = static_cast<const R*>(p.keys);
  const bool columns = !itself;
  std::vector<double> z(n * m), lse(n, -INFINITY), positive(n, 0), column_lse(m, -INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double& s = z[i * m + j];
      for (int64_t l = 0; l < d; ++l) s += scale * double(x.q[i * d + l]) * double(keys[j * d + l]);
      const auto add = [&](double& to) {
        const double most = std::max(to, s);
        to = most + std::log(std::exp(to - most) + std::exp(s - most));
      };
      if (p.kinds.counted(i, j)) {
        add(lse[i]);
        add(column_lse[j]);
      }
      if (p.kinds.positive(i, j)) positive[i] += s;
    }
  }
  const double tolerance = (sizeof(R) == 8 ? 1e-11 : 2e-4) * std::fabs(scale);
  std::vector<R> stats(4 * n), of_columns(4 * m);
  SimilarityForward f{};
  f.rows = {&stats[0], &stats[n], &stats[2 * n], &stats[3 * n]};
  if (columns) f.columns = {&of_columns[0], &of_columns[m], &of_columns[2 * m], &of_columns[3 * m]};
  std::vector<char> scratch(similarity_softmax_forward_scratch(p, columns, 2) + 64);
  const auto aligned = [&] { return scratch.data() + (64 - uintptr_t(scratch.data()) % 64) % 64; };
  similarity_softmax_forward(p, f, aligned(), 2);
  const auto part = [](const std::vector<R>& v, int64_t first, int64_t count) {
    return std::vector<R>(v.begin() + first, v.begin() + first + count);
  };
  near(part(stats, 0, n), lse, tolerance);
  near(part(stats, n, n), positive, tolerance);
  if (columns) near(part(of_columns, 0, m), column_lse, tolerance);

  std::vector<R> g(n), h(n), column_g(m), dq(n * d), dk(m * d), dscale(1);
  for (int64_t i = 0; i < n; ++i) g[i] = R(0.01 * double(i)), h[i] = R(1 - 0.02 * double(i));
  for (int64_t j = 0; j < m; ++j) column_g[j] = R(0.5 - 0.01 * double(j));
  std::vector<double> wanted_q(n * d), wanted_k(m * d), wanted_scale(1);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const double s = z[i * m + j];
      double grad = p.kinds.positive(i, j) ? double(h[i]) : 0;
      if (p.kinds.counted(i, j)) {
        grad += std::exp(s - lse[i]) * double(g[i]);
        if (columns) grad += std::exp(s - column_lse[j]) * double(column_g[j]);
      }
      wanted_scale[0] += grad * s / scale;
      for (int64_t l = 0; l < d; ++l) {
        wanted_q[i * d + l] += scale * grad * double(keys[j * d + l]);
        (itself ? wanted_q : wanted_k)[j * d + l] += scale * grad * double(x.q[i * d + l]);
      }
    }
  }
  SimilarityBackward b{};
  b.rows = {&stats[0], g.data(), h.data()};
  if (columns) b.columns = {&of_columns[0], column_g.data(), nullptr};
  b.to = {dq.data(), itself ? nullptr : dk.data(), dscale.data(), nullptr};
  scratch.resize(similarity_softmax_backward_scratch(p, wants_of(b.to), 2) + 64);
  similarity_softmax_backward(p, b, aligned(), 2);
  near(dq, wanted_q, 10 * tolerance);
  if (!itself) near(dk, wanted_k, 10 * tolerance);
  near(dscale, wanted_scale, 10 * tolerance);
}

void check_rounds() {
  for (int64_t rows = 0; rows < 9; ++rows) {
    for (int64_t columns = 0; columns < 9; ++columns) {
      for (const bool itself : {false, true}) {
        if (itself && rows != columns) continue;
        const Rounds rounds{rows, columns, itself};
        std::set<std::pair<int64_t, int64_t>> all;
        for (int64_t round = 0; round < rounds.count(); ++round) {
          std::set<int64_t> of_rows, of_columns;
          for (int64_t at = 0; at < rounds.pairs(round); ++at) {
            int64_t i, j;
            if (!rounds.pair(round, at, &i, &j)) continue;
            CHECK(all.insert({i, j}).second);
            CHECK(of_rows.insert(i).second);
            CHECK((itself && i == j ? of_columns : itself ? of_rows : of_columns).insert(j).second);
          }
        }
        CHECK(int64_t(all.size()) == (itself ? rows * (rows + 1) / 2 : rows * columns));
      }
    }
  }
}

}  // namespace

int main() {
  check_rounds();
  for_all_instruction_sets([](const char*) {
    for (const bool itself : {false, true}) {
      for (const int flags : {0, 1, 2, 4, 5}) {
        for (const double scale : {1.0, -300.0}) {  // without and with shifts
          check<float>(itself, flags, scale);
          check<double>(itself, flags, scale);
        }
      }
    }
  });
  return check_result();
}
