// Tasks of uneven length on the pool, each with the scratch buffer of its slot.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/parallel.h"

namespace pyloss::cpu {

inline int64_t slots_for(int64_t tasks, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>(tasks, threads));
}

// fn(slot, task) for every task, at most one at a time per slot.
template <class Fn>
void run_tasks(int64_t tasks, int64_t slots, Fn&& fn) {
  std::atomic<int64_t> next{0};
  parallel_for(slots, 1, static_cast<int>(slots), [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        fn(slot, task);
      }
    }
  });
}

}  // namespace pyloss::cpu
