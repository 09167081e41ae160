// How many pairs of rows of each class lie between two thresholds of their distance, on the CPU.
//
//   v_ij = half_i + half_j - x_i . x_j = |x_i - x_j|^2 / 2,   half_i = |x_i|^2 / 2
//   step_ij = the first k with v_ij <= edges_k; pairs beyond the last edge count nowhere
//   counts[0][c][k]: pairs i < j within class c of step k
//   counts[1][c][k]: pairs of step k with one end in class c and the other one elsewhere
//
// Class `classes` holds rows that are alone: two of them are of different classes.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pyloss::cpu {

struct CountsProblem {
  int64_t n, d, classes, steps;
  DType dtype;            // fp32 or fp64
  const void* x;          // (n, d)
  const void* half;       // (n,)
  const int64_t* labels;  // (n,), from 0 to classes
  const void* edges;      // (steps,), ascending
};

int64_t similarity_counts_scratch(const CountsProblem& p, int threads);

// counts: (2, classes + 1, steps).
void similarity_counts(const CountsProblem& p, int64_t* counts, void* scratch, int threads);

}  // namespace pyloss::cpu
