// Contrastive losses of one or two tensors of rows from their features to the mean, in one call:
// for small batches, of which a step otherwise is mostly the calls of torch's operations.
//
//   y = x / max(|x|, 1e-12) of both tensors;  z, lse and positive as in similarity_softmax.h
//   loss = f sum_i (lse_i - positive_i), f one over the rows, or 1 for the sum
//
// Of views the rows are queries and keys at once, without themselves, and the positive of a row is
// its other view (NT-Xent). Else the second tensor has the keys, and the positive of a row is the
// key of its place (InfoNCE), with the columns half of the loss each (CLIP). The sigmoid loss has
// the sums of PairSum::kSigmoid instead (SigLIP). With labels the rows of the one tensor are
// queries and keys without themselves; the term of a row is lse_i - positive_i / positives_i, and
// one without positives or without negatives does not count.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/similarity_softmax.h"

namespace pyloss::cpu {

struct SimilarityLoss {
  int64_t rows, d;  // of either tensor
  DType dtype;      // float or double, of everything
  bool views, columns, sigmoid, sum;
  double scale;
  const int64_t* labels;  // (rows,) or null
  const void* scales;     // null, or one scale instead
  double bias;            // of the sigmoid loss
  void* unit;             // (2 rows, d): y
  void* stats;  // (2 to 4, rows): norms of both, lse of both views, or of rows and columns;
                // with labels (3, rows): norms, lse, one over positives, or 0
};

struct SimilarityLossGradients {
  void *dx1, *dx2;  // null: not wanted; of views dx1 has (2 rows, d)
  void *dscale, *dbias;
};

int64_t similarity_loss_forward_scratch(const SimilarityLoss& l, int threads);
int64_t similarity_loss_backward_scratch(const SimilarityLoss& l, const SimilarityWants& w,
                                         int threads);
void similarity_loss_forward(const SimilarityLoss& l, const void* x1, const void* x2, void* loss,
                             void* scratch, int threads);
void similarity_loss_backward(const SimilarityLoss& l, const void* g,
                              const SimilarityLossGradients& to, void* scratch, int threads);

}  // namespace pyloss::cpu
