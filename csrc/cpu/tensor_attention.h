// Exact Kronecker tensor attention on the CPU.
//
//   S[i,j,k] = cap(scale sum_l q[i,l] k1[j,l] k2[k,l]) + mask1[i,j] + mask2[i,k]
//   out[i,:] = sum_jk softmax_jk(S)[i,j,k] v1[j,:] v2[k,:]
//
// with k2 + bias_k and v2 + bias_v in the place of k2 and v2, and cap(x) = softcap tanh(x /
// softcap) or x.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"

namespace pyloss::cpu {

// The keys that a query sees on one axis are an interval whose ends grow with the query.
struct Band {
  int64_t n, window, offset;  // keys; 0: no window; position of query 0
  bool causal;

  int64_t clip(int64_t x) const { return std::min(std::max<int64_t>(x, 0), n); }
  int64_t begin(int64_t i) const { return window ? clip(i + offset - window + 1) : 0; }
  int64_t end(int64_t i) const {
    return causal ? clip(i + offset + 1) : (window ? clip(i + offset + window) : n);
  }
  // The queries among n_q that see a key.
  int64_t first_query(int64_t key, int64_t n_q) const {
    const int64_t i = causal ? key - offset : (window ? key - offset - window + 1 : 0);
    return std::min(std::max<int64_t>(i, 0), n_q);
  }
  int64_t last_query(int64_t key, int64_t n_q) const {  // one past it
    return window ? std::min(std::max<int64_t>(key - offset + window, 0), n_q) : n_q;
  }
  // The most keys that `queries` neighbouring queries see.
  int64_t widest(int64_t queries) const {
    return window ? std::min(n, queries - 1 + (causal ? window : 2 * window - 1)) : n;
  }
};

struct TensorAttentionAxis {
  Band band;
  const void *k, *v;
  int64_t k_strides[3], v_strides[3];  // batch, head, key; the features are contiguous
  double bias_k, bias_v;
  const void* mask;         // null or additive, double for fp64 and float for the rest
  int64_t mask_strides[3];  // batch, head, query; the keys are contiguous
};

struct TensorAttentionProblem {
  int64_t batch, heads, kv_heads, n_q, d, dv;
  DType dtype;
  const void* q;
  int64_t q_strides[3];
  TensorAttentionAxis axes[2];
  double scale, softcap;  // 0: scores are not capped

  int64_t group() const { return heads / kv_heads; }
};

// Contiguous: out (batch, heads, n_q, dv) in the dtype, lse (batch, heads, n_q) in double for fp64
// and float for the rest.
struct TensorAttentionForward {
  void *out, *lse;
};

struct TensorAttentionBackward {
  const void* dout;
  int64_t dout_strides[3];
  const void *dlse, *out, *lse;  // dlse: may be null
  // Contiguous, null where not wanted. dmask (batch, heads, n_q, n) starts at zero.
  void *dq, *dk[2], *dv[2], *dmask[2];

  bool mask_gradients() const { return dmask[0] || dmask[1]; }
};

// Bytes of scratch that a call needs.
int64_t tensor_attention_forward_scratch(const TensorAttentionProblem& p, int threads);
int64_t tensor_attention_backward_scratch(const TensorAttentionProblem& p, bool mask_gradients,
                                          int threads);

void tensor_attention_forward(const TensorAttentionProblem& p, const TensorAttentionForward& f,
                              void* scratch, int threads);
void tensor_attention_backward(const TensorAttentionProblem& p, const TensorAttentionBackward& b,
                               void* scratch, int threads);

}  // namespace pyloss::cpu
