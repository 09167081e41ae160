// Device code that the row-softmax kernels share: the streaming statistics of a row, its epilogue
// and its gradient. Formulas: common/row_softmax.h; the walk over a row: row_softmax_walk.cuh.
//
// Every step of the arithmetic is a short loop over registers, so that an option costs one branch
// per batch and not one per element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/row_softmax.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {

// Labels that say more than a class.
inline constexpr int kIgnored = -2, kOutOfRange = -3;

// A class index fits in 32 bits (the launchers refuse more than kMaxClasses), which halves the
// registers of the inner loops; every product with a stride is taken in 64 bits.
inline constexpr int64_t kMaxClasses = int64_t(1) << 30;
inline constexpr int kNoClass = 0x7fffffff;

// What a kernel can do; the less it can, the fewer registers it needs and the more threads fit.
enum class Mode {
  kPlain,    // one label a row, linear transform, no extras
  kOptions,  // also MixUp, soft cap, margin, extras, argmax and rank, smoothing at tau = 1
  kSoft,     // also probabilities, smoothing at tau != 1
};

// Threads of a team kernel's block and how many blocks an SM should hold: the registers per thread
// follow from both.
inline constexpr int kLongTeam = 256;
template <class T, Mode M>
inline constexpr int kBlocksPerSm =
    sizeof(T) == 8 ? 1 : (M == Mode::kSoft ? 2 : (M == Mode::kOptions ? 3 : 4));
// Vectors of a batch, and batches under way while one is worked on, as the registers allow: where
// the compiler is not for sm_90 the same numbers would spill a few of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
inline constexpr bool kTight = true;
#else
inline constexpr bool kTight = false;
#endif
template <Mode M, bool kGradient>
inline constexpr int kBatch =
    (M == Mode::kOptions && kGradient) || (M == Mode::kSoft && kTight) ? 1 : 2;
template <Mode M, bool kGradient, bool kTwoWalks>
inline constexpr int kAhead = M == Mode::kPlain     ? (kTwoWalks || kTight ? 1 : 2)
                              : M == Mode::kOptions ? (kGradient ? 2 : 1)
                                                    : (kTight ? 2 : 1);
// Rows that a team takes one after the other: their per-row arithmetic is done once, a lane each.
inline constexpr int kMostRows = kWarp;

// ---- Statistics --------------------------------------------------------------------------------

template <Mode M, class R>
__device__ __forceinline__ R transform(const RowTransform<R>& f, R x) {
  return M != Mode::kPlain && f.cap ? mul_rn(f.post, tanh_fast(f.pre * x)) : mul_rn(f.pre, x);
}

__device__ __forceinline__ int64_t row_offset(const RowSoftmaxProblem& p, const Strides& s,
                                              int64_t row) {
  if (p.inner == 1) return row * s.outer;
  if (p.outer == 1) return row * s.inner;  // no 64-bit division
  return row / p.inner * s.outer + row % p.inner * s.inner;
}

// What a pass over a part of a row has found, the label left out.
template <class R>
struct RowState {
  RowPart<R> part;
  int argmax = kNoClass, rank = 0, first_nan = kNoClass;
};

// A row and what is wanted from it. The label's logit is looked up by itself: plain rows need it at
// their end only, a rank needs it before the row streams by.
template <class R>
struct RowView {
  const RowSoftmaxProblem* p;
  RowTarget<R> t;
  int y, y2;  // the labels, -1 for none (and for one out of range, which no batch may match)
  R zy, zy2;
  int64_t prob_base;  // offset of the row's probabilities
  bool entropy, index, weighted;
  static constexpr DType kReal = sizeof(R) == 8 ? DType::kF64 : DType::kF32;

