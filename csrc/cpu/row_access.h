// Where the rows of a problem lie, how calls are cut into parallel ranges, and what a call does
// once, before and after its rows. Shared by the contiguous and the strided kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/row_softmax.h"
#include "cpu/memory.h"

namespace pyloss::cpu {

template <class V>
inline V* element(V* base, DType t, const Strides& s, int64_t inner, int64_t row, int64_t cls) {
  using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
  const int64_t at = (row / inner) * s.outer + (row % inner) * s.inner + cls * s.cls;
  return static_cast<Byte*>(base) + at * dtype_size(t);
}

// Below this many elements a call is over sooner than a second thread has woken up.
inline constexpr int64_t kSerialElements = 64 * 1024;
// Elements of one parallel range: long against the 1 us that claiming it may cost.
inline constexpr int64_t kRangeElements = 32 * 1024;

inline int useful_threads(int64_t elements, int threads) {
  return elements < kSerialElements ? 1 : threads;
}
inline int64_t rows_per_range(int64_t classes) {
  return std::max<int64_t>(1, kRangeElements / std::max<int64_t>(classes, 1));
}

// The same for rows that are written to new memory. Threads that touch one huge page for the first
// time together both clear one, and one of the two is thrown away: so each gets two to itself, if
// there are ranges enough for all.
inline int64_t rows_per_range(const RowSoftmaxProblem& p, int threads) {
  constexpr int64_t kBytes = int64_t(4) << 20;
  const int64_t row = std::max<int64_t>(p.classes * dtype_size(p.dtype), 1);
  const int64_t some = rows_per_range(p.classes);
  return p.rows() * row < 4 * threads * kBytes ? some : std::max(some, kBytes / row);
}

// Streaming pays when the output does not stay in the caches anyway; it must not be the input. What
// the third level holds for one process is not known: sysconf() may name that of the whole package.
inline bool should_stream(const RowSoftmaxProblem& p, const void* out) {
  return out != p.x && p.rows() * p.classes * dtype_size(p.dtype) > 12 * l2_cache_bytes();
}

// The cotangents of a gradient written in the forward.
template <class R>
inline RowUpstream<R> unit_upstream(const RowSoftmaxForward& f, R token) {
  return first_upstream(static_cast<const R*>(f.norm), token);
}

// Checks the labels and fills `norm`.
template <class R>
void prepare_norm(const RowSoftmaxProblem& p, R* norm);

// Sums the rows' losses in a fixed order, or converts them one by one.
template <class R>
void finish_loss(const RowSoftmaxProblem& p, const RowSoftmaxForward& f);

// A finished row.
template <class R>
struct RowResult {
  RowTarget<R> target;
  RowTerms<R> terms;
  R rest, zy, zy2;
  R wz, soft_loss, soft_mass, ez;
  int64_t argmax, rank;
};
template <class R>
inline void store_result(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int64_t row,
                         const RowResult<R>& r) {
  store_row(p, f, row, r.target, r.terms, r.rest, r.zy, r.zy2, r.wz, r.ez, r.soft_loss, r.soft_mass,
            r.argmax, r.rank);
}

// The saved statistics of a row, as the backward passes need them.
template <class R>
RowTerms<R> load_terms(const RowSoftmaxProblem& p, const void* stats, int64_t row,
                       const RowTarget<R>& t, R* zy, R* zy2, R* soft_mass);

// d(out) of the label's own entry, before the soft-target part and the chain factor.
template <class R>
inline R label_entry(R m, const RowCoeffs<R>& c, R zy, R wy) {
  if (c.label_a == 0 && c.b == 0) return -c.label - c.spread * wy;
  const R u = zy - m;
  const R bounded = u < R(-1e4) ? R(-1e4) : u;
  return exp_(u) * (c.label_a + c.b * bounded) - c.label - c.spread * wy;
}

}  // namespace pyloss::cpu
