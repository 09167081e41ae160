#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pyloss {
namespace {

struct Job {
  const std::function<void(int64_t, int64_t)>* fn;
  int64_t n, grain;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n || failed.load(std::memory_order_relaxed)) return;
      try {
        (*fn)(begin, std::min(n, begin + grain));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        failed.store(true, std::memory_order_relaxed);
      }
    }
  }
};

thread_local bool t_inside = false;

// Whether this library was loaded by a process that is a fork of another one and has not called
// exec: whose OpenMP may have lost its threads before anything here could notice.
bool loaded_in_a_fork() {
  constexpr unsigned long kForkedNoExec = 0x40;  // PF_FORKNOEXEC of Linux
  unsigned long flags = 0;
  char text[1024];
  std::FILE* file = std::fopen("/proc/self/stat", "r");
  if (!file) return false;  // no Linux: its OpenMP starts anew after a fork
  text[std::fread(text, 1, sizeof text - 1, file)] = 0;
  std::fclose(file);
  const char* name_end = std::strrchr(text, ')');  // the name may hold spaces
  return name_end && std::sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %lu", &flags) == 1 &&
         (flags & kForkedNoExec);
}

std::atomic<bool> g_forked{loaded_in_a_fork()};

// The entry to a parallel region that compilers call. torch loads its OpenMP for all to see, and
// after each of its operations the threads of that spin for some milliseconds: a pool beside them
// would get no core in that time. They do not survive fork(), hence g_forked and the pool.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
Region openmp_region() {
#if defined(__unix__) || defined(__APPLE__)
  // First: the parent may have forked in the middle of the line that follows.
  if (g_forked.load(std::memory_order_relaxed)) return nullptr;
  static const Region region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
#else
  return nullptr;
#endif
}

void work_in_region(void* job) {
  const bool before = t_inside;
  t_inside = true;
  static_cast<Job*>(job)->work();
  t_inside = before;
}

class Pool {
 public:
  // False: the pool is in use, nothing was done.
  bool run(Job& job, int helpers, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    if (const Region region = openmp_region()) {
      // All threads, or the team would be taken apart and put together again.
      region(work_in_region, &job, unsigned(threads), 0);
      return true;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; size_ < helpers; ++size_) std::thread([this] { loop(); }).detach();
      } catch (const std::system_error&) {
        // No more threads to be had: the work gets done by those there are.
      }
      job_ = &job;
      seats_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // a helper that wakes up from here on finds nothing to do
    done_.wait(lock, [this] { return working_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int seats_ = 0, working_ = 0, size_ = 0;
};

// Never destroyed: its threads may outlive static destruction. Replaced, not repaired, in a forked
// child, where the threads are gone and the mutexes may be locked for ever.
std::atomic<Pool*> g_pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// From the start: a fork before the first job leaves a child without OpenMP's threads as well.
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, [] {
  g_pool.store(nullptr, std::memory_order_release);
  g_forked.store(true, std::memory_order_relaxed);
  t_inside = false;
});
#endif

Pool& pool() {
  Pool* p = g_pool.load(std::memory_order_acquire);
  if (p) return *p;
  Pool* fresh = new Pool;
  if (g_pool.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread was first; this one has started no threads yet
  return *p;
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t ranges = (n + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, ranges)) - 1;
  Job job;
  job.fn = &fn;
  job.n = n;
  job.grain = grain;
  if (helpers <= 0 || t_inside) {
    job.work();
  } else {
    t_inside = true;
    const bool ran = pool().run(job, helpers, threads);
    t_inside = false;
    if (!ran) job.work();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pyloss
