// Components as trees of parents, flat arrays of 32 bits; a root is its own parent.
#pragma once

#include <cstdint>

namespace pyloss {
namespace cpu {

// The root of x; halves the path to it.
inline uint32_t find_root(uint32_t* parent, uint32_t x) {
  uint32_t up = parent[x];
  while (up != x) {
    const uint32_t next = parent[up];
    parent[x] = next;
    x = next;
    up = parent[x];
  }
  return x;
}

}  // namespace cpu
}  // namespace pyloss
