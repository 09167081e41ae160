// Assertions for the C++ tests. CHECK counts a failure and goes on; main returns check_result().
#pragma once

#include <atomic>
#include <cstdio>

inline std::atomic<int> g_check_failures{0};

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++g_check_failures;                                                                \
    }                                                                                    \
  } while (0)

inline int check_result() {
  if (g_check_failures) std::fprintf(stderr, "%d checks failed\n", g_check_failures.load());
  return g_check_failures ? 1 : 0;
}
