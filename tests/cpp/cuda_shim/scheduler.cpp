// Runs the threads of a block as fibers, in the order that shim::settings asks for, and tells the
// race detector what orders them.
//
// What happens before what, in a program built with -fsanitize=thread:
//   launch         the host before every thread, and every thread before the host. Blocks are not
//                  ordered, whatever the order in which they run.
//   __syncthreads  all threads of the block that have not ended.
//   __syncwarp     all threads of the warp. Shuffles, votes and matches order nothing, as CUDA
//   says. cluster.sync   all threads of the cluster that have not ended. Shared memory is written
//   when
//                  its block ends, as it were: who may still read it then is reported.
//   atomics        relaxed: they never race with each other, but with plain accesses; they order
//                  nothing by themselves.
//   __threadfence  What a thread knows at a fence is published by its later atomics, for each
//                  address; what an atomic found there is learned at the thread's next fence. A
//                  message needs both sides.
//
// A barrier has two clocks that take turns: with one, a thread already at the next barrier would be
// known to those that have yet to leave this one.
//
// Shared memory and stacks keep their addresses from block to block, so the sanitizer is told that
// they are new. Making one of its fibers costs about a millisecond: all launches share them, and
// each block takes the next ones. Blocks that are a multiple of the pool apart are the same to it.
//
// No template of the standard library is used here: the linker could take the copy that another
// file compiled with the sanitizer.
#include <link.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "context.h"
#include "race.h"
#include "shim.h"

shim_index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

Settings settings;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;
constexpr size_t kDeepest = 8 * 1024;  // of a stack: more would only be reported too often
constexpr size_t kMostShared = 256 * 1024;
constexpr size_t kWarps = kMaxThreads / kLanes;
constexpr size_t kIdentities = 1024;  // fibers of the sanitizer that take turns, at least
constexpr size_t kMessages = 4096;    // addresses through which a launch may publish

enum class Wait : unsigned char { kReady, kBlock, kWarp, kCluster, kDone };

struct Fiber {
  Context context;
  char* stack;
  void* identity;  // the sanitizer's
  size_t place;    // in the pool
  Wait wait;
  unsigned barriers, exchanges, cluster_barriers;  // passed so far
  race::Clock fenced, found;                       // null before the first
};

// A block that runs. Those of a cluster have a system thread each, since `__shared__` is
// thread_local: each has its own copy, at the same offset. One of them runs at a time.
struct Block {
  Fiber fibers[kMaxThreads];
  uint64_t lanes[2][kMaxThreads];  // values under exchange, by parity of the exchange
  size_t order[kMaxThreads];
  size_t in_warp[kWarps];  // lanes of each warp that wait for the others
  size_t current, threads, in_block, done;
  race::Clock barrier[2], warp[kWarps][2], end;
  Context scheduler;
  void* identity;  // of the system thread
  shim_index index;
  char *shared, *shared_end, *dynamic;
  size_t dynamic_bytes;
  pthread_t system;
  sem_t go, gone;
  bool started, progress;
};

struct Message {
  const volatile void* address;
  race::Clock clock;
};

struct Machine {
  Block blocks[kMaxCluster];
  const Launch* launch;
  size_t in_cluster;  // threads that wait in a barrier of the cluster
  race::Clock cluster_barrier[2], begin, end;
  race::Pool pool;
  size_t next_identity;
  Message messages[kMessages];
  size_t message_count;
  uint64_t random;
  char error[160];
};
Machine machine;
Block* running = &machine.blocks[0];

size_t below(size_t n) {
  uint64_t& s = machine.random;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  return size_t((s >> 32) * n >> 32);
}
void shuffle(size_t* items, size_t n) {
  for (size_t i = n; i > 1; --i) {
    const size_t j = below(i), item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

// The sanitizer hears of a memset, and would take it for a write by the host.
void fill(char* p, unsigned char value, size_t count) {
  for (size_t i = 0; i < count; ++i) p[i] = char(value);
}

char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<char*>(p);
}

// ---- Waiting -----------------------------------------------------------------------------------

Fiber& self() {
  return running->fibers[running->current];
}

void wake(Block& b, size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i) {
    if (b.fibers[i].wait == what) b.fibers[i].wait = Wait::kReady;
  }
}

// All threads of the block that have not ended are there.
void maybe_wake_block(Block& b) {
  if (b.in_block == 0 || b.in_block + b.done < b.threads) return;
  b.in_block = 0;
  wake(b, 0, b.threads, Wait::kBlock);
}

