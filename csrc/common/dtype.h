// Element types that cross the Python boundary, and the half-precision conversions that CPU and
// CUDA code share. Integer arithmetic only, so that every conversion vectorises and gives the same
// bits everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/math.h"

namespace pyloss {

// The codes are part of the Python boundary: pyloss/ops/_registry.py holds the same numbers.
enum class DType : int32_t { kF64 = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kI64 = 4, kI32 = 5, kU8 = 6 };

inline constexpr int kDTypeCount = 7;

PYLOSS_HD inline int64_t dtype_size(DType t) {
  switch (t) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    default:
      return 1;
  }
}

// Storage of the two 16-bit types; arithmetic happens in float.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

PYLOSS_HD inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
PYLOSS_HD inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

PYLOSS_HD inline float to_float(float x) {
  return x;
}
PYLOSS_HD inline double to_float(double x) {
  return x;
}
PYLOSS_HD inline float to_float(BF16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
// Shifting the 15 value bits into place and multiplying by 2^112 is exact for normal and
// subnormal numbers; only the all-ones exponent (inf, NaN) must be put back by hand.
PYLOSS_HD inline float to_float(F16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  uint32_t special = magnitude | 0x7f800000u;
  return bits_to_float(((x.bits & 0x7c00) == 0x7c00 ? special : finite) | sign);
}

PYLOSS_HD inline BF16 float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  uint32_t nan = (u >> 16) | 0x40;  // keep the payload's top bits, force it quiet
  return BF16{uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
// Round to nearest even: normal results by adding half an ulp to the bits, subnormal ones by
// letting the float adder do the rounding at a fixed exponent (0.5 has the ulp of 2^-24).
PYLOSS_HD inline F16 float_to_f16(float f) {
  uint32_t u = float_to_bits(f);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t a = u & 0x7fffffffu;
  uint32_t normal = (a + 0xfffu + ((a >> 13) & 1) - (112u << 23)) >> 13;
  uint32_t tiny = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  uint32_t r = a < (113u << 23) ? tiny : normal;
  r = a >= 0x477ff000u ? 0x7c00u : r;  // 65520 and above round to infinity
  r = a > 0x7f800000u ? 0x7e00u : r;   // NaN
  return F16{uint16_t(r | sign)};
}

template <class T>
struct FromFloat;
template <>
struct FromFloat<double> {
  PYLOSS_HD static double of(double x) { return x; }
};
template <>
struct FromFloat<float> {
  PYLOSS_HD static float of(float x) { return x; }
};
template <>
struct FromFloat<BF16> {
  PYLOSS_HD static BF16 of(float x) { return float_to_bf16(x); }
};
template <>
struct FromFloat<F16> {
  PYLOSS_HD static F16 of(float x) { return float_to_f16(x); }
};

// Calls fn with a value of the C++ type behind a floating dtype; fn is a generic lambda.
template <class Fn>
void dispatch_float(DType t, Fn&& fn) {
  switch (t) {
    case DType::kF64:
      return fn(double{});
    case DType::kF32:
      return fn(float{});
    case DType::kBF16:
      return fn(BF16{});
    case DType::kF16:
      return fn(F16{});
    default:
      return;  // args.h has refused every other code
  }
}

// One element of a label tensor.
PYLOSS_HD inline int64_t load_index(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::kI64:
      return static_cast<const int64_t*>(p)[i];
    case DType::kI32:
      return static_cast<const int32_t*>(p)[i];
    default:
      return static_cast<const uint8_t*>(p)[i];
  }
}

}  // namespace pyloss
