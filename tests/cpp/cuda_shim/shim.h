// What the stand-in for the CUDA runtime, the scheduler of its threads and the tests have in
// common. Nothing here has code that a program built with -fsanitize=thread could compile once
// more.
#pragma once

#include <cstddef>
#include <cstdint>

struct shim_index {
  unsigned x, y, z;
};
extern shim_index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class Order { kForward, kReverse, kRandom };

// What a test sets.
struct Settings {
  Order order = Order::kForward;  // of the blocks of a launch and of the threads of a block
  unsigned seed = 0;
  int devices = 1;
  int multiprocessors = 4;
  int shared_bytes = 228 * 1024;  // of a multiprocessor
  int capability = 9;
  int driver = 13000;  // the newest CUDA that the driver knows
  // What shared memory holds when a block starts. The tests fill outputs and scratch with it too, a
  // different one for each run of a problem, so that what nobody wrote shows in the results.
  unsigned char poison = 0xff;
  // The call of the runtime that fails, counted down to 0 by those that can; negative: none.
  int fails_after = -1;
  // Called when a launch has been asked for, before it is looked at: another thread's turn.
  void (*before_launch)() = nullptr;
};
extern Settings settings;

// Whether shared memory is that of one block at a time, so that clusters cannot run.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kClusters = false;
#else
inline constexpr bool kClusters = true;
#endif

inline constexpr int kLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;  // of a block
inline constexpr unsigned kMaxCluster = 8;     // blocks

struct Launch {
  unsigned grid[3], block[3];
  size_t shared_bytes;
  unsigned cluster;  // blocks, along x, that run at the same time
  void (*call)(const void* kernel);
  const void* kernel;
};

// scheduler.cpp: runs a launch. Null, or what went wrong.
const char* run(const Launch& launch);

// The following are called by the threads of a kernel.
void* dynamic_shared();
void sync_block();
void sync_warp();
void sync_cluster();
uint64_t exchange_bits(uint64_t bits, int source_lane);
void exchange_all(uint64_t bits, uint64_t (&all)[kLanes]);
int lane();
unsigned cluster_size();
void* map_shared(const void* p, unsigned rank);
// Before every atomic access, and where __threadfence stands.
void note_atomic(const volatile void* address);
void fence();
// Whether PYLOSS_SHIM_SKIP=file.cu:line names this barrier: it is left out, to see whether its
// absence is noticed. PYLOSS_SHIM_BARRIERS=file collects the places of all barriers that ran.
bool skipped(const char* file, int line);

// How many races ThreadSanitizer has reported; 0 in a program without it.
int races();

}  // namespace shim
