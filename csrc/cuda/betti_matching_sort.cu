// Stable radix sort of 64-bit keys with 32-bit values, 8 bits a pass, least significant first.
//
// Not cub: the same source has to run on the fiber shim, and a first pass that skips holes saves a
// compaction. Decomposition of a pass: a block owns a tile of kRows * threads entries.
//   1. digits of the tile are counted                       (digit, tile) <- count
//   2. counts are summed along the tiles, one digit a block (digit, tile) <- entries before
//   3. a warp ranks its rows one after the other: lanes of equal digit find each other by
//      match_any; counts of the warps before it and of step 2 complete the place.
// No atomics decide a place, so the result depends on the keys alone.
//
// Memory traffic per entry and pass: keys read twice, values once, both written: 32 bytes.
#include <algorithm>

#include "cuda/betti_matching.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kBits = 8;
constexpr u32 kDigits = 1u << kBits;
constexpr u32 kRows = 8;
constexpr int kSortThreads = 256;
constexpr u32 kSmall = 1u << 14;  // entries; fewer are sorted by blocks of one warp
constexpr u32 kSerialTiles = 8;

u32 sort_threads(u64 count) {
  return count <= kSmall ? u32(kWarp) : u32(kSortThreads);
}
u32 sort_tiles(u64 count) {
  return u32(ceil_div(int64_t(count), int64_t(kRows) * sort_threads(count)));
}

__device__ u32 digit_of(u64 key, int bit) {
  return u32(key >> bit) & (kDigits - 1);
}

__global__ void __launch_bounds__(kSortThreads)
    betti_sort_count_kernel(const u64* keys, u32 count, int bit, u32* counts) {
  __shared__ u32 mine[kDigits];
  for (u32 d = threadIdx.x; d < kDigits; d += blockDim.x) mine[d] = 0;
  __syncthreads();
  const u64 first = u64(blockIdx.x) * kRows * blockDim.x;
#pragma unroll
  for (u32 r = 0; r < kRows; ++r) {
    const u64 i = first + r * blockDim.x + threadIdx.x;
    const u64 key = i < count ? keys[i] : kNoKey;
    if (key != kNoKey) atomicAdd(&mine[digit_of(key, bit)], 1u);
  }
  __syncthreads();
  for (u32 d = threadIdx.x; d < kDigits; d += blockDim.x) {
    counts[u64(d) * gridDim.x + blockIdx.x] = mine[d];
  }
}

// totals[d] after the counts: entries of digit d.
__global__ void betti_sort_few_kernel(u32* counts, u32 tiles, u32* totals) {
  u32 sum = 0;
  for (u32 t = 0; t < tiles; ++t) {
    u32& c = counts[u64(threadIdx.x) * tiles + t];
    const u32 own = c;
    c = sum;
    sum += own;
  }
  totals[threadIdx.x] = sum;
}