// The same of a cluster.
bool maybe_wake_cluster() {
  const unsigned blocks = machine.launch->cluster;
  size_t there = machine.in_cluster;
  for (unsigned r = 0; r < blocks; ++r) there += machine.blocks[r].done;
  if (machine.in_cluster == 0 || there < machine.blocks[0].threads * blocks) return false;
  machine.in_cluster = 0;
  for (unsigned r = 0; r < blocks; ++r) {
    wake(machine.blocks[r], 0, machine.blocks[r].threads, Wait::kCluster);
  }
  return true;
}

// To the scheduler, until it finds this fiber ready.
void leave() {
  Block& b = *running;
  race::become(b.identity);
  b.fibers[b.current].context.resume(b.scheduler);
}

// All lanes of the warp; one that has ended leaves the others waiting.
void join_warp() {
  Block& b = *running;
  const size_t warp = b.current / kLanes, begin = warp * kLanes;
  const size_t rest = b.threads - begin, lanes = rest < size_t(kLanes) ? rest : size_t(kLanes);
  self().wait = Wait::kWarp;
  if (++b.in_warp[warp] == lanes) {
    b.in_warp[warp] = 0;
    wake(b, begin, begin + lanes, Wait::kWarp);
  }
  leave();
}

// ---- Threads -----------------------------------------------------------------------------------

void end_of_thread() {
  Block& b = *running;
  ++b.done;
  if (machine.launch->cluster > 1) {
    race::publish(b.end);
    if (b.done == b.threads) {
      race::learn(b.end);
      race::overwrite(b.shared, size_t(b.shared_end - b.shared));
      race::overwrite(b.dynamic, b.dynamic_bytes);
    }
  }
  race::publish(machine.end);
  self().wait = Wait::kDone;
  maybe_wake_block(b);
}

void thread_main() {
  race::learn(machine.begin);
  machine.launch->call(machine.launch->kernel);
  end_of_thread();
  race::become(running->identity);
  self().context.finish(running->scheduler);
}

void enter(Block& b, size_t i) {
  running = &b;
  b.current = i;
  blockIdx = b.index;
  threadIdx = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
               unsigned(i / blockDim.x / blockDim.y)};
  race::become(b.fibers[i].identity);
  b.scheduler.resume(b.fibers[i].context);
}

// Identities other than those of the blocks before, as long as there are any.
void identify(Block& b) {
  const size_t n = b.threads, needed = 2 * n * machine.launch->cluster;
  size_t turns = needed > kIdentities ? needed : kIdentities;
  if (turns > race::Pool::kMost) turns = race::Pool::kMost;
  if (machine.next_identity + n > turns) machine.next_identity = 0;
  for (size_t i = 0; i < n; ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "block %u,%u,%u thread %u,%u,%u", b.index.x, b.index.y,
                  b.index.z, unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                  unsigned(i / blockDim.x / blockDim.y));
    b.fibers[i].place = machine.next_identity++;
    b.fibers[i].identity = machine.pool.fiber(b.fibers[i].place, name);
  }
}

void start_thread(Block& b, size_t i) {
  Fiber& f = b.fibers[i];
  if (!f.stack) {
    f.stack = map_pages(kStackBytes + kPage);
    mprotect(f.stack, kPage, PROT_NONE);  // a kernel that needs more stops here
    f.stack += kPage;
  }
  race::forget(f.stack + kStackBytes - kDeepest, kDeepest);
  f.wait = Wait::kReady;
  f.barriers = f.exchanges = f.cluster_barriers = 0;
  f.fenced = f.found = nullptr;
  f.context.start(f.stack, kStackBytes, thread_main);
}

// ---- Blocks ------------------------------------------------------------------------------------

#if !defined(__SANITIZE_ADDRESS__)
// The range of the program's (or module's) thread_local variables for the thread that calls: these
// are the `__shared__` ones and nothing else.
int find_shared(dl_phdr_info* info, size_t, void* block) {
  Block& b = *static_cast<Block*>(block);
  const char* here = reinterpret_cast<const char*>(&machine);
  const char* base = reinterpret_cast<const char*>(info->dlpi_addr);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const char* at = base + header.p_vaddr;
    ours |= header.p_type == PT_LOAD && here >= at && here < at + header.p_memsz;
  }
  for (int i = 0; ours && i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_TLS || !info->dlpi_tls_data) continue;
    b.shared = static_cast<char*>(info->dlpi_tls_data);
    b.shared_end = b.shared + header.p_memsz;
  }
  return ours;
}
#endif

// By the system thread that is to run it.
void start_system_thread(Block& b) {
#if !defined(__SANITIZE_ADDRESS__)
  dl_iterate_phdr(find_shared, &b);
#endif
  b.identity = race::current();
  b.system = pthread_self();
  b.started = true;
}

