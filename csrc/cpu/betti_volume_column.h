// Columns of dimension 1 of a volume while they are reduced: sums over Z/2 of keys of edges.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <vector>

namespace pyloss {
namespace cpu {
namespace betti_volume {

// A pivot's column: a square, or with this flag the number of a column that was kept.
inline constexpr uint32_t kKept = 0x80000000u;

// Keys of edges: (rank, edge), which orders them.
inline uint64_t key_of(uint32_t rank, uint32_t e) {
  return uint64_t(rank) << 32 | e;
}

// Puts a key into its place among k descending ones.
inline void insert_key(uint64_t key, uint64_t* keys, int& k) {
  int at = k++;
  for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
  keys[at] = key;
}

// Sums of columns. Short ones are sorted arrays, the largest key last; those that grow become heaps
// in which equal keys cancel as they surface.
class Column {
 public:
  void clear() {
    size_ = 0;
    heap_.clear();
  }
  bool empty() const { return size_ == 0 && heap_.empty(); }

  // Adds keys in descending order.
  void add(const uint64_t* x, size_t count) {
    if (heap_.empty() && size_ + count <= kShort) {
      if (count > 3) return merge(x, count);
      for (size_t i = 0; i < count; ++i) insert(x[i]);
      return;
    }
    if (heap_.empty()) {
      heap_.assign(keys_, keys_ + size_);
      std::reverse(heap_.begin(), heap_.end());  // descending, and so a heap
      size_ = 0;
    }
    for (size_t i = 0; i < count; ++i) {
      heap_.push_back(x[i]);
      std::push_heap(heap_.begin(), heap_.end());
    }
  }
  // Takes the largest key out; false if there is none.
  bool pop(uint64_t& key) {
    if (size_) {
      key = keys_[--size_];
      return true;
    }
    while (!heap_.empty()) {
      key = take();
      if (heap_.empty() || heap_.front() != key) return true;
      take();
    }
    return false;
  }
  // Appends what is left, descending.
  void append_to(std::vector<uint64_t>& out) {
    out.insert(out.end(), std::make_reverse_iterator(keys_ + size_),
               std::make_reverse_iterator(keys_));
    std::sort(heap_.begin(), heap_.end(), std::greater<uint64_t>());
    for (size_t i = 0; i < heap_.size(); ++i) {
      if (i + 1 < heap_.size() && heap_[i] == heap_[i + 1]) {
        ++i;
      } else {
        out.push_back(heap_[i]);
      }
    }
  }

 private:
  static constexpr size_t kShort = 128;

  // Most are among the largest.
  void insert(uint64_t key) {
    size_t at = size_;
    while (at > 0 && keys_[at - 1] > key) --at;
    if (at > 0 && keys_[at - 1] == key) {
      std::memmove(keys_ + at - 1, keys_ + at, (size_ - at) * sizeof(uint64_t));
      --size_;
    } else {
      std::memmove(keys_ + at + 1, keys_ + at, (size_ - at) * sizeof(uint64_t));
      keys_[at] = key;
      ++size_;
    }
  }
  // Without branches on keys, which cannot be predicted.
  void merge(const uint64_t* x, size_t count) {
    uint64_t sum[kShort];
    size_t i = 0, j = count, k = 0;
    while (i < size_ && j > 0) {
      const uint64_t a = keys_[i], b = x[j - 1];
      sum[k] = std::min(a, b);
      i += a <= b;
      j -= b <= a;
      k += a != b;
    }
    for (; i < size_; ++i) sum[k++] = keys_[i];
    for (; j > 0; --j) sum[k++] = x[j - 1];
    std::copy(sum, sum + k, keys_);
    size_ = k;
  }
  uint64_t take() {
    const uint64_t x = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end());
    heap_.pop_back();
    return x;
  }

  uint64_t keys_[kShort];
  size_t size_ = 0;
  std::vector<uint64_t> heap_;
};

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
