// The product core in every instruction set that this CPU has, against plain loops. The matrices
// hold small integers, with which every order of summation gives the same, exact numbers.
#include "cpu/gemm.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "instruction_sets.h"

using namespace pyloss::cpu::gemm;

namespace {

std::mt19937 generator(1);

template <class R>
std::vector<R> integers(int64_t n) {
  std::uniform_int_distribution<int> draw(-4, 4);
  std::vector<R> x(n);
  for (R& f : x) f = R(draw(generator));
  return x;
}

enum class Order { kRows, kColumns, kNeither };  // where the stride is 1

template <class R>
struct Matrix {
  std::vector<R> data;
  MatrixView<R> view;

  Matrix(int64_t rows, int64_t columns, Order order) {
    const int64_t gap = 3;
    int64_t row = columns + gap, column = 1;
    if (order == Order::kColumns) row = 1, column = rows + gap;
    if (order == Order::kNeither) row = 2 * columns + gap, column = 2;
    data = integers<R>(rows * row + columns * column + 1);
    view = {data.data(), rows, columns, row, column};
  }
};

template <class R>
R entry(const MatrixView<R>& a, const MatrixView<R>& b, int64_t i, int64_t j) {
  R sum = 0;
  for (int64_t l = 0; l < a.columns; ++l) sum += *a.at(i, l) * *b.at(l, j);
  return sum;
}

template <class R>
void check_whole(int64_t m, int64_t n, int64_t k, Order of_a, Order of_b, bool add, bool with_bias,
                 int threads) {
  const Matrix<R> a(m, k, of_a), b(k, n, of_b);
  const std::vector<R> bias = integers<R>(n);
  const int64_t ldc = n + 5;
  std::vector<R> c = integers<R>(m * ldc + 1);
  const std::vector<R> before = c;
  multiply(a.view, b.view, c.data(), ldc, add, threads, with_bias ? bias.data() : nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < ldc; ++j) {
      R want = before[i * ldc + j];
      if (j < n) want = entry(a.view, b.view, i, j) + (add ? want : 0) + (with_bias ? bias[j] : 0);
      wrong += c[i * ldc + j] != want;
    }
  }
  if (wrong) std::printf("%dx%dx%d: %d wrong\n", int(m), int(n), int(k), int(wrong));
  CHECK(wrong == 0);
}

template <class R>
void check_sizes() {
  for (const int64_t m : {1, 5, 14, 15, 29, 43}) {
    for (const int64_t n : {1, 8, 16, 17, 33, 50}) {
      for (const int64_t k : {0, 1, 7, 16, 35}) {
        check_whole<R>(m, n, k, Order::kRows, Order::kColumns, false, false, 1);
      }
      check_whole<R>(m, n, 19, Order::kColumns, Order::kRows, true, true, 1);
      check_whole<R>(m, n, 19, Order::kRows, Order::kRows, false, true, 2);
      check_whole<R>(m, n, 19, Order::kNeither, Order::kNeither, true, false, 3);
    }
  }
  check_whole<R>(0, 3, 4, Order::kRows, Order::kRows, false, false, 1);
  check_whole<R>(3, 0, 4, Order::kRows, Order::kRows, false, false, 1);
  for (const bool add : {false, true}) {  // too large for parts of K, of which there is nothing
    check_whole<R>(370, 360, 0, Order::kRows, Order::kColumns, add, true, 2);
  }
  check_whole<R>(30, 70, 2 * kDepth + 3, Order::kRows, Order::kColumns, false, true, 2);
  check_whole<R>(30, 70, 2 * kDepth + 3, Order::kColumns, Order::kRows, true, false, 2);
  check_whole<R>(17, 9, 11 * kDepth + 5, Order::kRows, Order::kRows, true, true, 3);
  check_whole<R>(1, 1, 9 * kDepth, Order::kRows, Order::kColumns, false, true, 1);
  check_whole<R>(left_rows<R>(kDepth) + 9, 40, kDepth, Order::kRows, Order::kColumns, false, false,
                 5);
}

