// Scratch memory of a kernel: its layout, written once, counts the bytes and hands them out.
#pragma once

#include <cstdint>

namespace pyloss::cpu {

// Hands out parts of one buffer; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class R>
  R* take(int64_t count) {
    R* p = base_ ? reinterpret_cast<R*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(R)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace pyloss::cpu
