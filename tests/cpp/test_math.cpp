// Accuracy of the elementwise functions in ulp, against libm in double, and the 16-bit conversions
// against a decoder that shares no code with them.
//
// Every function runs twice: as the loader's choice of instruction set (with fused multiply-add on
// most machines) and as plain code for the baseline, because the rounding differs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "common/compiler.h"
#include "common/dtype.h"
#include "common/math.h"
#include "cpu/lanes.h"

using namespace pyloss;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

#define DEFINE_ARRAY_FUNCTION(name)                                             \
  PYLOSS_MULTIVERSION void name##_picked(const float* x, float* y, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) y[i] = name##_lane(x[i]);                   \
  }                                                                             \
  void name##_plain(const float* x, float* y, int64_t n) {                      \
    for (int64_t i = 0; i < n; ++i) y[i] = name##_lane(x[i]);                   \
  }
DEFINE_ARRAY_FUNCTION(exp)
DEFINE_ARRAY_FUNCTION(expm1)
DEFINE_ARRAY_FUNCTION(tanh)

using ArrayFunction = void (*)(const float*, float*, int64_t);
using Exact = double (*)(double);

// Floats in [low, high], evenly spread over the bit patterns: all exponents get the same number.
std::vector<float> samples(float low, float high) {
  std::vector<float> out;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 997) {
    const float x = bits_to_float(uint32_t(bits));
    if (x >= low && x <= high) out.push_back(x);
  }
  out.push_back(low);
  out.push_back(high);
  out.push_back(0.0f);
  return out;
}

double ulp_of(double exact) {
  const float f = std::max(std::fabs(float(exact)), std::numeric_limits<float>::min());
  return double(std::nextafter(f, kInf)) - double(f);
}

void check_accuracy(const char* name, ArrayFunction fn, Exact exact, float low, float high,
                    double max_ulp) {
  const std::vector<float> x = samples(low, high);
  std::vector<float> y(x.size());
  fn(x.data(), y.data(), int64_t(x.size()));
  double worst = 0;
  float worst_x = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(double(x[i]));
    const double error = std::fabs(double(y[i]) - want) / ulp_of(want);
    if (!(error <= worst)) {
      worst = error;
      worst_x = x[i];
    }
  }
  std::printf("%-14s %.2f ulp at %.9g, %zu samples\n", name, worst, double(worst_x), x.size());
  CHECK(worst <= max_ulp);
}

float apply(ArrayFunction fn, float x) {
  float y;
  fn(&x, &y, 1);
  return y;
}

void test_exp(ArrayFunction fn, const char* name) {
  // Below -87.3 the result would be subnormal; it is defined as 0 there.
  check_accuracy(name, fn, [](double x) { return std::exp(x); }, exp_poly::kMin, exp_poly::kMax, 2);
  CHECK(apply(fn, 0.0f) == 1.0f);
  CHECK(apply(fn, -0.0f) == 1.0f);
  CHECK(apply(fn, -88.0f) == 0.0f);
  CHECK(apply(fn, -1e30f) == 0.0f);
  CHECK(apply(fn, -kInf) == 0.0f);
  CHECK(std::isnan(apply(fn, kNan)));
}

void test_expm1(ArrayFunction fn, const char* name) {
  check_accuracy(name, fn, [](double x) { return std::expm1(x); }, -100.0f, exp_poly::kMax, 4);
  CHECK(apply(fn, 0.0f) == 0.0f);
  CHECK(apply(fn, -kInf) == -1.0f);
  CHECK(apply(fn, 100.0f) == kInf);
  CHECK(apply(fn, kInf) == kInf);
  CHECK(std::isnan(apply(fn, kNan)));
}

void test_tanh(ArrayFunction fn, const char* name) {
  check_accuracy(name, fn, [](double x) { return std::tanh(x); }, -100.0f, 100.0f, 6);
  CHECK(apply(fn, 0.0f) == 0.0f);
  CHECK(apply(fn, kInf) == 1.0f);
  CHECK(apply(fn, -kInf) == -1.0f);
  CHECK(std::isnan(apply(fn, kNan)));
  float largest = 0;
  for (float x : samples(-100.0f, 100.0f)) largest = std::max(largest, std::fabs(apply(fn, x)));
  CHECK(largest == 1.0f);
}

// A 16-bit float with the given widths, by its definition.
double decode(uint16_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = std::ldexp(double(bits & ((1 << fraction_bits) - 1)), -fraction_bits);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * HUGE_VAL : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// Nearest, ties to even, found among the neighbours of the result.
bool is_nearest(float f, uint16_t got, int exponent_bits, int fraction_bits) {
  auto value = [&](uint16_t bits) { return decode(bits, exponent_bits, fraction_bits); };
  if (std::isnan(f)) return std::isnan(value(got));
  const double v = value(got);
  if (std::isnan(v) || std::signbit(v) != std::signbit(f)) return false;
  const uint16_t infinity = uint16_t(((1 << exponent_bits) - 1) << fraction_bits);
  const uint16_t magnitude = got & 0x7fff;
  // Infinity stands for the number that would follow the largest finite one.
  auto size = [&](uint16_t bits) {
    return bits == infinity ? 2 * value(bits - 1) - value(bits - 2) : value(bits);
  };
  const double x = std::fabs(double(f));
  if (std::isinf(x)) return magnitude == infinity;
  if (magnitude == infinity && x >= size(infinity)) return true;
  const double error = std::fabs(size(magnitude) - x);
  auto loses_to = [&](uint16_t other) {
    const double e = std::fabs(size(other) - x);
    return e < error || (e == error && (magnitude & 1));
  };
  if (magnitude > 0 && loses_to(magnitude - 1)) return false;
  if (magnitude < infinity && loses_to(magnitude + 1)) return false;
  return true;
}

template <class Half>
void test_half(int exponent_bits, int fraction_bits, Half (*narrow)(float)) {
  int bad = 0;
  std::vector<float> inputs;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h{uint16_t(bits)};
    const float f = to_float(h);
    bad += !same(double(f), decode(uint16_t(bits), exponent_bits, fraction_bits));
    if (!std::isnan(f)) bad += narrow(f).bits != bits;
    inputs.push_back(f);
    // Halfway to the next number, and the floats on both sides of it.
    const double next = decode(uint16_t(bits + 1), exponent_bits, fraction_bits);
    const float half = float((double(f) + next) / 2);
    inputs.push_back(half);
    inputs.push_back(std::nextafter(half, kInf));
    inputs.push_back(std::nextafter(half, -kInf));
  }
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 8191)
    inputs.push_back(bits_to_float(uint32_t(bits)));
  for (float f : inputs) bad += !is_nearest(f, narrow(f).bits, exponent_bits, fraction_bits);
  CHECK(bad == 0);
}

}  // namespace

int main() {
  test_exp(exp_picked, "exp");
  test_exp(exp_plain, "exp baseline");
  test_expm1(expm1_picked, "expm1");
  test_expm1(expm1_plain, "expm1 baseline");
  test_tanh(tanh_picked, "tanh");
  test_tanh(tanh_plain, "tanh baseline");
  test_half<BF16>(8, 7, float_to_bf16);
  test_half<F16>(5, 10, float_to_f16);
  return check_result();
}
