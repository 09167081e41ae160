// parallel_for on the threads of the process's OpenMP, or on a pool of std::threads that lives as
// long as the process.
//
// OpenMP's where torch has loaded it, because its threads spin after each operation of torch and
// leave no core to others. An own pool elsewhere and in forked children, because OpenMP's does not
// survive fork(): a child that inherits a used OpenMP pool hangs in its first parallel region, and
// DataLoader workers are such children.
#pragma once

#include <cstdint>
#include <functional>

namespace pyloss {

// Calls fn(begin, end) on consecutive ranges of at most `grain` items that together cover [0, n),
// on up to `threads` threads, the caller among them. Ranges start at multiples of `grain` whatever
// the thread count. The first exception that fn throws is rethrown here once all ranges are done
// or given up. Nested calls and calls while another thread uses the pool run on the caller alone.
void parallel_for(int64_t n, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& fn);

}  // namespace pyloss