  __device__ R weight(int c) const {
    return p->weight ? static_cast<const R*>(p->weight)[c] : R(1);
  }
  // The weights of V adjacent classes; those at and beyond `limit` do not exist.
  template <int V>
  __device__ void weights(int c, int limit, R* out) const {
    if (!p->weight) {
#pragma unroll
      for (int e = 0; e < V; ++e) out[e] = R(1);
    } else if (c + V > limit || !load_vectors_of<V>(p->weight, kReal, c, out)) {
#pragma unroll
      for (int e = 0; e < V; ++e) out[e] = c + e < limit ? weight(c + e) : R(0);
    }
  }
  // The coefficients r_c of a soft target of V adjacent classes; 0 beyond `limit`.
  template <int V>
  __device__ void softs(int c, int limit, R* out) const {
    R w[V];
    weights<V>(c, limit, w);
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = R(0);
    if (p->kind == TargetKind::kDense) {
      const int64_t cls = p->target_strides.cls, at = prob_base + int64_t(c) * cls;
      if (cls != 1 || c + V > limit || !load_vectors_of<V>(p->target, p->target_dtype, at, out)) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (c + e < limit) out[e] = load_float<R>(p->target, p->target_dtype, at + e * cls);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      out[e] = c + e < limit ? soft_coefficient(*p, t, c + e, out[e], w[e]) : R(0);
    }
  }
  // The coefficients whose weighted sum of z is taken on the way: w_c of smoothed labels, r_c of
  // probabilities at tau = 1.
  template <Mode M, int V>
  __device__ void streamed(int c, int limit, R* out) const {
    if (M == Mode::kSoft && p->kind == TargetKind::kDense) {
      softs<V>(c, limit, out);
    } else {
      weights<V>(c, limit, out);
    }
  }
};

// Probabilities at tau = 1: the loss is a weighted sum of z, taken with the statistics.
PYLOSS_HD inline bool one_pass_soft(const RowSoftmaxProblem& p) {
  return p.kind == TargetKind::kDense && p.options.tau == 1;
}
// Every other soft target needs the row's normaliser first.
PYLOSS_HD inline bool two_pass_soft(const RowSoftmaxProblem& p) {
  return p.soft() && !one_pass_soft(p);
}

// The view before any logit is read.
template <class R>
__device__ __forceinline__ RowView<R> make_view(const RowSoftmaxProblem& p, const RowTarget<R>& t,
                                                int64_t row, bool extras, bool index) {
  RowView<R> v;
  v.p = &p;
  v.t = t;
  v.y = in_range(t.y, p.classes) ? int(t.y) : -1;
  v.y2 = in_range(t.y2, p.classes) ? int(t.y2) : -1;
  v.zy = v.zy2 = -infinity_<R>();
  v.prob_base = p.kind == TargetKind::kDense ? row_offset(p, p.target_strides, row) : 0;
  v.entropy = extras;
  v.index = index;
  v.weighted = one_pass_soft(p) || (!p.soft() && p.options.smoothing > 0);
  return v;
}

// The labels must be in range.
template <Mode M, class T, class R>
__device__ __forceinline__ void read_labels(const RowTransform<R>& f, const T* x_row,
                                            RowView<R>* v) {
  const int64_t cls = v->p->x_strides.cls;
  if (M != Mode::kPlain && v->p->kind == TargetKind::kDense) return;
  v->zy = transform<M>(f, to_real(x_row[v->y * cls]));
  if (M != Mode::kPlain) v->zy -= R(v->p->options.margin);
  if (M != Mode::kPlain && v->p->kind == TargetKind::kMix) {
    v->zy2 = transform<M>(f, to_real(x_row[v->y2 * cls]));
  }
}

template <Mode M, class R>
__device__ __forceinline__ void rebase(RowPart<R>* part, R m) {
  if (part->m == m) return;
  const R da = finite_floor(part->m) - finite_floor(m), ea = exp_fast(da);
  if (M != Mode::kPlain) {
    part->ez = ea * (part->ez + (ea > 0 ? da : R(0)) * part->rest);
    part->wz += part->w != 0 ? da * part->w : R(0);
  }
  part->rest *= ea;
  part->m = m;
}

// By recursion and not by a loop: the array must stay in registers.
template <int N, class R>
__device__ __forceinline__ R tree_sum(const R* e) {
  if constexpr (N == 1) {
    return e[0];
  } else {
    return tree_sum<N / 2>(e) + tree_sum<N / 2>(e + N / 2);
  }
}