void set_up(Block& b, size_t threads, size_t dynamic_bytes) {
  b.threads = threads;
  b.in_block = b.done = 0;
  for (size_t& lanes : b.in_warp) lanes = 0;
  // Exactly the size asked for, so that a sanitizer sees an overrun.
  if (b.dynamic_bytes != dynamic_bytes) {
    std::free(b.dynamic);
    b.dynamic = static_cast<char*>(std::malloc(dynamic_bytes));
    b.dynamic_bytes = dynamic_bytes;
  }
  const size_t shared_bytes = size_t(b.shared_end - b.shared);
  race::forget(b.shared, shared_bytes);
  race::forget(b.dynamic, dynamic_bytes);
  fill(b.shared, settings.poison, shared_bytes);
  fill(b.dynamic, settings.poison, dynamic_bytes);
  for (race::Clock& c : b.barrier) c = race::new_clock();
  for (size_t w = 0; w * kLanes < threads; ++w) {
    for (race::Clock& c : b.warp[w]) c = race::new_clock();
  }
  b.end = race::new_clock();
  if (race::on()) identify(b);
  for (size_t i = 0; i < threads; ++i) {
    start_thread(b, i);
    b.order[i] = settings.order == Order::kReverse ? threads - 1 - i : i;
  }
}

// On the system thread of the block: until none of its threads can go on by itself.
void run_threads(Block& b) {
  const size_t n = b.threads;
  b.progress = false;
  for (bool ran = true; ran && b.done < n;) {
    if (settings.order == Order::kRandom) shuffle(b.order, n);
    ran = false;
    for (size_t k = 0; k < n; ++k) {
      if (b.fibers[b.order[k]].wait != Wait::kReady) continue;
      ran = b.progress = true;
      enter(b, b.order[k]);
    }
  }
}

void* system_thread(void* block) {
  Block& b = *static_cast<Block*>(block);
  start_system_thread(b);
  for (;;) {
    sem_post(&b.gone);
    sem_wait(&b.go);
    run_threads(b);
  }
}

void start_cluster(unsigned blocks) {
  for (unsigned r = 1; r < blocks; ++r) {
    Block& b = machine.blocks[r];
    if (b.started) continue;
    sem_init(&b.go, 0, 0);
    sem_init(&b.gone, 0, 0);
    if (pthread_create(&b.system, nullptr, system_thread, &b) != 0) std::abort();
    sem_wait(&b.gone);
  }
}

void divergent() {
  size_t count[5] = {};
  for (unsigned r = 0; r < machine.launch->cluster; ++r) {
    const Block& b = machine.blocks[r];
    for (size_t i = 0; i < b.threads; ++i) ++count[size_t(b.fibers[i].wait)];
  }
  std::snprintf(machine.error, sizeof machine.error,
                "divergent barrier: %zu threads in __syncthreads, %zu in a shuffle, %zu in a "
                "barrier of the cluster, %zu ended",
                count[size_t(Wait::kBlock)], count[size_t(Wait::kWarp)],
                count[size_t(Wait::kCluster)], count[size_t(Wait::kDone)]);
}

// The blocks of a cluster, or the one block, until all threads have ended; false: they never will.
bool run_blocks(unsigned count) {
  for (;;) {
    bool progress = false;
    size_t done = 0;
    for (unsigned k = 0; k < count; ++k) {
      const unsigned r = settings.order == Order::kReverse ? count - 1 - k : k;
      Block& b = machine.blocks[r];
      if (r == 0) {
        run_threads(b);
      } else {
        sem_post(&b.go);
        sem_wait(&b.gone);
      }
      progress |= b.progress;
      done += b.done;
    }
    if (done == machine.blocks[0].threads * count) return true;
    if (maybe_wake_cluster() || progress) continue;
    divergent();
    return false;
  }
}

// Threads that wait for ever: what they did still happened before what the host does next.
void abandon(Block& b) {
  if (!race::on()) return;
  for (size_t i = 0; i < b.threads; ++i) {
    if (b.fibers[i].wait == Wait::kDone) continue;
    race::become(b.fibers[i].identity);
    race::publish(machine.end);
    race::become(machine.blocks[0].identity);
    machine.pool.drop(b.fibers[i].place);
  }
}

shim_index place_of(uint64_t block) {
  return {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
          unsigned(block / gridDim.x / gridDim.y)};
}

Message* message_at(const volatile void* address) {
  for (size_t i = 0; i < machine.message_count; ++i) {
    if (machine.messages[i].address == address) return &machine.messages[i];
  }
  return nullptr;
}

}  // namespace

