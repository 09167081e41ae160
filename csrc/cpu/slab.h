// Scratch arrays out of one large buffer, for kernels that need several arrays of the size of an
// image for a short time each. One buffer, because malloc returns large ones to the system as soon
// as they are freed, and mapping new pages takes as long as half the work; and because it can have
// huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "common/compiler.h"
#include "cpu/memory.h"

namespace pyloss {

// First fit; what does not fit comes from malloc. Safe to use from several threads.
class Slab {
 public:
  explicit Slab(size_t bytes) : bytes_(round_up(bytes)) {
    data_ = static_cast<char*>(allocate_aligned(kHuge, (bytes_ + kHuge - 1) / kHuge * kHuge));
    if (!data_) throw std::bad_alloc();
    advise_huge_pages(data_, int64_t(bytes_));
    free_[0] = bytes_;
  }
  ~Slab() { free_aligned(data_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  void* take(size_t bytes) {
    bytes = round_up(bytes);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->second < bytes) continue;
        const auto [offset, size] = *it;
        free_.erase(it);
        if (size > bytes) free_[offset + bytes] = size - bytes;
        return data_ + offset;
      }
    }
    void* p = std::malloc(bytes);
    if (!p) throw std::bad_alloc();
    return p;
  }
  void give(void* p, size_t bytes) {
    const char* c = static_cast<const char*>(p);
    if (c < data_ || c >= data_ + bytes_) return std::free(p);
    bytes = round_up(bytes);
    size_t offset = size_t(c - data_);
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + bytes) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += bytes;
        return;
      }
    }
    free_[offset] = bytes;
  }

 private:
  static constexpr size_t kHuge = size_t(2) << 20;
  // Cache lines, and never empty.
  static size_t round_up(size_t bytes) { return (bytes + 64) / 64 * 64; }

  size_t bytes_;
  char* data_;
  std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset -> size
};

// Uninitialised array out of a slab, which must outlive it.
template <class T>
class SlabArray {
 public:
  SlabArray() = default;
  SlabArray(Slab& slab, size_t n)
      : slab_(&slab), data_(static_cast<T*>(slab.take(n * sizeof(T)))), n_(n) {}
  SlabArray(SlabArray&& o) noexcept { swap(o); }
  SlabArray& operator=(SlabArray&& o) noexcept {
    SlabArray moved(std::move(o));
    swap(moved);
    return *this;
  }
  ~SlabArray() {
    if (data_) slab_->give(data_, n_ * sizeof(T));
  }

  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  void swap(SlabArray& o) {
    std::swap(slab_, o.slab_);
    std::swap(data_, o.data_);
    std::swap(n_, o.n_);
  }
  Slab* slab_ = nullptr;
  T* data_ = nullptr;
  size_t n_ = 0;
};

}  // namespace pyloss