// Turns logits into z, with -inf for classes that are not there.
template <Mode M, int V, int N, class R>
__device__ __forceinline__ void transform_batch(const RowTransform<R>& f, R (&x)[N], int first,
                                                int step, int limit) {
  if (M != Mode::kPlain && f.cap) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = mul_rn(f.post, tanh_fast(f.pre * x[i]));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = mul_rn(f.pre, x[i]);
  }
  if (first + (N / V - 1) * step < limit) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + (i / V) * step >= limit) x[i] = -infinity_<R>();
  }
}

// Adds a batch of z to the state.
template <Mode M, int V, int N, class R>
__device__ __forceinline__ void accumulate(const RowView<R>& v, R (&z)[N], int first, int step,
                                           int limit, RowState<R>* s) {
#pragma unroll
  for (int k = 0; k < N / V; ++k) {
    const int at = v.y - (first + k * step);
    if (unsigned(at) < unsigned(V)) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (at == e) z[k * V + e] = -infinity_<R>();
      }
    }
  }
  R top = z[0];
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmax_(top, z[i]);
  if (M != Mode::kPlain && v.index) {
    int above = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) above += z[i] > v.zy;
    s->rank += above;
    if (top >= s->part.m) {
      int c = kNoClass;
#pragma unroll
      for (int i = N - 1; i >= 0; --i) {
        if (z[i] == top) c = first + (i / V) * step + i % V;
      }
      if (top > s->part.m || c < s->argmax) s->argmax = c;
    }
  }
  rebase<M>(&s->part, fmax_(s->part.m, top));
  const R base = finite_floor(s->part.m);
  if (M != Mode::kPlain && v.weighted) {
    R wz = 0, w = 0;
#pragma unroll
    for (int k = 0; k < N / V; ++k) {
      const int c = first + k * step;
      R r[V];
      v.template streamed<M, V>(c, limit, r);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (c + e >= limit || c + e == v.y) r[e] = R(0);
        wz += r[e] != 0 ? r[e] * (z[k * V + e] - base) : R(0);
        w += r[e];
      }
    }
    s->part.wz += wz;
    s->part.w += w;
  }
  if (M != Mode::kPlain && v.entropy) {
    R ez = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const R u = z[i] - base;
      ez += exp_fast(u) * fmax_(u, R(-1e4));  // 0 * -inf
    }
    s->part.ez += ez;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = exp_fast(z[i] - base);
  s->part.rest += tree_sum<N>(z);
}

// Shared memory of a team's merge, a column a warp. Merges that follow each other take turns with
// two of them: then each needs one barrier only.
inline constexpr int kTeamWarps = kLongTeam / kWarp;
template <class R>
struct TeamSlots {
  R m[kTeamWarps], rest[kTeamWarps], ez[kTeamWarps], wz[kTeamWarps], w[kTeamWarps];
  int argmax[kTeamWarps], rank[kTeamWarps];

  template <Mode M>
  __device__ __forceinline__ void put(int i, const RowState<R>& s) {
    m[i] = s.part.m;
    rest[i] = s.part.rest;
    if constexpr (M != Mode::kPlain) {
      ez[i] = s.part.ez;
      wz[i] = s.part.wz;
      w[i] = s.part.w;
      argmax[i] = s.argmax;
      rank[i] = s.rank;
    }
  }
  template <Mode M>
  __device__ __forceinline__ RowState<R> get(int i) const {
    RowState<R> s;
    s.part.m = m[i];
    s.part.rest = rest[i];
    if constexpr (M != Mode::kPlain) {
      s.part.ez = ez[i];
      s.part.wz = wz[i];
      s.part.w = w[i];
      s.argmax = argmax[i];
      s.rank = rank[i];
    }
    return s;
  }
};

