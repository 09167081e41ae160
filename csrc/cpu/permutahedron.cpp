// Soft rank and soft sort on the CPU: formulas in common/permutahedron.h.
//
// Decomposition: a range of rows per task, each row alone, so threads cannot change a result. A row
// is sorted by a stable radix sort of (key, element), pooled in one pass, and written once.
// Memory: x and packed are 4 + 4 bytes read or written per float, y 4; the row's scratch of 2 * 8
// (sort) + 20 (blocks) bytes per element stays in cache. Sums and block values are double.
#include "cpu/permutahedron.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cpu/parallel.h"

namespace pyloss {
namespace cpu {
namespace {

using permutahedron::Problem;

// Below this many elements a call is over sooner than a second thread has woken up.
constexpr int64_t kSerialElements = 4096;
constexpr int64_t kRangeElements = 2048;

template <class R>
using KeyOf = std::conditional_t<sizeof(R) == 4, uint32_t, uint64_t>;

// Unsigned order of the keys = order of the numbers (no NaN); -0 counts as 0.
template <class R>
inline KeyOf<R> key_of(R x) {
  using Key = KeyOf<R>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  x += R(0);
  Key k;
  std::memcpy(&k, &x, sizeof k);
  return k & kSign ? ~k : k | kSign;
}
template <class R>
inline R number_of(KeyOf<R> k) {
  using Key = KeyOf<R>;
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  k = k & kSign ? k & ~kSign : ~k;
  R x;
  std::memcpy(&x, &k, sizeof x);
  return x;
}

template <class Key>
struct Entry {
  Key key;
  int32_t element;
};

constexpr int64_t kInsertionElements = 24;

template <class Key>
void insertion_sort(Entry<Key>* a, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const Entry<Key> e = a[i];
    int64_t j = i;
    for (; j > 0 && a[j - 1].key > e.key; --j) a[j] = a[j - 1];
    a[j] = e;
  }
}

// Least significant byte first; returns where the result is, a or b.
template <class Key>
Entry<Key>* radix_sort(Entry<Key>* a, Entry<Key>* b, int64_t n) {
  constexpr int kPasses = sizeof(Key), kDigits = 256;
  uint32_t counts[kPasses][kDigits];
  std::memset(counts, 0, sizeof counts);
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][a[i].key >> (8 * pass) & 0xff];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* count = counts[pass];
    const int shift = 8 * pass;
    if (count[a[0].key >> shift & 0xff] == n) continue;  // all equal in this byte
    uint32_t sum = 0;
    for (int d = 0; d < kDigits; ++d) {
      const uint32_t own = count[d];
      count[d] = sum;
      sum += own;
    }
    for (int64_t i = 0; i < n; ++i) b[count[a[i].key >> shift & 0xff]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

// A thread's memory for one row.
template <class R>
struct Scratch {
  using E = Entry<KeyOf<R>>;
  explicit Scratch(int64_t n)
      : entries(new E[size_t(2 * n)]),
        numbers(new double[size_t(2 * n)]),
        starts(new int32_t[size_t(n)]) {}
  std::unique_ptr<E[]> entries;
  std::unique_ptr<double[]> numbers;
  std::unique_ptr<int32_t[]> starts;
};

template <class R>
void forward(const Problem& p, const R* x, R* y, int32_t* packed, Scratch<R>& scratch) {
  auto* sorted = scratch.entries.get();
  // Largest first for ranks: complemented keys keep the sort stable.
  const KeyOf<R> flip = p.rank ? ~KeyOf<R>(0) : 0;
  bool has_nan = false;
  for (int64_t i = 0; i < p.n; ++i) {
    has_nan |= x[i] != x[i];
    sorted[i] = {key_of(x[i]) ^ flip, int32_t(i)};
  }
  if (p.n <= kInsertionElements) {
    insertion_sort(sorted, p.n);
  } else {
    sorted = radix_sort(sorted, sorted + p.n, p.n);
  }
  const permutahedron::Stack stack{scratch.numbers.get(), scratch.numbers.get() + p.n,
                                   scratch.starts.get(), 1};
  const auto x_at = [&](int64_t i) { return double(number_of<R>(sorted[i].key ^ flip)); };
  const auto element = [&](int64_t i) { return sorted[i].element; };
  const auto put = [&](int64_t i, double v) { y[i] = R(v); };
  const auto mark = [&](int64_t i, int32_t v) { packed[i] = v; };
  if (permutahedron::is_centred_kl(p)) {
    permutahedron::forward_row<true>(p, has_nan, stack, x_at, element, put, mark);
  } else {
    permutahedron::forward_row<false>(p, has_nan, stack, x_at, element, put, mark);
  }
}

// Elements are places in g and x: a list that no forward has made must not be followed.
void check(const Problem& p, const int32_t* packed) {
  if (permutahedron::is_nan_row(packed[0])) return;
  bool good = true;
  for (int64_t i = 0; i < p.n; ++i) good &= (packed[i] & permutahedron::kElement) < p.n;
  if (!good) throw std::invalid_argument("packed: an element out of range");
}

template <class R>
void backward(const Problem& p, const R* g, const R* x, const int32_t* packed, R* dx) {
  check(p, packed);
  permutahedron::backward_row(
      p, [&](int64_t i) { return packed[i]; }, [&](int64_t i) { return double(g[i]); },
      [&](int64_t i) { return double(x[i]); }, [&](int64_t i, double v) { dx[i] = R(v); });
}

// fn(R{}, begin, end) over ranges of rows.
template <class Fn>
void for_rows(const Problem& p, int threads, const Fn& fn) {
  if (p.rows == 0 || p.n == 0) return;
  const int64_t grain = std::max<int64_t>(1, kRangeElements / p.n);
  const int width = p.rows * p.n < kSerialElements ? 1 : threads;
  parallel_for(p.rows, grain, width, [&](int64_t begin, int64_t end) {
    if (p.dtype == DType::kF64) {
      fn(double{}, begin, end);
    } else {
      fn(float{}, begin, end);
    }
  });
}

}  // namespace

void permutahedron_forward(const Problem& p, const void* x, void* y, int32_t* packed, int threads) {
  for_rows(p, threads, [&](auto zero, int64_t begin, int64_t end) {
    using R = decltype(zero);
    Scratch<R> scratch(p.n);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * p.n;
      forward(p, static_cast<const R*>(x) + at, static_cast<R*>(y) + at, packed + at, scratch);
    }
  });
}

void permutahedron_backward(const Problem& p, const void* g, const void* x, const int32_t* packed,
                            void* dx, int threads) {
  for_rows(p, threads, [&](auto zero, int64_t begin, int64_t end) {
    using R = decltype(zero);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * p.n;
      backward(p, static_cast<const R*>(g) + at, x ? static_cast<const R*>(x) + at : nullptr,
               packed + at, static_cast<R*>(dx) + at);
    }
  });
}

}  // namespace cpu
}  // namespace pyloss
