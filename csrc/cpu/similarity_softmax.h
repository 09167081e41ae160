// Softmax statistics over all pairs of queries and keys on the CPU, and their gradient.
//
//   z_ij = scale_i q_i . k_j        lse_i = log sum_{j in D_i} exp z_ij
//   positive_i = sum_{j in P_i} z_ij        and the same over i for each j
//   G_ij = exp(z_ij - lse_i) [j in D_i] g_i + [j in P_i] h_i + the columns' terms
//   dQ = scale G K        dK = G^T (scale Q)        dscale_i = q_i . (G K)_i
//
// D and P: common/similarity_softmax.h. Statistics are of the accumulator's dtype, float, or double
// for fp64; pointers of it are void* here.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/similarity_softmax.h"

namespace pyloss::cpu {

struct SimilarityProblem {
  int64_t n, m, d;
  DType dtype;
  bool itself;          // the keys are the queries; then there is one scale, and no columns
  const void* queries;  // (n, d)
  const void* keys;     // (m, d)
  double scale;         // of all rows, without scales
  const void* scales;   // null, or one scale or n
  bool scale_of_each;   // n scales
  similarity::Kinds kinds;
  bool unit_rows;  // no row is longer than 1, but for roundings
};

struct SimilarityStats {  // of rows (n) or columns (m); all null: not wanted
  void *lse, *positive, *count, *positives;
};
struct SimilarityForward {
  SimilarityStats rows, columns;
  void* mean;  // (n,) or null
};

struct SimilarityCotangents {
  const void *lse, *of_lse, *of_positive;  // the statistic, and cotangents or null
};
struct SimilarityGradients {
  void *dq, *dk;  // null: not wanted; of `itself` dq has both
  void* dscale;   // one or n of the accumulator's dtype; null: not wanted
  void* dbias;    // one, of pair sums alone
};
struct SimilarityBackward {
  SimilarityCotangents rows, columns;
  SimilarityGradients to;
};

// Sums over pairs that are no softmax, (n,) each.
//   kSigmoid  sum_j softplus(-y_ij (z_ij + bias)), y = 1 for positives and -1 for negatives
//   kMargins  over negatives sum_j max(0, z_ij - above) and how many are not below it, over
//             positives sum_j max(0, below - z_ij) and how many are not above it
enum class PairSum : int { kSigmoid = 0, kMargins = 1 };
struct PairSumOptions {
  PairSum kind;
  double bias, above, below;
};
struct PairSumForward {
  void *sums[2], *counts[2];  // of kSigmoid the first alone
};
struct PairSumBackward {
  const void* cotangents[2];  // of the sums, or null
  SimilarityGradients to;
};

struct SimilarityWants {  // of a backward
  bool dq, dk, dscale, dbias;
};
inline SimilarityWants wants_of(const SimilarityGradients& g) {
  return {g.dq != nullptr, g.dk != nullptr, g.dscale != nullptr, g.dbias != nullptr};
}

int64_t similarity_softmax_forward_scratch(const SimilarityProblem& p, bool columns, int threads);
int64_t similarity_softmax_backward_scratch(const SimilarityProblem& p, const SimilarityWants& w,
                                            int threads);

void similarity_softmax_forward(const SimilarityProblem& p, const SimilarityForward& f,
                                void* scratch, int threads);
void similarity_softmax_backward(const SimilarityProblem& p, const SimilarityBackward& b,
                                 void* scratch, int threads);

// The scratch memory of the backward is that of the softmax.
int64_t pair_sums_forward_scratch(const SimilarityProblem& p, int threads);
void pair_sums_forward(const SimilarityProblem& p, const PairSumOptions& s, const PairSumForward& f,
                       void* scratch, int threads);
void pair_sums_backward(const SimilarityProblem& p, const PairSumOptions& s,
                        const PairSumBackward& b, void* scratch, int threads);

}  // namespace pyloss::cpu