template <Mode M, class R>
__device__ __forceinline__ void warp_merge(const RowView<R>& v, RowState<R>* s) {
  const R m = warp_reduce(s->part.m, MaxOp{});
  if (M != Mode::kPlain && v.index) {
    s->argmax = warp_reduce(s->part.m == m ? s->argmax : kNoClass, MinOp{});
    s->rank = warp_reduce(s->rank, AddOp{});
  }
  rebase<M>(&s->part, m);
  s->part.rest = warp_reduce(s->part.rest, AddOp{});
  if (M != Mode::kPlain) {
    if (v.entropy) s->part.ez = warp_reduce(s->part.ez, AddOp{});
    if (v.weighted) {
      s->part.wz = warp_reduce(s->part.wz, AddOp{});
      s->part.w = warp_reduce(s->part.w, AddOp{});
    }
  }
}

// Adds the state of the next part of a row.
template <class R>
__device__ __forceinline__ void merge_state(RowState<R>* s, const RowState<R>& next, bool index) {
  if (index) {
    if (next.part.m > s->part.m) s->argmax = kNoClass;
    if (next.part.m >= s->part.m && next.argmax < s->argmax) s->argmax = next.argmax;
    s->rank += next.rank;
    if (next.first_nan < s->first_nan) s->first_nan = next.first_nan;
  }
  s->part = merge(s->part, next.part);
}

// Every thread of the team's first warp ends with the state of all of them; of the others, too,
// with `all`.
template <Mode M, class R>
__device__ __forceinline__ void team_merge(const RowView<R>& v, RowState<R>* s, TeamSlots<R>* slots,
                                           bool all) {
  warp_merge<M>(v, s);
  if (blockDim.x <= kWarp) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) slots->template put<M>(warp, *s);
  __syncthreads();
  if (warp > 0 && !all) return;
  *s = RowState<R>{};
  if (lane < int(blockDim.x) / kWarp) *s = slots->template get<M>(lane);
  warp_merge<M>(v, s);
}

// ---- Epilogue ----------------------------------------------------------------------------------

template <class R>
struct SoftSums {
  R mass = 0, loss = 0;  // sum r p^(tau-1), sum r f(nll)
};

// A finished row: everything that the outputs and the gradient are made of.
template <class R>
struct RowResult {
  RowTerms<R> terms;
  R rest, wz, ez;
  SoftSums<R> soft;
  int argmax, rank;
};

// Completes the merged state with the label's own share. Soft targets at tau != 1 still lack
// `soft`.
template <Mode M, class R>
__device__ __forceinline__ RowResult<R> finish_state(const RowView<R>& v, RowState<R> s) {
  const RowSoftmaxProblem& p = *v.p;
  RowResult<R> r;
  if (v.zy > s.part.m) {
    rebase<M>(&s.part, v.zy);
    s.argmax = v.y;
  } else if (v.zy == s.part.m && v.y >= 0 && v.y < s.argmax) {
    s.argmax = v.y;
  }
  r.rest = s.part.rest;
  r.terms = row_terms<M == Mode::kPlain>(p, v.t, s.part.m, r.rest, v.zy, v.zy2);
  r.wz = s.part.wz;
  r.ez = s.part.ez;
  if (p.kind != TargetKind::kDense) {
    const R u = v.zy - r.terms.m;
    if (v.entropy) r.ez += exp_(u) * fmax_(u, R(-1e4));
    if (v.weighted) {
      const R w = v.weight(v.y);
      if (w != 0) r.wz += w * u;
    }
  } else if (v.weighted) {
    r.soft.mass = s.part.w;
    r.soft.loss = s.part.w * r.terms.log_sum - r.wz;
  }
  r.argmax = s.first_nan != kNoClass ? s.first_nan : s.argmax;
  r.rank = p.kind == TargetKind::kDense ? 0 : s.rank;
  return r;
}

// The result of a row with a label out of range: NaN everywhere.
template <class R>
__device__ __forceinline__ RowResult<R> poisoned_result(RowView<R>* v) {
  RowResult<R> r;
  v->zy = v->zy2 = nan_<R>();
  r.rest = r.wz = r.ez = r.soft.mass = r.soft.loss = nan_<R>();
  r.terms = row_terms<true>(*v->p, v->t, nan_<R>(), nan_<R>(), v->zy, v->zy2);
  r.argmax = -1;
  r.rank = 0;
  return r;
}

