// The inner loops of ALDR-KL, on one block of a row (row_blocks.h). Each exists for float, in three
// instruction sets, and for double.
#pragma once

#include <cstdint>

#include "common/aldr.h"

namespace pyloss {

// The sum of |z| and the largest z of n entries.
void aldr_scan(const float* z, int64_t n, float* sum, float* top);
void aldr_scan(const double* z, int64_t n, double* sum, double* top);

// Sums of exp(u), u exp(u), u^2 exp(u), u = (z - top) slope, over entries padded with -inf.
aldr::Moments<float> aldr_moments(const float* z, int64_t n, float top, float slope);
aldr::Moments<double> aldr_moments(const double* z, int64_t n, double top, double slope);

// out = a exp((z - top) slope) - f sign(z).
void aldr_gradient(const float* z, int64_t n, const aldr::Coeffs<float>& c, float* out);
void aldr_gradient(const double* z, int64_t n, const aldr::Coeffs<double>& c, double* out);

}  // namespace pyloss
