// Runtime choice of the instruction set: the loader picks one of three clones of each marked
// function (GNU ifunc). Only helpers that are inlined into a marked function share its instruction
// set, hence PYLOSS_INLINE.
#pragma once

#include <cstddef>  // defines __GLIBC__

#define PYLOSS_INLINE inline __attribute__((always_inline))

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