template <class R>
__device__ __forceinline__ void store_result(const RowSoftmaxForward& f, int64_t row,
                                             const RowView<R>& v, const RowResult<R>& r) {
  const R loss = store_row(*v.p, f, row, v.t, r.terms, r.rest, v.zy, v.zy2, r.wz, r.ez, r.soft.loss,
                           r.soft.mass, r.argmax, r.rank);
  if (v.p->options.reduction == Reduction::kNone) store_float(f.loss, f.loss_dtype, row, loss);
}

template <class R>
__device__ __forceinline__ void store_ignored(const RowSoftmaxProblem& p,
                                              const RowSoftmaxForward& f, int64_t row) {
  store_ignored_row<R>(p, f, row);
  if (p.options.reduction == Reduction::kNone) store_float(f.loss, f.loss_dtype, row, R(0));
}

// The numbers of `norm` where the host knows them: no mean over rows that must be counted, and no
// sum of class weights that matters.
template <class R>
struct KnownNorm {
  bool known;
  R value[kNormCount];

  explicit KnownNorm(const RowSoftmaxProblem& p) {
    const RowSoftmaxOptions& o = p.options;
    known = !p.weight && (o.reduction != Reduction::kMean || o.num_items > 0);
    if (known) finish_norm(p, 0, 0, double(p.classes), value);
  }
  // Every thread of the block calls this; `shared` then stands for f->norm in the block, and block
  // 0 writes what later kernels read.
  __device__ __forceinline__ void use(R* shared, RowSoftmaxForward* f) const {
    if (!known) return;
    const bool writes = blockIdx.x == 0 && blockIdx.y == 0;
    if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
#pragma unroll
      for (int i = 0; i < kNormCount; ++i) {
        shared[i] = value[i];
        if (writes) static_cast<R*>(f->norm)[i] = value[i];
      }
    }
    __syncthreads();
    f->norm = shared;
  }
};

// Outputs of a row whose statistics are complete, by one thread.
template <Mode M, class T>
__device__ __forceinline__ void finish_row(const RowSoftmaxProblem& p,
                                           const RowTransform<RealOf<T>>& transform,
                                           RowSoftmaxForward f, int64_t row,
                                           const RowState<RealOf<T>>& s) {
  using R = RealOf<T>;
  if (M == Mode::kPlain) {
    f.extras = nullptr;
    f.index = nullptr;
  }
  RowTarget<R> t;
  if (!load_target(p, row, &t)) return store_ignored<R>(p, f, row);
  RowView<R> v = make_view(p, t, row, f.extras != nullptr, f.index != nullptr);
  if (target_in_range(p, t)) {
    read_labels<M>(transform, static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row), &v);
    store_result(f, row, v, finish_state<M>(v, s));
  } else {
    store_result(f, row, v, poisoned_result(&v));
  }
}

// Adds a batch of z to the sums of a soft target, once the row's normaliser is known.
template <int V, int N, class R>
__device__ __forceinline__ void accumulate_soft(const RowView<R>& v, const RowTerms<R>& terms,
                                                const R (&z)[N], int first, int step, int limit,
                                                SoftSums<R>* sums) {
  const R a = R(1 - v.p->options.tau), m = terms.m, log_sum = terms.log_sum;
#pragma unroll
  for (int k = 0; k < N / V; ++k) {
    R r[V];
    v.template softs<V>(first + k * step, limit, r);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (r[e] == 0) continue;
      // exp for the mass, not expm1 + 1, which has no digits left where p^(tau-1) is small.
      const R x = a * (log_sum - (z[k * V + e] - m));
      sums->mass += r[e] * exp_(x);
      sums->loss += r[e] * expm1_(x) / a;
    }
  }
}

// ---- Gradient ----------------------------------------------------------------------------------

// Per-row constants of the gradient.
template <class R>
struct GradRow {
  R m, log_sum, label;  // `label` = d(out) of the label's own entry, before spread and soft
  RowCoeffs<R> c;
};

