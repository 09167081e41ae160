// How a call of tensor attention is cut into tasks, and where a task's buffers lie. Nothing here
// looks at the number of threads, so that results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/tensor_attention.h"

namespace pyloss::cpu {

inline constexpr int64_t kLanePad = 16;   // rows of features are padded to whole vectors
inline constexpr int64_t kPanelPad = 32;  // a product may write and read so far past its columns
inline constexpr int64_t kKeyBlock = 256, kPairRows = 28;          // forward: columns and rows of S
inline constexpr int64_t kQueryRows = 56, kBackwardColumns = 192;  // backward: rows, columns of S

inline int64_t padded(int64_t n) {
  return (n + kLanePad - 1) / kLanePad * kLanePad;
}
// Row length of a transposed matrix: an odd number of cache lines, so that the rows of a column
// block fall into different cache sets.
inline int64_t transposed_stride(int64_t n, int64_t element_bytes) {
  const int64_t line = 64 / element_bytes, lines = (n + kPanelPad + line - 1) / line;
  return (lines | 1) * line;
}

// The product runs over rows of the first and columns of the second axis: the axis with the
// narrower window comes first, where every row is used, and the wide one gives whole vectors.
inline bool swap_axes(const TensorAttentionProblem& p) {
  const auto width = [](const Band& b) { return b.window ? std::min(b.window, b.n) : b.n; };
  return width(p.axes[1].band) < width(p.axes[0].band);
}

// ---- forward: a task is a range of queries of one head
// -------------------------------------------

struct ForwardPlan {
  int64_t queries, blocks;  // per task; tasks per head
  explicit ForwardPlan(const TensorAttentionProblem& p) {
    // Enough pairs per task to pay for the packing of the second axis.
    const Band& rows = p.axes[0].band;
    const int64_t per_query = std::max<int64_t>(1, rows.widest(1));
    queries = std::min<int64_t>(64, std::max<int64_t>(8, 2048 / per_query));
    blocks = (p.n_q + queries - 1) / queries;
  }
};

template <class R>
struct ForwardBuffers {
  int64_t kt_stride;
  R *k1, *v1, *kt, *v2, *pairs, *s, *q, *acc, *max, *sum;
  static constexpr int64_t kScoreStride = kKeyBlock + kPanelPad;
  ForwardBuffers(const TensorAttentionProblem& p, const ForwardPlan& plan, Arena& arena) {
    const int64_t rows = p.axes[0].band.widest(plan.queries), dvp = padded(p.dv);
    kt_stride = transposed_stride(kKeyBlock, sizeof(R));
    k1 = arena.take<R>(rows * p.d);
    v1 = arena.take<R>(rows * dvp);
    kt = arena.take<R>(p.d * kt_stride);
    v2 = arena.take<R>(kKeyBlock * dvp);
    pairs = arena.take<R>(kPairRows * p.d);
    s = arena.take<R>(kPairRows * kScoreStride);
    q = arena.take<R>(p.d);
    acc = arena.take<R>(plan.queries * dvp);
    max = arena.take<R>(plan.queries);
    sum = arena.take<R>(plan.queries);
  }
};

// ---- backward: a task is a range of keys of the first axis, for one head
// -------------------------

struct KeyRange {
  int64_t f0, f1;   // keys of the first axis
  int64_t i0, i1;   // queries that see any of them
  int64_t c0, c1;   // keys of the second axis that any of these queries sees
  int64_t partial;  // where its partial gradients start, in elements
};

struct BackwardPlan {
  std::vector<KeyRange> ranges;
  int64_t per_head = 0;  // elements of partial gradients of one head, those of the first axis first
  int64_t most_queries = 0, most_columns = 0, dp, dvp;

  BackwardPlan(const TensorAttentionProblem& p, bool mask_gradients) {
    const Band &first = p.axes[0].band, &second = p.axes[1].band;
    dp = padded(p.d);
    dvp = padded(p.dv);
    // Few enough for the partial sums to stay small, enough for many threads. A mask's gradient on
    // the second axis is added up in place: one range.
    const int64_t heads = std::max<int64_t>(1, p.batch * p.heads);
    int64_t count = std::min<int64_t>(8, (16 + heads - 1) / heads);
    if (mask_gradients) count = 1;
    count = std::max<int64_t>(1, std::min(count, first.n / 16));
    per_head = first.n * (dp + dvp);
    for (int64_t t = 0; t < count; ++t) {
      KeyRange r{};
      r.f0 = first.n * t / count;
      r.f1 = first.n * (t + 1) / count;
      if (r.f0 < r.f1) {
        r.i0 = first.first_query(r.f0, p.n_q);
        r.i1 = first.last_query(r.f1 - 1, p.n_q);
      }
      if (r.i0 < r.i1) {
        r.c0 = second.begin(r.i0);
        r.c1 = second.end(r.i1 - 1);
      }
      if (r.i0 >= r.i1 || r.c0 >= r.c1) r.i0 = r.i1 = r.c0 = r.c1 = 0;
      r.partial = per_head;
      per_head += (r.i1 - r.i0) * dp + (r.c1 - r.c0) * (dp + dvp);
      most_queries = std::max(most_queries, r.i1 - r.i0);
      most_columns = std::max(most_columns, r.c1 - r.c0);
      ranges.push_back(r);
    }
  }
  template <class R>
  R* dk_first(R* head) const {
    return head;
  }
  template <class R>
  R* dv_first(R* head, int64_t n_first) const {
    return head + n_first * dp;
  }
  template <class R>
  R* dq(R* head, const KeyRange& r) const {
    return head + r.partial;
  }
  template <class R>
  R* dk_second(R* head, const KeyRange& r) const {
    return dq(head, r) + (r.i1 - r.i0) * dp;
  }
  template <class R>
  R* dv_second(R* head, const KeyRange& r) const {
    return dk_second(head, r) + (r.c1 - r.c0) * dp;
  }
};

template <class R>
struct BackwardBuffers {
  int64_t t_stride;
  R *q, *dout, *lse, *delta, *kc, *vc, *kct, *vct, *qf, *doutf, *x, *s, *dp, *g, *w, *kf, *vf;
  static constexpr int64_t kScoreStride = kBackwardColumns + kPanelPad;
  BackwardBuffers(const TensorAttentionProblem& p, const BackwardPlan& plan, Arena& arena) {
    t_stride = transposed_stride(plan.most_columns, sizeof(R));
    q = arena.take<R>(plan.most_queries * plan.dp);
    dout = arena.take<R>(plan.most_queries * plan.dvp);
    lse = arena.take<R>(plan.most_queries);
    delta = arena.take<R>(plan.most_queries);
    kc = arena.take<R>(plan.most_columns * plan.dp);
    vc = arena.take<R>(plan.most_columns * plan.dvp);
    kct = arena.take<R>(p.d * t_stride);
    vct = arena.take<R>(p.dv * t_stride);
    qf = arena.take<R>(kQueryRows * plan.dp);
    doutf = arena.take<R>(kQueryRows * plan.dvp);
    x = arena.take<R>(kQueryRows * plan.dp);
    s = arena.take<R>(kQueryRows * kScoreStride);
    dp = arena.take<R>(kQueryRows * kScoreStride);
    g = arena.take<R>(plan.most_columns * plan.dp);
    w = arena.take<R>(plan.most_columns * plan.dvp);
    kf = arena.take<R>(plan.dp);
    vf = arena.take<R>(plan.dvp);
  }
};

}  // namespace pyloss::cpu
