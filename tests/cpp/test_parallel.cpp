// parallel_for: every item once, ranges that do not depend on the thread count, exceptions, nested
// and concurrent calls, use in a forked child. Compiled with OpenMP, on its threads instead of the
// pool's.
#include "cpu/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__has_feature) && !defined(__SANITIZE_THREAD__)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1  // clang's spelling
#endif
#endif

using pyloss::parallel_for;

namespace {

using Ranges = std::set<std::pair<int64_t, int64_t>>;

Ranges ranges_of(int64_t n, int64_t grain, int threads) {
  Ranges ranges;
  std::mutex mutex;
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    std::lock_guard<std::mutex> lock(mutex);
    CHECK(ranges.emplace(begin, end).second);
  });
  return ranges;
}

void test_ranges() {
  for (int64_t n : {0, 1, 2, 7, 64, 1000}) {
    for (int64_t grain : {1, 3, 64, 5000}) {
      const Ranges serial = ranges_of(n, grain, 1);
      int64_t at = 0;
      for (const auto& [begin, end] : serial) {
        CHECK(begin == at && begin % grain == 0 && end > begin && end - begin <= grain);
        at = end;
      }
      CHECK(at == n);
      for (int threads : {2, 4, 9}) CHECK(ranges_of(n, grain, threads) == serial);
    }
  }
  CHECK(ranges_of(-5, 1, 4).empty());
}

int64_t sum_to(int64_t n, int threads) {
  std::atomic<int64_t> sum{0};
  parallel_for(n, 16, threads, [&](int64_t begin, int64_t end) {
    int64_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += i;
    sum += part;
  });
  return sum;
}

void test_plain_writes() {
  // Unsynchronised writes to separate items, read after the call: ThreadSanitizer sees whether the
  // end of parallel_for orders them.
  std::vector<int> items(5000, 0);
  for (int round = 0; round < 50; ++round) {
    parallel_for(int64_t(items.size()), 7, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++items[i];
    });
  }
  for (int item : items) CHECK(item == 50);
}

void test_exceptions() {
  for (int threads : {1, 4}) {
    std::string text;
    try {
      parallel_for(1000, 1, threads, [](int64_t begin, int64_t) {
        if (begin == 500) throw std::out_of_range("item 500");
      });
    } catch (const std::out_of_range& e) {
      text = e.what();
    }
    CHECK(text == "item 500");
    CHECK(sum_to(1000, threads) == 499500);  // the pool is still of use
  }
}

void test_nested() {
  std::atomic<int64_t> total{0};
  parallel_for(8, 1, 4, [&](int64_t, int64_t) { total += sum_to(100, 4); });
  CHECK(total == 8 * 4950);
}

void test_concurrent_callers() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 8; ++t) {
    callers.emplace_back([] {
      for (int round = 0; round < 100; ++round) CHECK(sum_to(1000, 3) == 499500);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

#if defined(_OPENMP)
void test_openmp() {
  std::atomic<int> outside{0};
  parallel_for(100, 1, 2, [&](int64_t, int64_t) { outside += omp_get_level() == 0; });
  CHECK(outside == 0);
  // In somebody else's region, whose nested regions have one thread.
#pragma omp parallel num_threads(2)
  for (int round = 0; round < 100; ++round) CHECK(sum_to(1000, 3) == 499500);
}
#endif

// A child has none of the parent's threads. Forked while another thread uses the pool, too.
// ThreadSanitizer cannot start threads in a child of a threaded process.
#ifndef __SANITIZE_THREAD__
void test_fork() {
  CHECK(sum_to(1000, 4) == 499500);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) sum_to(1000, 4);
  });
  for (int round = 0; round < 10; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that hangs is killed and counts as a failure
      const bool ok = sum_to(1000, 4) == 499500 && sum_to(1000, 2) == 499500;
      _exit(ok ? 0 : 1);
    }
    CHECK(child > 0);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  busy.join();
  CHECK(sum_to(1000, 4) == 499500);
}
#endif

}  // namespace

int main() {
  test_ranges();
  test_plain_writes();
  test_exceptions();
  test_nested();
  test_concurrent_callers();
#if defined(_OPENMP)
  test_openmp();
#endif
#ifndef __SANITIZE_THREAD__
  test_fork();
#endif
  return check_result();
}