// Block d sums the counts of digit d.
__global__ void __launch_bounds__(kSortThreads)
    betti_sort_many_kernel(u32* counts, u32 tiles, u32* totals) {
  __shared__ u32 sums[kSortThreads / kWarp];
  u32* row = counts + u64(blockIdx.x) * tiles;
  u32 before = 0;
  for (u32 first = 0; first < tiles; first += blockDim.x) {
    const u32 t = first + threadIdx.x;
    const u32 own = t < tiles ? row[t] : 0;
    u32 total;
    u32 sum = warp_sum_before(own, &total) + before;
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
    __syncthreads();
    for (u32 i = 0; i < blockDim.x / kWarp; ++i) {
      if (i < threadIdx.x / kWarp) sum += sums[i];
      before += sums[i];
    }
    if (t < tiles) row[t] = sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

__global__ void __launch_bounds__(kSortThreads)
    betti_sort_move_kernel(const u64* keys, const u32* values, u32 count, int bit,
                           const u32* counts, const u32* totals, u64* keys_out, u32* values_out) {
  __shared__ u32 places[kSortThreads / kWarp][kDigits];
  __shared__ u32 starts[kDigits];
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (u32 d = lane; d < kDigits; d += kWarp) places[warp][d] = 0;
  __syncwarp();
  // Entry (warp, row, lane): the order in memory.
  const u64 first = u64(blockIdx.x) * kRows * blockDim.x + u64(warp) * kRows * kWarp;
  u64 key[kRows];
  u32 rank[kRows];
#pragma unroll
  for (u32 r = 0; r < kRows; ++r) {
    const u64 i = first + r * kWarp + lane;
    key[r] = i < count ? keys[i] : kNoKey;
  }
#pragma unroll
  for (u32 r = 0; r < kRows; ++r) {
    const bool real = key[r] != kNoKey;
    const u32 d = real ? digit_of(key[r], bit) : kDigits;
    const u32 equal = __match_any_sync(kFullMask, d);
    const u32 before = real ? places[warp][d] : 0;
    __syncwarp();
    const u32 lower = u32(__popc(equal & ((1u << lane) - 1)));
    if (real && lower == 0) places[warp][d] = before + u32(__popc(equal));
    __syncwarp();
    rank[r] = before + lower;
  }
  if (warp == 0) {
    u32 sum = 0, total;
    for (u32 d = 0; d < kDigits / kWarp; ++d) sum += totals[lane * (kDigits / kWarp) + d];
    u32 start = warp_sum_before(sum, &total);
    for (u32 d = 0; d < kDigits / kWarp; ++d) {
      starts[lane * (kDigits / kWarp) + d] = start;
      start += totals[lane * (kDigits / kWarp) + d];
    }
  }
  __syncthreads();
  for (u32 d = threadIdx.x; d < kDigits; d += blockDim.x) {
    u32 place = starts[d] + counts[u64(d) * gridDim.x + blockIdx.x];
    for (u32 i = 0; i < warps; ++i) {
      const u32 own = places[i][d];
      places[i][d] = place;
      place += own;
    }
  }
  __syncthreads();
#pragma unroll
  for (u32 r = 0; r < kRows; ++r) {
    if (key[r] == kNoKey) continue;
    const u32 to = places[warp][digit_of(key[r], bit)] + rank[r];
    keys_out[to] = key[r];
    values_out[to] = values[first + r * kWarp + lane];
  }
}

}  // namespace

u64 betti_sort_words(u64 count) {
  // The most tiles that any smaller count can have.
  const u64 small = count < kSmall ? count : kSmall;
  const u64 a = sort_tiles(small), b = sort_tiles(count);
  return u64(kDigits) * ((a > b ? a : b) + 1);
}

bool betti_sort(const BettiWork& w, SortBuffers a, SortBuffers b, u32 count, u32 kept, int high_bit,
                void* stream) {
  bool in_b = false;
  for (int bit = 0; bit < high_bit; bit += kBits, in_b = !in_b, count = kept) {
    const SortBuffers& from = in_b ? b : a;
    const SortBuffers& to = in_b ? a : b;
    const u32 tiles = sort_tiles(count);
    u32 *counts = w.digits, *totals = w.digits + u64(kDigits) * tiles;
    const dim3 grid(tiles), block(sort_threads(count));
    launch(betti_sort_count_kernel, grid, block, 0, stream, from.keys, count, bit, counts);
    if (tiles <= kSerialTiles) {
      launch(betti_sort_few_kernel, dim3(1), dim3(kDigits), 0, stream, counts, tiles, totals);
    } else {
      launch(betti_sort_many_kernel, dim3(kDigits), dim3(std::max(block.x, 2u * kWarp)), 0, stream,
             counts, tiles, totals);
    }
    launch(betti_sort_move_kernel, grid, block, 0, stream, from.keys, from.values, count, bit,
           counts, totals, to.keys, to.values);
  }
  return in_b;
}

}  // namespace pyloss::cuda