// Numbers whose sums depend on their order, and a product large enough to be cut.
template <class R>
void check_bits(int64_t m, int64_t n, int64_t k) {
  std::normal_distribution<double> normal;
  std::vector<R> a(m * k), b(k * n), once(m * n), again(m * n);
  for (R& x : a) x = R(normal(generator));
  for (R& x : b) x = R(normal(generator));
  const auto x = row_major(a.data(), m, k, k), y = row_major(b.data(), k, n, n);
  multiply(x, y, once.data(), n, false, 1);
  for (const int threads : {2, 3, 8}) {
    multiply(x, y, again.data(), n, false, threads);
    CHECK(std::memcmp(once.data(), again.data(), sizeof(R) * m * n) == 0);
  }
  if (k > 4 * kDepth) return;
  // A row's bits do not depend on its neighbours, on which the height of its tile does.
  multiply(x.block(7, 0, 1, k), y, again.data(), n, false, 1);
  CHECK(std::memcmp(once.data() + 7 * n, again.data(), sizeof(R) * n) == 0);
}

// S = Q K^T by tiles; G = 2 S + 1 over it; dQ = G K, dK = G^T Q.
template <class R>
void check_stream(int64_t n, int64_t m, int64_t d, int64_t width) {
  const Matrix<R> q(n, d, Order::kRows), k(m, d, Order::kRows);
  Buffer<R> keys(right_size<R>(d, m)), values(right_size<R>(m, d)), own(right_size<R>(n, d));
  Buffer<R> packed(left_size<R>(n, d)), scratch(n * tile_stride<R>(width));
  const Right<R> scores = pack_right(k.view.transposed(), keys.get());
  const Right<R> rows = pack_right(k.view, values.get());
  const Right<R> queries = pack_right(q.view, own.get());
  const Left<R> left = pack_left(q.view, packed.get());
  std::vector<R> s(n * m, R(0.5)), dq(n * d), dk(m * d);
  stream(left, 100, scores, width, scratch.get(), [&](const Tile<R>& t) {
    CHECK(t.row == 100 && t.rows == n && t.columns == std::min(width, m - t.column));
    for (int64_t r = 0; r < t.rows; ++r) {
      for (int64_t c = 0; c < t.columns; ++c) {
        R& x = t.data[r * t.stride + c];
        s[r * m + t.column + c] = x;
        x = 2 * x + 1;
      }
    }
    add_product(t, rows, dq.data(), d);
    add_transposed_product(t, queries, dk.data() + t.column * d, d);
  });
  int64_t wrong = 0;
  std::vector<R> want_q(n * d), want_k(m * d);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const R x = entry(q.view, k.view.transposed(), i, j);
      wrong += s[i * m + j] != x;
      for (int64_t l = 0; l < d; ++l) {
        want_q[i * d + l] += (2 * x + 1) * *k.view.at(j, l);
        want_k[j * d + l] += (2 * x + 1) * *q.view.at(i, l);
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(dq == want_q);
  CHECK(dk == want_k);
}

template <class R>
void check_all() {
  check_sizes<R>();
  check_bits<R>(150, 310, kDepth + 40);
  check_bits<R>(20, 40, 6 * kDepth);
  const int64_t width = panel_columns<R>();
  check_stream<R>(1, 1, 1, width);
  check_stream<R>(20, 3 * width + 5, 9, 2 * width);
  check_stream<R>(33, 2 * width, kDepth + 5, width);
}

}  // namespace

int main() {
  for_all_instruction_sets([](const char* name) {
    const int before = g_check_failures;
    check_all<float>();
    check_all<double>();
    if (g_check_failures != before) std::printf("in %s\n", name);
  });
  CHECK(std::abs(multiply_adds<float>(100000) - 0.5) < 1e-6);
  CHECK(std::abs(multiply_adds<double>(100000) - 0.5) < 1e-12);
  return check_result();
}
