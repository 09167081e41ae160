// Near-linear tensor attention of any order m on the CPU: a polynomial p of degree g in the place
// of exp, multiplied out into monomials of q and of each axis's keys.
//
//   U[i,a] = monomial a of row i,  a = 0 .. r-1,  r = C(d + g, g)
//   p(sum_l q_l prod_x k_x,l) = sum_a w_a U(q)[a] prod_x U(k_x)[a]
//   A_x = U(k_x)^T [V_x | 1]          (the states, r x (dv + 1))
//   [N | y] = U(q) (w * prod_x A_x),  out = N / y,  lse = log y + centre
//
// Causal and windowed: A_x depends on the query; it holds the keys that the query sees.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cpu/tensor_attention.h"

namespace pyloss::cpu {

struct LowrankAxis {
  Band band;
  const void *k, *v;
  int64_t k_strides[3], v_strides[3];  // batch, head, key; the features are contiguous
  const uint8_t* mask;                 // null, or 0 for a key that no query sees
  int64_t mask_strides[2];             // batch, head; the keys are contiguous
};

struct LowrankProblem {
  int64_t batch, heads, kv_heads, n_q, d, dv;
  DType dtype;  // fp32 or fp64
  const void* q;
  int64_t q_strides[3];
  std::vector<LowrankAxis> axes;
  std::vector<double> coefficients;  // of the polynomial in the unscaled logit
  double centre;

  int64_t group() const { return heads / kv_heads; }
  int64_t degree() const { return int64_t(coefficients.size()) - 1; }
  // Whether queries see different keys.
  bool scans() const {
    for (const LowrankAxis& a : axes) {
      if (a.band.causal || a.band.window) return true;
    }
    return false;
  }
};

// Bits of what the forward returns.
enum LowrankFlag : int { kNotPositive = 1, kNotFinite = 2 };

// Everything is contiguous and of the dtype: out (batch, heads, n_q, dv), lse and y (batch, heads,
// n_q), a state per axis (batch, kv_heads, r, dv + 1); no states where the problem scans.
struct LowrankForward {
  void *out, *lse, *y;
  std::vector<void*> states;
};

struct LowrankBackward {
  const void* dout;
  int64_t dout_strides[3];
  const void *dlse, *out, *y;  // dlse: may be null
  std::vector<const void*> states;
  void* dq;  // contiguous, null where not wanted; as the next two
  std::vector<void*> dk, dv;
};

// C(d + degree, degree), or -1 where it is above 2^31 - 1.
int64_t monomial_count(int64_t d, int64_t degree);

// Bytes of scratch that a call needs.
int64_t tensor_attention_lowrank_forward_scratch(const LowrankProblem& p, int threads);
int64_t tensor_attention_lowrank_backward_scratch(const LowrankProblem& p, int threads);

// Returns LowrankFlags: what was found in y. A query that sees no key has y = 0 without a flag.
int tensor_attention_lowrank_forward(const LowrankProblem& p, const LowrankForward& f,
                                     void* scratch, int threads);
void tensor_attention_lowrank_backward(const LowrankProblem& p, const LowrankBackward& b,
                                       void* scratch, int threads);

// max |x| of fp32 or fp64, NaN where one is NaN, 0 of nothing.
double largest_entry(const void* x, DType dtype, int64_t n, int threads);

}  // namespace pyloss::cpu
