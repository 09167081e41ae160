// The k largest products in every instruction set that this CPU has, against sorted plain ones.
// Small integers: every order of summation is exact, and many products are equal.
#include "cpu/similarity_topk.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "instruction_sets.h"

namespace {

std::mt19937 generator(1);

template <class R>
std::vector<R> integers(int64_t n) {
  std::uniform_int_distribution<int> draw(-9, 9);
  std::vector<R> x(n);
  for (R& f : x) f = R(draw(generator));
  return x;
}

template <class R>
void check(int64_t rows, int64_t columns, int64_t depth, int64_t k, int64_t first, bool same,
           int threads) {
  const std::vector<R> queries = integers<R>(rows * depth);
  const std::vector<R> keys = same ? queries : integers<R>(columns * depth);
  std::vector<R> values(rows * k);
  std::vector<int64_t> indices(rows * k);
  const auto dtype = sizeof(R) == 8 ? pyloss::DType::kF64 : pyloss::DType::kF32;
  pyloss::cpu::similarity_topk(
      {dtype, rows, columns, depth, queries.data(), same ? queries.data() : keys.data(), depth,
       depth, k, first, values.data(), indices.data()},
      threads);
  bool right = true;
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<R> row(columns, R(0));
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t l = 0; l < depth; ++l) row[j] += queries[i * depth + l] * keys[j * depth + l];
      if (first >= 0 && j == first + i) row[j] = -std::numeric_limits<R>::infinity();
    }
    std::vector<int64_t> order(columns);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return row[a] > row[b]; });
    for (int64_t l = 0; l < k; ++l) {
      right &= indices[i * k + l] == order[l] && values[i * k + l] == row[order[l]];
    }
  }
  if (!right) {
    std::fprintf(stderr, "%d bytes, %d x %d x %d, k %d, first %d, %s, %d threads\n", int(sizeof(R)),
                 int(rows), int(columns), int(depth), int(k), int(first), same ? "one" : "two",
                 threads);
  }
  CHECK(right);
}

template <class R>
void check_sizes() {
  for (const int threads : {1, 3}) {
    check<R>(1, 1, 1, 1, -1, false, threads);
    check<R>(7, 300, 5, 10, 100, false, threads);
    for (const int64_t k : {1, 8, 16, 17, 40}) {
      check<R>(131, 262, 3, k, -1, false, threads);
      check<R>(301, 301, 20, k, 0, true, threads);
    }
    check<R>(290, 290, 300, 16, -1, true, threads);
  }
}

}  // namespace

int main() {
  for_all_instruction_sets([](const char* name) {
    std::printf("%s\n", name);
    check_sizes<float>();
    check_sizes<double>();
  });
  return check_result();
}
