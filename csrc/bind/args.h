// Checked decoding of what Python passes: addresses, sizes, strides and codes as integers.
//
// Python owns every buffer and says how large it is; these checks turn a wrong call into an
// exception while the call still knows the argument's name. std::invalid_argument becomes
// ValueError.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace pyloss {

[[noreturn]] inline void bad_argument(const std::string& name, const std::string& what) {
  throw std::invalid_argument(name + ": " + what);
}

// Product of sizes; refuses negative ones and more bytes than an address can span.
inline int64_t checked_count(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t n = 1;
  for (int64_t s : sizes) {
    if (s < 0) bad_argument(name, "negative size " + std::to_string(s));
  }
  for (int64_t s : sizes) {
    if (__builtin_mul_overflow(n, s, &n) || n > INT64_MAX / 8) bad_argument(name, "size overflows");
  }
  return n;
}

// A non-empty buffer needs an address: FakeTensors and empty tensors have none.
template <class T = void>
T* checked_pointer(const char* name, int64_t address, int64_t count) {
  if (address < 0 || (address == 0 && count > 0)) bad_argument(name, "no data at this address");
  return reinterpret_cast<T*>(address);
}
template <class T = void>
T* optional_pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType checked_dtype(const char* name, int64_t code) {
  if (code < 0 || code >= kDTypeCount) {
    bad_argument(name, "unknown dtype code " + std::to_string(code));
  }
  return static_cast<DType>(code);
}
inline bool is_float(DType t) {
  return t <= DType::kF16;
}

inline DType checked_float(const char* name, int64_t code) {
  const DType t = checked_dtype(name, code);
  if (!is_float(t)) bad_argument(name, "not a floating dtype");
  return t;
}

// An enumerator below `count`.
template <class E>
E checked_enum(const char* name, int64_t value, int64_t count) {
  if (value < 0 || value >= count) bad_argument(name, "unknown code " + std::to_string(value));
  return static_cast<E>(value);
}

inline int checked_threads(int64_t threads) {
  if (threads < 1 || threads > 4096) bad_argument("threads", std::to_string(threads));
  return static_cast<int>(threads);
}

// Strides, in elements, whose last element is still addressable.
inline void check_strides(const char* name, std::initializer_list<int64_t> sizes,
                          std::initializer_list<int64_t> strides) {
  int64_t last = 0;
  auto stride = strides.begin();
  for (int64_t size : sizes) {
    int64_t span;
    if (*stride < 0) bad_argument(name, "negative stride");
    // Also where the size is 1 and the stride means nothing: it is multiplied all the same.
    if (*stride > INT64_MAX / 256) bad_argument(name, "strides overflow");
    if (size > 0 && (__builtin_mul_overflow(size - 1, *stride, &span) ||
                     __builtin_add_overflow(last, span, &last) || last > INT64_MAX / 8)) {
      bad_argument(name, "strides overflow");
    }
    ++stride;
  }
}

}  // namespace pyloss
