// Columns of dimension 1 of a volume while they are reduced: sums over Z/2 of keys of edges.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
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
// Sums of columns. Short ones are sorted arrays, summed by merging; those that grow become heaps in
// which equal keys cancel as they surface.
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
      merge(x, count);
      return;
    }
    if (heap_.empty()) {
      heap_.assign(keys_, keys_ + size_);  // descending, and so a heap
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
      key = keys_[0];
      std::memmove(keys_, keys_ + 1, --size_ * sizeof(uint64_t));
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
    out.insert(out.end(), keys_, keys_ + size_);
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
  static constexpr size_t kShort = 96;

  // Without branches on keys, which cannot be predicted.
  void merge(const uint64_t* x, size_t count) {
    uint64_t sum[kShort];
    size_t i = 0, j = 0, k = 0;
    while (i < size_ && j < count) {
      const uint64_t a = keys_[i], b = x[j];
      sum[k] = std::max(a, b);
      i += a >= b;
      j += b >= a;
      k += a != b;
    }
    for (; i < size_; ++i) sum[k++] = keys_[i];
    for (; j < count; ++j) sum[k++] = x[j];
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
