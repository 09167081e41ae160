// Runs the threads of a block as fibers, in the order that shim::settings asks for.
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

Settings settings;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class Wait : unsigned char { kReady, kBlock, kWarp, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int exchanges;
};

struct Machine {
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers;
  std::vector<size_t> order;
  std::vector<char> shared;
  std::vector<uint64_t> lanes[2];  // values under exchange, by parity of the exchange
  std::vector<Wait> wait;
  std::vector<int> in_warp;  // lanes of each warp that wait for the others
  size_t current = 0, threads = 0, in_block = 0, done = 0;
};
Machine machine;

struct Random {
  uint64_t state;
  size_t below(size_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return size_t((state >> 32) * n >> 32);
  }
};

void wake(size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i) {
    if (machine.wait[i] == what) machine.wait[i] = Wait::kReady;
  }
}

// All threads of the block that have not ended are there.
void maybe_wake_block() {
  if (machine.in_block == 0 || machine.in_block + machine.done < machine.threads) return;
  machine.in_block = 0;
  wake(0, machine.threads, Wait::kBlock);
}

// To the scheduler, until it finds this fiber ready.
void leave() {
  machine.fibers[machine.current].context.resume(machine.scheduler);
}

// All lanes of the warp; one that has ended leaves the others waiting.
void join_warp() {
  const size_t warp = machine.current / kLanes, begin = warp * kLanes;
  const size_t lanes = std::min(size_t(kLanes), machine.threads - begin);
  machine.wait[machine.current] = Wait::kWarp;
  if (size_t(++machine.in_warp[warp]) == lanes) {
    machine.in_warp[warp] = 0;
    wake(begin, begin + lanes, Wait::kWarp);
  }
  leave();
}

void fiber_main() {
  (*machine.kernel)();
  machine.wait[machine.current] = Wait::kDone;
  ++machine.done;
  maybe_wake_block();
  machine.fibers[machine.current].context.finish(machine.scheduler);
}

void set_up_block(size_t shared_bytes) {
  const size_t n = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (machine.fibers.size() < n) machine.fibers.resize(n);
  machine.threads = n;
  machine.in_block = machine.done = 0;
  machine.wait.assign(n, Wait::kReady);
  machine.in_warp.assign((n + kLanes - 1) / kLanes, 0);
  for (auto& l : machine.lanes) l.assign(n, 0);
  // Exactly the size asked for, so that a sanitizer sees an overrun; never zeros.
  machine.shared = std::vector<char>(shared_bytes, char(0xcd));
  machine.order.resize(n);
  for (size_t i = 0; i < n; ++i) {
    machine.order[i] = settings.order == Order::kReverse ? n - 1 - i : i;
    Fiber& f = machine.fibers[i];
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
    f.thread = dim3(unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                    unsigned(i / blockDim.x / blockDim.y));
    f.exchanges = 0;
    f.context.start(f.stack.get(), kStackBytes, fiber_main);
  }
}

void run_block(Random& random) {
  const size_t n = machine.threads;
  while (machine.done < n) {
    if (settings.order == Order::kRandom) {
      for (size_t i = n; i > 1; --i)
        std::swap(machine.order[i - 1], machine.order[random.below(i)]);
    }
    bool ran = false;
    for (size_t i : machine.order) {
      if (machine.wait[i] != Wait::kReady) continue;
      ran = true;
      machine.current = i;
      threadIdx = machine.fibers[i].thread;
      machine.scheduler.resume(machine.fibers[i].context);
    }
    if (ran) continue;
    const auto waiting = [](Wait what) {
      return std::to_string(std::count(machine.wait.begin(), machine.wait.end(), what));
    };
    throw std::runtime_error("divergent barrier: " + waiting(Wait::kBlock) +
                             " threads in __syncthreads, " + waiting(Wait::kWarp) +
                             " in a shuffle, " + waiting(Wait::kDone) + " ended, of " +
                             std::to_string(n));
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.x * block.y * block.z > 1024 || shared_bytes > size_t(settings.shared_bytes)) {
    throw std::runtime_error("launch configuration out of range");
  }
  gridDim = grid;
  blockDim = block;
  machine.kernel = &kernel;
  Random random{settings.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull};
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t b = settings.order == Order::kReverse ? blocks - 1 - k : k;
    blockIdx =
        dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    set_up_block(shared_bytes);
    run_block(random);
  }
}

void* dynamic_shared() {
  return machine.shared.data();
}

void sync_block() {
  machine.wait[machine.current] = Wait::kBlock;
  ++machine.in_block;
  maybe_wake_block();
  leave();
}

namespace {

// Puts the lane's value where the others find it once all of the warp have come. The next exchange
// uses the other half, since a lane may reach it before all have read this one.
const uint64_t* publish(uint64_t bits) {
  const size_t self = machine.current;
  auto& lanes = machine.lanes[machine.fibers[self].exchanges++ % 2];
  lanes[self] = bits;
  join_warp();
  return &lanes[self / kLanes * kLanes];
}

}  // namespace

uint64_t exchange_bits(uint64_t bits, int source_lane) {
  return publish(bits)[source_lane];
}

void exchange_all(uint64_t bits, uint64_t (&all)[kLanes]) {
  std::copy_n(publish(bits), kLanes, all);
}

int lane() {
  return int(machine.current % kLanes);
}

}  // namespace shim
