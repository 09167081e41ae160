// Stable:  first[i] = #{j: v_j < v_i} + #{j < i: v_j = v_i}
// Shared:  first[i] = #{j: v_j < v_i},  count[i] = #{j: v_j = v_i}
//
// Threads share the rows. Short rows are counted, n^2 comparisons that vectorise; long ones are
// sorted as pairs of value and place. A row is read once and stays in the cache; 4 bytes an element
// are written, 8 for shared ranks. Descending turns the comparison round: equal values keep their
// order, as in torch's stable sort.
#include "cpu/sorting_network_ranks.h"

#include <algorithm>
#include <functional>

#include "cpu/parallel.h"

namespace pyloss::cpu {
namespace {

constexpr int32_t kCounted = 128;  // longest row that is counted
constexpr int64_t kElementsPerTask = 4096;

template <class T>
struct Placed {
  T value;
  int32_t place;
};

template <class T, class Before>
class Ranker {
 public:
  explicit Ranker(int32_t n) : row_(n > kCounted ? n : 0), n_(n) {}

  // count: null for stable ranks.
  void operator()(const T* v, int32_t* first, int32_t* count) {
    if (n_ <= kCounted) {
      for (int32_t i = 0; i < n_; ++i) count_one(v, i, first, count);
    } else {
      sort(v, first, count);
    }
  }

 private:
  void count_one(const T* v, int32_t i, int32_t* first, int32_t* count) const {
    int32_t before = 0, equal = 0, equal_earlier = 0;
    for (int32_t j = 0; j < n_; ++j) {
      before += before_(v[j], v[i]);
      equal += v[j] == v[i];
    }
    if (count) {
      first[i] = before;
      count[i] = equal;
      return;
    }
    if (equal > 1) equal_earlier = int32_t(std::count(v, v + i, v[i]));
    first[i] = before + equal_earlier;
  }

  void sort(const T* v, int32_t* first, int32_t* count) {
    for (int32_t i = 0; i < n_; ++i) row_[i] = {v[i], i};
    std::sort(row_.begin(), row_.end(), [&](const Placed<T>& a, const Placed<T>& b) {
      return before_(a.value, b.value) || (a.value == b.value && a.place < b.place);
    });
    for (int32_t begin = 0, end; begin < n_; begin = end) {
      end = begin + 1;
      while (count && end < n_ && row_[end].value == row_[begin].value) ++end;
      for (int32_t r = begin; r < end; ++r) {
        first[row_[r].place] = begin;
        if (count) count[row_[r].place] = end - begin;
      }
    }
  }

  std::vector<Placed<T>> row_;
  int32_t n_;
  Before before_;
};

template <class T, class Before>
SortingRanks ranks_of(const void* target, int64_t items, int32_t n, bool shared, int threads) {
  const T* values = static_cast<const T*>(target);
  SortingRanks found;
  found.first.resize(items * n);
  if (shared) found.count.resize(items * n);
  std::vector<uint8_t> nan(items);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / n);
  parallel_for(items, grain, threads, [&](int64_t begin, int64_t end) {
    Ranker<T, Before> rank(n);
    for (int64_t item = begin; item < end; ++item) {
      const T* v = values + item * n;
      nan[item] = std::any_of(v, v + n, [](T x) { return x != x; });
      if (nan[item]) continue;  // no order that std::sort could rely on
      rank(v, found.first.data() + item * n, shared ? found.count.data() + item * n : nullptr);
    }
  });
  for (int64_t item = 0; item < items; ++item) {
    if (nan[item]) found.nan_rows.push_back(item);
  }
  return found;
}

template <class T>
SortingRanks ranks_of(const void* target, int64_t items, int32_t n, TargetOrder order,
                      int threads) {
  const bool shared = order == TargetOrder::kShared || order == TargetOrder::kSharedDescending;
  if (order == TargetOrder::kDescending || order == TargetOrder::kSharedDescending) {
    return ranks_of<T, std::greater<T>>(target, items, n, shared, threads);
  }
  return ranks_of<T, std::less<T>>(target, items, n, shared, threads);
}

}  // namespace

SortingRanks target_ranks(const void* values, DType dtype, int64_t items, int32_t n,
                          TargetOrder order, int threads) {
  switch (dtype) {
    case DType::kF64:
      return ranks_of<double>(values, items, n, order, threads);
    case DType::kF32:
      return ranks_of<float>(values, items, n, order, threads);
    case DType::kI64:
      return ranks_of<int64_t>(values, items, n, order, threads);
    default:
      return ranks_of<int32_t>(values, items, n, order, threads);
  }
}

}  // namespace pyloss::cpu