const char* run(const Launch& l) {
  race::start();
  Block& first = machine.blocks[0];
  if (!first.started || !pthread_equal(first.system, pthread_self())) start_system_thread(first);
  if (l.cluster > 1) start_cluster(l.cluster);
  if (l.shared_bytes > kMostShared) std::abort();
  gridDim = {l.grid[0], l.grid[1], l.grid[2]};
  blockDim = {l.block[0], l.block[1], l.block[2]};
  machine.launch = &l;
  machine.random = settings.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  machine.message_count = machine.next_identity = machine.in_cluster = 0;
  race::forget_clocks();
  machine.begin = race::new_clock();
  machine.end = race::new_clock();
  race::publish(machine.begin);

  const size_t threads = size_t(l.block[0]) * l.block[1] * l.block[2];
  const size_t turns = size_t(l.grid[0]) * l.grid[1] * l.grid[2] / l.cluster;
  size_t* order = nullptr;
  if (settings.order == Order::kRandom) {
    order = static_cast<size_t*>(std::malloc(turns * sizeof(size_t)));
    for (size_t k = 0; k < turns; ++k) order[k] = k;
    shuffle(order, turns);
  }
  bool good = true;
  for (size_t k = 0; k < turns && good; ++k) {
    const size_t turn = order ? order[k] : settings.order == Order::kReverse ? turns - 1 - k : k;
    for (race::Clock& c : machine.cluster_barrier) c = race::new_clock();
    for (unsigned r = 0; r < l.cluster; ++r) {
      machine.blocks[r].index = place_of(turn * l.cluster + r);  // neighbours along x
      set_up(machine.blocks[r], threads, l.shared_bytes);
    }
    good = run_blocks(l.cluster);
  }
  std::free(order);
  for (unsigned r = 0; r < l.cluster && !good; ++r) abandon(machine.blocks[r]);
  race::learn(machine.end);
  return good ? nullptr : machine.error;
}

// ---- What threads call -------------------------------------------------------------------------

void* dynamic_shared() {
  return running->dynamic;
}

void sync_block() {
  Block& b = *running;
  race::Clock clock = b.barrier[self().barriers++ % 2];
  race::publish(clock);
  self().wait = Wait::kBlock;
  ++b.in_block;
  maybe_wake_block(b);
  leave();
  race::learn(clock);
}

void sync_cluster() {
  race::Clock clock = machine.cluster_barrier[self().cluster_barriers++ % 2];
  race::publish(clock);
  self().wait = Wait::kCluster;
  ++machine.in_cluster;
  leave();
  race::learn(clock);
}

void sync_warp() {
  race::Clock clock = running->warp[running->current / kLanes][self().exchanges++ % 2];
  race::publish(clock);
  join_warp();
  race::learn(clock);
}

namespace {

// Puts the lane's value where the others find it once all of the warp have come. The next exchange
// uses the other half, since a lane may reach it before all have read this one.
const uint64_t* offer(uint64_t bits) {
  const size_t i = running->current;
  uint64_t* lanes = running->lanes[self().exchanges++ % 2];
  lanes[i] = bits;
  join_warp();
  return lanes + i / kLanes * kLanes;
}

}  // namespace

uint64_t exchange_bits(uint64_t bits, int source_lane) {
  return offer(bits)[source_lane];
}

void exchange_all(uint64_t bits, uint64_t (&all)[kLanes]) {
  const uint64_t* lanes = offer(bits);
  for (int i = 0; i < kLanes; ++i) all[i] = lanes[i];
}

int lane() {
  return int(running->current % kLanes);
}

unsigned cluster_size() {
  return machine.launch->cluster;
}

void* map_shared(const void* p, unsigned rank) {
  const char* at = static_cast<const char*>(p);
  const Block &b = *running, &to = machine.blocks[rank];
  if (rank < machine.launch->cluster) {
    if (at >= b.shared && at < b.shared_end) return to.shared + (at - b.shared);
    if (at >= b.dynamic && at < b.dynamic + b.dynamic_bytes) return to.dynamic + (at - b.dynamic);
  }
  std::fprintf(stderr, "shim: map_shared_rank of what no block of the cluster has\n");
  std::abort();
}

void note_atomic(const volatile void* address) {
  if (!race::on()) return;
  Fiber& f = self();
  Message* m = message_at(address);
  if (m) {
    if (!f.found) f.found = race::new_clock();
    race::pass_on(m->clock, f.found, running->identity);
  }
  if (!f.fenced) return;
  if (!m) {
    if (machine.message_count == kMessages) std::abort();
    m = &machine.messages[machine.message_count++];
    *m = {address, race::new_clock()};
  }
  race::pass_on(f.fenced, m->clock, running->identity);
}

void fence() {
  if (!race::on()) return;
  Fiber& f = self();
  if (f.found) race::learn(f.found);
  if (!f.fenced) f.fenced = race::new_clock();
  race::publish(f.fenced);
}

}  // namespace shim
