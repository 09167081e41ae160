// A problem runs several times: in another order of blocks and threads, and with something else in
// outputs, scratch and shared memory. All runs must leave the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "shim.h"

namespace shim {

using pyloss::BF16;
using pyloss::F16;

inline constexpr int kRuns = 4;

inline unsigned char poison_of(int run) {
  constexpr unsigned char kinds[kRuns] = {0xff, 0x3b, 0x00,
                                          0xc4};  // NaN and -1; a small number; ...
  return kinds[run];
}

inline void start_run(int run) {
  settings.order = run == 0 ? Order::kForward : run == 1 ? Order::kReverse : Order::kRandom;
  settings.seed = unsigned(run);
  settings.poison = poison_of(run);
}

// Fills what a run is to write, or may have found.
template <class T>
void poison(std::vector<T>& v) {
  if (!v.empty()) std::memset(v.data(), settings.poison, v.size() * sizeof(T));
}

// Whether `later`, of that run, holds what `first` holds, of run 0: the same bytes, or those with
// which both were filled, where nobody writes.
inline bool same_bytes(const void* first, const void* later, size_t count, int run) {
  const auto* a = static_cast<const unsigned char*>(first);
  const auto* b = static_cast<const unsigned char*>(later);
  for (size_t i = 0; i < count; ++i) {
    if (a[i] != b[i] && !(a[i] == poison_of(0) && b[i] == poison_of(run))) return false;
  }
  return true;
}

// check(T{}, number of the problem) for so many problems, of one dtype after the other.
template <class Check>
void dtypes_in_turn(int64_t problems, const Check& check) {
  for (int64_t i = 0; i < problems; ++i) {
    switch (i % 4) {
      case 0:
        check(float{}, i);
        break;
      case 1:
        check(double{}, i);
        break;
      case 2:
        check(BF16{}, i);
        break;
      default:
        check(F16{}, i);
    }
  }
}

}  // namespace shim