template <Mode M, class R>
__device__ __forceinline__ GradRow<R> make_grad_row(const RowTransform<R>& f,
                                                    const RowTerms<R>& terms, const RowCoeffs<R>& c,
                                                    R zy) {
  const R u = zy - terms.m;
  const R label = exp_(u) * (c.label_a + c.b * fmax_(u, R(-1e4))) - c.label;
  GradRow<R> g{terms.m, terms.log_sum, label, c};
  if (M == Mode::kPlain) {  // the slope of the transform, once a row
    g.c.a *= f.pre;
    g.label *= f.pre;
  }
  return g;
}

template <class R>
__device__ __forceinline__ RowUpstream<R> unit_upstream(const void* norm, R token) {
  return first_upstream(static_cast<const R*>(norm), token);
}

// Replaces a batch of z by the gradient with respect to the logits.
template <Mode M, int V, int N, class R>
__device__ __forceinline__ void gradient_batch(const RowView<R>& v, const RowTransform<R>& f,
                                               const GradRow<R>& g, R (&z)[N], int first, int step,
                                               int limit) {
  R d[N];
  if (M != Mode::kPlain && g.c.b != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const R u = z[i] - g.m;
      d[i] = exp_fast(u) * (g.c.a + g.c.b * fmax_(u, R(-1e4)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = exp_fast(z[i] - g.m) * g.c.a;
  }
#pragma unroll
  for (int k = 0; k < N / V; ++k) {
    const int at = v.y - (first + k * step), at2 = v.y2 - (first + k * step);
    if (unsigned(at) < unsigned(V)) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (at == e) d[k * V + e] = g.label;
      }
    }
    if (M != Mode::kPlain && unsigned(at2) < unsigned(V)) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (at2 == e) d[k * V + e] -= g.c.label2;
      }
    }
  }
  if (M != Mode::kPlain && g.c.spread != 0) {
#pragma unroll
    for (int k = 0; k < N / V; ++k) {
      R w[V];
      v.template weights<V>(first + k * step, limit, w);
#pragma unroll
      for (int e = 0; e < V; ++e) d[k * V + e] -= g.c.spread * w[e];
    }
  }
  if (M == Mode::kSoft && g.c.soft != 0) {
    const R a = R(1 - v.p->options.tau);
#pragma unroll
    for (int k = 0; k < N / V; ++k) {
      R r[V];
      v.template softs<V>(first + k * step, limit, r);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const R u = z[k * V + e] - g.m;
        const R power = a == 0 ? R(1) : exp_fast(a * (g.log_sum - u));
        if (r[e] != 0) d[k * V + e] -= g.c.soft * r[e] * power;
      }
    }
  }
  if (M == Mode::kPlain) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = d[i];
  } else if (f.cap) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = f.slope(z[i]) * d[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = f.pre * d[i];
  }
}

// Writes a batch; `out_row` points at class 0.
template <class T, int V, int N, class R>
__device__ __forceinline__ void store_batch(T* out_row, int64_t cls, const R (&x)[N], int first,
                                            int step, int limit) {
#pragma unroll
  for (int k = 0; k < N / V; ++k) {
    const int c = first + k * step;
    if (c >= limit) continue;
    if constexpr (V > 1) {
      *reinterpret_cast<uint4*>(out_row + c) = pack<T>(x + k * V);
    } else {
      out_row[int64_t(c) * cls] = from_real<T>(x[k]);
    }
  }
}

// The saved statistics of a row. A label out of range leaves NaN in all of them, hence in the whole
// gradient row.
template <Mode M, class R>
__device__ __forceinline__ RowTerms<R> load_terms(const RowSoftmaxProblem& p, const void* stats,
                                                  int64_t row, const RowTarget<R>& t, R* zy,
                                                  R* soft_mass) {
  const int64_t n = p.rows();
  const R* s = static_cast<const R*>(stats) + row;
  const bool more = p.kind == TargetKind::kMix || p.soft();
  const R zy2 = more ? s[kStatTarget2 * n] : R(0);
  *zy = s[kStatTarget * n];
  *soft_mass = more ? s[kStatSoft * n] : R(0);
  return row_terms<M == Mode::kPlain>(p, t, s[kStatMax * n], s[kStatRest * n], *zy, zy2);
}

}  // namespace pyloss::cuda
