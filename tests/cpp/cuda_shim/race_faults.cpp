// The race detector's own test: kernels with one planted fault each, which must be reported, and
// their repaired twins, which must not. Argument: the order of threads and blocks, 0 to 2.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cuda/atomic>

// Reports are counted, the first for each pair of places, and do not make the program fail.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "suppress_equal_addresses=0:history_size=1:exitcode=0";
}

namespace {

constexpr unsigned kFullMask = 0xffffffffu;
int out[4096];

unsigned global_index() {
  return blockIdx.x * blockDim.x + threadIdx.x;
}

// ---- Inside a block ----------------------------------------------------------------------------

__global__ void other_warp_kernel(bool repaired) {
  __shared__ int v[128];
  v[threadIdx.x] = int(threadIdx.x);
  if (repaired) __syncthreads();
  out[global_index()] = v[(threadIdx.x + 32) % 128];
}

__global__ void dynamic_kernel(bool repaired) {
  int* v = static_cast<int*>(shim::dynamic_shared());
  v[threadIdx.x] = int(threadIdx.x);
  if (repaired) __syncthreads();
  out[global_index()] = v[(threadIdx.x + 32) % 128];
}

// Global memory that one block alone uses.
__global__ void global_kernel(bool repaired) {
  out[global_index()] = int(threadIdx.x);
  if (repaired) __syncthreads();
  out[2048 + global_index()] = out[global_index() ^ 64];
}

// No second barrier in a loop: a turn's values are overwritten while others read them.
__global__ void loop_kernel(bool repaired) {
  __shared__ int v[128];
  int sum = 0;
  for (int turn = 0; turn < 3; ++turn) {
    v[threadIdx.x] = turn;
    __syncthreads();
    sum += v[(threadIdx.x + 32) % 128];
    if (repaired) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Two buffers in turn need one barrier a turn; one buffer does not become two by that.
__global__ void two_buffers_kernel(bool repaired) {
  __shared__ int v[2][128];
  int sum = 0;
  for (int turn = 0; turn < 4; ++turn) {
    int* now = v[repaired ? turn % 2 : 0];
    now[threadIdx.x] = turn;
    __syncthreads();
    sum += now[(threadIdx.x + 32) % 128];
  }
  out[threadIdx.x] = sum;
}

__global__ void warp_kernel(bool repaired) {
  __shared__ int v[64];
  v[threadIdx.x] = int(threadIdx.x);
  if (repaired) __syncwarp();
  out[threadIdx.x] = v[threadIdx.x ^ 1];
}

// Shuffles and votes make lanes meet, and promise nothing about memory.
__global__ void shuffle_kernel(bool repaired) {
  __shared__ int v[64];
  v[threadIdx.x] = int(threadIdx.x);
  const int one = __shfl_xor_sync(kFullMask, 1, 1);
  if (repaired) __syncwarp();
  out[threadIdx.x] = v[threadIdx.x ^ 1] + one;
}
__global__ void vote_kernel(bool repaired) {
  __shared__ int v[64];
  v[threadIdx.x] = int(threadIdx.x);
  const unsigned all = __ballot_sync(kFullMask, 1);
  if (repaired) __syncwarp();
  out[threadIdx.x] = v[threadIdx.x ^ 1] + int(all);
}

__global__ void warp_for_block_kernel(bool repaired) {
  __shared__ int v[64];
  v[threadIdx.x] = int(threadIdx.x);
  if (repaired) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = v[threadIdx.x ^ 32];
}

// A thread that has ended takes no part in the barriers of those that go on.
__global__ void ended_thread_kernel(bool repaired) {
  __shared__ int v[64];
  v[threadIdx.x] = 1;
  if (repaired) __syncthreads();
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = v[threadIdx.x + 32];
}

// Everybody stores the same: still a race.
__global__ void same_value_kernel(bool repaired) {
  if (!repaired || threadIdx.x == 0) out[blockIdx.x] = 1;
}

// ---- Between blocks ----------------------------------------------------------------------------

__global__ void one_address_kernel(bool repaired) {
  if (threadIdx.x != 0) return;
  if (repaired) {
    atomicMax(&out[0], int(blockIdx.x));
  } else {
    out[0] = int(blockIdx.x);
  }
}

__global__ void reads_other_kernel(bool repaired) {
  out[blockIdx.x] = 1;
  __syncthreads();
  out[100 + blockIdx.x] = out[repaired ? blockIdx.x : (blockIdx.x + 1) % gridDim.x];
}

// Neighbours of 16 bits are two places, but a store to the neighbour is one.
__global__ void half_words_kernel(bool repaired) {
  auto* half = reinterpret_cast<uint16_t*>(out);
  const unsigned i = global_index();
  half[i] = uint16_t(i);
  if (!repaired && threadIdx.x == 0 && i > 0) half[i - 1] = uint16_t(i);
}

__global__ void plain_and_atomic_kernel(bool repaired) {
  if (repaired || threadIdx.x > 0) {
    atomicAdd(&out[0], 1);
  } else {
    ++out[0];
  }
}

__global__ void loop_over_grid_kernel(bool repaired) {
  const unsigned step = gridDim.x * blockDim.x;
  for (unsigned i = global_index(); i < 512; i += step) {
    out[i] = int(i);
    if (!repaired && i + 1 < 512) out[i + 1] = 0;
  }
}

// ---- Messages ----------------------------------------------------------------------------------

enum class Missing {
  kNothing,
  kFences,
  kRelease,    // the fence before the atomic
  kAcquire,    // the one after it
  kBarrier,    // before the fence: only thread 0's part is published
  kLateWrite,  // after the fence
};

// The last block to arrive sums what all blocks left. Faults are template arguments where they
// share a kernel: each has places of its own.
template <Missing missing>
__global__ void last_block_kernel(double* parts, unsigned* ticket, double* sum) {
  __shared__ bool last;
  parts[global_index()] = double(threadIdx.x);
  if (missing != Missing::kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (missing != Missing::kFences && missing != Missing::kRelease) __threadfence();
    if (missing == Missing::kLateWrite) parts[global_index()] = 1;
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (missing != Missing::kFences && missing != Missing::kAcquire) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  double all = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) all += parts[i];
  for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(kFullMask, all, step);
  if (threadIdx.x == 0) *sum = all;
}
template <Missing missing>
void last_block() {
  static double parts[4 * 32], sum;
  unsigned ticket = 0;
  shim::run(dim3(4), dim3(32), 0, [&] { last_block_kernel<missing>(parts, &ticket, &sum); });
}

// A flag that is stored, not counted.
__global__ void flag_kernel(bool repaired, int* data, int* flag) {
  using Flag = cuda::atomic_ref<int, cuda::thread_scope_device>;
  if (threadIdx.x == 0) {
    *data = 7;
    if (repaired) __threadfence();
    Flag(*flag).store(1, cuda::memory_order_relaxed);
  }
  __syncwarp();
  if (threadIdx.x == 32) {
    const bool there = Flag(*flag).load(cuda::memory_order_relaxed) != 0;
    __threadfence();
    if (there || !repaired) out[0] = *data;
  }
}

// ---- Launches, clusters ------------------------------------------------------------------------

__global__ void write_kernel() {
  out[global_index()] = 1;
}
__global__ void reverse_kernel() {
  out[2048 + global_index()] = out[gridDim.x * blockDim.x - 1 - global_index()];
}
void launches(bool repaired) {
  const dim3 grid(4), block(64);
  if (repaired) {
    shim::run(grid, block, 0, write_kernel);
    shim::run(grid, block, 0, reverse_kernel);
    out[7] = 3;  // the host, after the kernels
    shim::run(grid, block, 0, reverse_kernel);
  } else {
    shim::run(grid, block, 0, [] {
      write_kernel();
      __syncthreads();
      reverse_kernel();
    });
  }
}

enum class Cluster { kRight, kNoFirst, kNoSecond, kEarlyExit };

template <Cluster fault>
__global__ void cluster_kernel() {
  __shared__ int published;
  const auto cluster = cooperative_groups::this_cluster();
  int sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) published = int(blockIdx.x) + turn;
    if (fault != Cluster::kNoFirst) cluster.sync();
    for (unsigned i = 0; i < cluster.num_blocks(); ++i) {
      sum += *cluster.map_shared_rank(&published, int(i));
    }
    if (fault == Cluster::kEarlyExit && turn == 1) break;
    if (fault != Cluster::kNoSecond) cluster.sync();
  }
  out[global_index()] = sum;
}
template <Cluster fault>
void cluster() {
  shim::run(dim3(8), dim3(64), 0, cluster_kernel<fault>, 4);
}

// ---- All of them -------------------------------------------------------------------------------

struct Fault {
  const char* name;
  std::function<void(bool repaired)> run;
};

Fault simple(const char* name, unsigned blocks, unsigned threads, void (*kernel)(bool)) {
  return {name, [=](bool repaired) {
            shim::run(dim3(blocks), dim3(threads), 512, [&] { kernel(repaired); });
          }};
}
template <Missing missing>
Fault message(const char* name) {
  return {name, [](bool repaired) {
            repaired ? last_block<Missing::kNothing>() : last_block<missing>();
          }};
}
template <Cluster fault>
Fault in_cluster(const char* name) {
  return {name, [](bool repaired) { repaired ? cluster<Cluster::kRight>() : cluster<fault>(); }};
}

const std::vector<Fault> kFaults = {
    simple("no __syncthreads", 2, 128, other_warp_kernel),
    simple("no __syncthreads, dynamic shared memory", 2, 128, dynamic_kernel),
    simple("no __syncthreads, global memory", 2, 128, global_kernel),
    simple("no second __syncthreads in a loop", 1, 128, loop_kernel),
    simple("one buffer for two", 1, 128, two_buffers_kernel),
    simple("no __syncwarp", 1, 64, warp_kernel),
    simple("a shuffle for __syncwarp", 1, 64, shuffle_kernel),
    simple("a vote for __syncwarp", 1, 64, vote_kernel),
    simple("__syncwarp between warps", 1, 64, warp_for_block_kernel),
    simple("what an ended thread wrote", 1, 64, ended_thread_kernel),
    simple("everybody stores the same", 2, 32, same_value_kernel),
    simple("two blocks write one address", 2, 64, one_address_kernel),
    simple("a block reads what another writes", 4, 1, reads_other_kernel),
    simple("neighbouring 16-bit stores", 2, 64, half_words_kernel),
    simple("plain against atomic", 1, 64, plain_and_atomic_kernel),
    simple("a loop over the grid that overlaps", 3, 64, loop_over_grid_kernel),
    message<Missing::kFences>("last block: no fence"),
    message<Missing::kRelease>("last block: no release"),
    message<Missing::kAcquire>("last block: no acquire"),
    message<Missing::kBarrier>("last block: no barrier before the fence"),
    message<Missing::kLateWrite>("last block: a write after the fence"),
    {"a flag without a fence",
     [](bool repaired) {
       int data = 0, flag = 0;
       shim::run(dim3(1), dim3(64), 0, [&] { flag_kernel(repaired, &data, &flag); });
     }},
    {"no launch between", launches},
    in_cluster<Cluster::kNoFirst>("cluster: no sync before a remote read"),
    in_cluster<Cluster::kNoSecond>("cluster: no sync after it"),
    in_cluster<Cluster::kEarlyExit>("cluster: a block ends too early"),
};

int reports_of(const Fault& fault, bool repaired) {
  const int before = shim::races();
  fault.run(repaired);
  return shim::races() - before;
}

}  // namespace

int main(int argc, char** argv) {
  shim::settings.order = shim::Order(argc > 1 ? std::atoi(argv[1]) : 0);
  int wrong = 0;
  for (const Fault& fault : kFaults) {
    const int silent = reports_of(fault, true), found = reports_of(fault, false);
    const bool ok = silent == 0 && found > 0;
    wrong += !ok;
    std::printf("%s %s: %d reports, repaired %d\n", ok ? "      " : "FAILED", fault.name, found,
                silent);
  }
  std::printf("%zu planted faults, %d wrong\n", kFaults.size(), wrong);
  return wrong != 0;
}
