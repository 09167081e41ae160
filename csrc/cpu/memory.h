// Large buffers: huge pages before the first write, and stores that bypass the cache.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/compiler.h"

namespace pyloss {

// A fresh large buffer is mapped page by page at its first write, which takes several times as long
// as the write itself; with 2 MiB pages it costs little. Harmless on mapped memory and where
// transparent huge pages are off.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = int64_t(2) << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

// Bytes of the second-level cache of one core.
inline int64_t l2_cache_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = [] {
    const long n = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return n > 0 ? int64_t(n) : int64_t(512) << 10;
  }();
  return bytes;
#else
  return int64_t(512) << 10;
#endif
}

// Asks for n bytes to be in the cache soon.
PYLOSS_INLINE void prefetch(const void* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) PYLOSS_PREFETCH(static_cast<const char*>(p) + i);
}

// Copies n bytes from a cached buffer to memory that will not be read soon. Without the bypass each
// line of the destination is first read from memory.
inline void stream_copy(void* dst, const void* src, int64_t n) {
#if defined(__SSE2__)
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(d) & 15);
  if (n < head + 16) {
    memcpy(d, s, n);
    return;
  }
  memcpy(d, s, head);
  int64_t i = head;
  for (; i + 16 <= n; i += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), v);
  }
  memcpy(d + i, s + i, n - i);
#else
  memcpy(dst, src, n);
#endif
}

// Orders the streamed stores before whatever tells another thread that they are there.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace pyloss
