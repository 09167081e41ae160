// What the boundaries of exact and of low-rank tensor attention both decode.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bind/args.h"
#include "common/compiler.h"
#include "cpu/tensor_attention.h"

namespace pyloss {

// What is wrong with sizes, or null: `count`, their product, is at most `most`, which keeps every
// product of sizes, and the sum of all buffers in bytes, far from overflow.
inline const char* wrong_sizes(std::initializer_list<int64_t> sizes, int64_t most, int64_t& count) {
  count = 1;
  for (int64_t s : sizes) {
    if (s < 0) return "negative size";
    if (s > INT32_MAX) return "size above 2^31 - 1";
  }
  for (int64_t s : sizes) {
    if (multiply_overflows(count, s, &count)) return "size overflows";
  }
  return count > most ? "too many elements" : nullptr;
}
inline void check_sizes(const char* name, std::initializer_list<int64_t> sizes, int64_t most) {
  int64_t count;
  if (const char* wrong = wrong_sizes(sizes, most, count)) bad_argument(name, wrong);
}

// The buffer at `address`, of four sizes, whose last dimension is contiguous; the strides of the
// others, in elements, go to `outer`.
template <class Record>
const void* head_rows(const Reader<Record>& r, typename Record::Field address,
                      typename Record::Field strides, const std::array<int64_t, 4>& sizes,
                      int64_t most, int64_t (&outer)[3]) {
  int64_t count;
  const char* wrong = wrong_sizes({sizes[0], sizes[1], sizes[2], sizes[3]}, most, count);
  if (wrong) r.bad(address, wrong);
  const std::array<int64_t, 4> found = r.template strides<4>(strides, sizes);
  if (found[3] != 1 && sizes[3] > 1) r.bad(strides, "the last must be 1");
  for (int i = 0; i < 3; ++i) outer[i] = found[i];
  return r.template pointer<>(address, count);
}

// Which of its n keys the queries see.
template <class Record>
cpu::Band band(const Reader<Record>& r, typename Record::Field n, typename Record::Field window,
               int64_t q_offset, bool causal, int64_t most_position) {
  const int64_t w = r.integer(window);
  if (w < 0 || w > most_position) r.bad(window, "out of range");
  return {r.integer(n), w, q_offset, causal};
}

template <class Record>
int64_t position(const Reader<Record>& r, typename Record::Field f, int64_t most) {
  const int64_t found = r.integer(f);
  if (found < -most || found > most) r.bad(f, "out of range");
  return found;
}

inline void* checked_scratch(int64_t address, int64_t bytes, int64_t needed) {
  if (bytes < needed) {
    bad_argument("scratch",
                 "needs " + std::to_string(needed) + " bytes, got " + std::to_string(bytes));
  }
  return checked_pointer("scratch", address, needed);
}

}  // namespace pyloss
