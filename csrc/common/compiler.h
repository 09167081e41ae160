// All that is asked of a compiler beyond C++17: attributes, builtins, vector types, pragmas, and
// the runtime choice of the instruction set. No other file names them (tests/test_compilers.py),
// but for the regions of cpu/per_instruction_set.h.
//
// gcc and clang have all of it, clang-cl too. Microsoft's own compiler has no vector types, which
// the kernels of csrc/cpu are written on.
#pragma once

#include <cstddef>  // defines __GLIBC__
#include <cstdint>
#include <cstdlib>
#if defined(_WIN32)
#include <malloc.h>
#endif

// --------------------------------------------------------------------------------------------------
// Inlining. Only helpers that are inlined into a function of several instruction sets share its
// own.

#define PYLOSS_ALWAYS_INLINE __attribute__((always_inline))
#define PYLOSS_INLINE inline PYLOSS_ALWAYS_INLINE
#define PYLOSS_NOINLINE __attribute__((noinline))

// --------------------------------------------------------------------------------------------------
// Runtime choice of the instruction set: the loader picks one of three clones of each marked
// function (GNU ifunc).

// ifunc needs glibc, and AddressSanitizer runs before its resolvers can.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) &&  \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !defined(PYLOSS_NO_MULTIVERSION)
#define PYLOSS_HAS_MULTIVERSION 1
#define PYLOSS_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PYLOSS_HAS_MULTIVERSION 0
#define PYLOSS_MULTIVERSION
#endif

// Explicit vector types are lowered before clones are made, so code on them is compiled once per
// instruction set, in `#pragma GCC target` regions (csrc/cpu/per_instruction_set.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(PYLOSS_NO_MULTIVERSION)
#define PYLOSS_HAS_TARGET_PRAGMA 1
#else
#define PYLOSS_HAS_TARGET_PRAGMA 0
#endif

namespace pyloss {

// The level of x86-64 that this CPU has, of those that code is compiled for: 4 has AVX-512, 3 AVX2.
inline int x86_level() {
#if PYLOSS_HAS_MULTIVERSION || PYLOSS_HAS_TARGET_PRAGMA
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 1;
}

inline bool made_by_intel() {
#if PYLOSS_HAS_TARGET_PRAGMA
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace pyloss

// --------------------------------------------------------------------------------------------------
// Vectors of so many bytes, of which an element is one of the type that it follows:
//   typedef float V PYLOSS_VECTOR(16);
// A loose one may lie anywhere in arrays of its elements.

#define PYLOSS_VECTOR(bytes) __attribute__((vector_size(bytes)))
#define PYLOSS_LOOSE_VECTOR(bytes, align) \
  __attribute__((vector_size(bytes), aligned(align), may_alias))
#define PYLOSS_CONVERT(v, type) __builtin_convertvector(v, type)
// Of one or two vectors by a vector of indices: gcc alone.
#if defined(__clang__)
#define PYLOSS_HAS_SHUFFLE 0
#else
#define PYLOSS_HAS_SHUFFLE 1
#define PYLOSS_SHUFFLE(...) __builtin_shuffle(__VA_ARGS__)
#endif
// Of two vectors by numbers: clang, and gcc from 12 on.
#if defined(__clang__) || __GNUC__ >= 12
#define PYLOSS_HAS_SHUFFLE_BY_NUMBERS 1
#define PYLOSS_SHUFFLE_BY_NUMBERS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYLOSS_HAS_SHUFFLE_BY_NUMBERS 0
#endif

// --------------------------------------------------------------------------------------------------
// Loops and branches

#define PYLOSS_PRAGMA(text) _Pragma(#text)
#define PYLOSS_UNROLL(times) PYLOSS_PRAGMA(GCC unroll times)
#define PYLOSS_LIKELY(x) __builtin_expect(bool(x), 1)
#define PYLOSS_UNLIKELY(x) __builtin_expect(bool(x), 0)
// A line of the cache, to be read soon; _WRITE: to be written.
#define PYLOSS_PREFETCH(p) __builtin_prefetch(p)
#define PYLOSS_PREFETCH_WRITE(p) __builtin_prefetch(p, 1)

namespace pyloss {

// --------------------------------------------------------------------------------------------------
// Bits of any integer; not of 0, where one is looked for.

template <class T>
PYLOSS_INLINE int lowest_bit(T x) {
  if constexpr (sizeof(T) > 4) return __builtin_ctzll(x);
  return __builtin_ctz(uint32_t(x));
}
template <class T>
PYLOSS_INLINE int highest_bit(T x) {
  if constexpr (sizeof(T) > 4) return 63 - __builtin_clzll(x);
  return 31 - __builtin_clz(uint32_t(x));
}
template <class T>
PYLOSS_INLINE int bit_count(T x) {
  if constexpr (sizeof(T) > 4) return __builtin_popcountll(x);
  return __builtin_popcount(uint32_t(x));
}

// --------------------------------------------------------------------------------------------------
// Arithmetic

// Whether the exact result does not fit; else it is in *found.
inline bool multiply_overflows(int64_t a, int64_t b, int64_t* found) {
  return __builtin_mul_overflow(a, b, found);
}
inline bool add_overflows(int64_t a, int64_t b, int64_t* found) {
  return __builtin_add_overflow(a, b, found);
}

// One instruction; std::sqrt sets errno.
PYLOSS_INLINE float square_root(float x) {
  return __builtin_sqrtf(x);
}

// --------------------------------------------------------------------------------------------------
// Memory of which the address and the size are multiples of `align`: free_aligned gives it back.

inline void* allocate_aligned(size_t align, size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, align);
#else
  return std::aligned_alloc(align, bytes);
#endif
}
inline void free_aligned(void* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

}  // namespace pyloss
