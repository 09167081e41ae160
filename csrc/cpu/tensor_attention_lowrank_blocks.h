// The tasks of near-linear tensor attention without causality or windows, for one instruction set
// (per_instruction_set.h).
//
// A block is kTokens rows. Its monomials lie monomial by row, so that one vector multiplication
// makes a monomial of as many rows as it has lanes; rows past the end and masked keys are zero, the
// constant monomial too. A tile of kMonomials is made, used and overwritten:
//
//   sums      A[a,c] += sum_t U[a,t] v[t,c],  z[a] += sum_t U[a,t] weight[t]
//   results   N^T[c,t] += sum_a W[a,c] U[a,t]
//   gradients dU[a,t] = sum_c W[a,c] G^T[c,t], passed on to the variables from the highest degree
//             down: d parent += d child * variable, d variable += d child * parent
#include "cpu/tensor_attention_gemm.h"

template <class T>
const T* at(const void* p, const int64_t* strides, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(p) + b * strides[0] + h * strides[1] + n * strides[2];
}

// to[l][t] = from[t][l] for n rows, zero for the rest.
template <class R>
void load_columns(R* to, const R* from, int64_t stride, int64_t n, int64_t width) {
  constexpr int64_t kPart = 16;  // rows whose lines stay in cache while they are read
  for (int64_t t0 = 0; t0 < n; t0 += kPart) {
    const int64_t t1 = std::min(n, t0 + kPart);
    int64_t l = 0;
    for (; l + 4 <= width; l += 4) {
      int64_t t = t0;
      for (; t + 4 <= t1; t += 4) {
        transpose_4(to + l * kTokens + t, kTokens, from + t * stride + l, stride);
      }
      for (; t < t1; ++t) {
        for (int i = 0; i < 4; ++i) to[(l + i) * kTokens + t] = from[t * stride + l + i];
      }
    }
    for (; l < width; ++l) {
      for (int64_t t = t0; t < t1; ++t) to[l * kTokens + t] = from[t * stride + l];
    }
  }
  if (n == kTokens) return;
  for (int64_t l = 0; l < width; ++l) {
    for (int64_t t = n; t < kTokens; ++t) to[l * kTokens + t] = R(0);
  }
}

// to[t][l] = from[l][t] for n rows.
template <class R>
void store_rows(R* to, int64_t stride, const R* from, int64_t n, int64_t width) {
  constexpr int64_t kPart = 16;
  for (int64_t t0 = 0; t0 < n; t0 += kPart) {
    const int64_t t1 = std::min(n, t0 + kPart);
    int64_t l = 0;
    for (; l + 4 <= width; l += 4) {
      int64_t t = t0;
      for (; t + 4 <= t1; t += 4) {
        transpose_4(to + t * stride + l, stride, from + l * kTokens + t, kTokens);
      }
      for (; t < t1; ++t) {
        for (int i = 0; i < 4; ++i) to[t * stride + l + i] = from[(l + i) * kTokens + t];
      }
    }
    for (; l < width; ++l) {
      for (int64_t t = t0; t < t1; ++t) to[t * stride + l] = from[l * kTokens + t];
    }
  }
}

// Asks for rows [begin, begin + kTokens) before `end`: blocks are about a page, where the
// processor's own prefetching starts again.
template <class R>
void prefetch_rows(const R* p, int64_t stride, int64_t begin, int64_t end, int64_t width) {
  for (int64_t t = begin; t < std::min(end, begin + kTokens); ++t) {
    prefetch(p + t * stride, width * int64_t(sizeof(R)));
  }
}

// ---- monomials
// -----------------------------------------------------------------------------------

// Monomials [a, end) of degree 2 or more to `to`.
template <class R>
void make_monomials(const Monomials& mono, const R* low, int64_t a, int64_t end, R* to) {
  constexpr int kLanes = Vec<R>::kLanes;
  while (a < end) {
    const int64_t n = mono.run(a, end);
    const R* parent = low + mono.parent[a] * kTokens;
    const R* x = low + (1 + mono.var[a]) * kTokens;
    for (int64_t t = 0; t < kTokens; t += kLanes) {
      const typename Vec<R>::V factor = load(parent + t);
      for (int64_t i = 0; i < n; ++i)
        store(to + i * kTokens + t, factor * load(x + i * kTokens + t));
    }
    to += n * kTokens;
    a += n;
  }
}

// The monomials below the highest degree; rows 0 .. d are there.
template <class R>
void complete_low(const Monomials& mono, R* low) {
  if (mono.low > mono.d + 1) {
    make_monomials(mono, low, mono.d + 1, mono.low, low + (mono.d + 1) * kTokens);
  }
}

// Passes the gradients of monomials [a, end) of one degree >= 2 on to their parents and variables.
template <class R>
void spread_gradient(const Monomials& mono, const R* low, int64_t a, int64_t end, const R* gradient,
                     R* low_gradient) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  while (a < end) {
    const int64_t n = mono.run(a, end), at_parent = mono.parent[a] * kTokens;
    const int64_t at_x = (1 + mono.var[a]) * kTokens;
    for (int64_t t = 0; t < kTokens; t += kLanes) {
      const V parent = load(low + at_parent + t);
      V sum{};
      for (int64_t i = 0; i < n; ++i) {
        const V g = load(gradient + i * kTokens + t);
        R* dx = low_gradient + at_x + i * kTokens + t;
        sum += g * load(low + at_x + i * kTokens + t);
        store(dx, load(dx) + g * parent);
      }
      // Last: the parent may be one of the variables.
      R* dp = low_gradient + at_parent + t;
      store(dp, load(dp) + sum);
    }
    gradient += n * kTokens;
    a += n;
  }
}

// fn(a, end, U) tile by tile, for the monomials [begin, end).
template <class R, class Fn>
void each_tile(const Monomials& mono, const R* low, R* tile, int64_t begin, int64_t end, Fn&& fn) {
  for (int64_t a = begin; a < end;) {
    const bool is_low = a < mono.low;
    const int64_t z = std::min({end, a + kMonomials, is_low ? mono.low : end});
    if (!is_low) make_monomials(mono, low, a, z, tile);
    fn(a, z, is_low ? low + a * kTokens : tile);
    a = z;
  }
}

// ---- blocks
// --------------------------------------------------------------------------------------

struct Keys {
  const LowrankProblem& p;
  const LowrankAxis& axis;
  int64_t b, g;

  const uint8_t* kept() const {
    return axis.mask ? axis.mask + b * axis.mask_strides[0] + g * axis.mask_strides[1] : nullptr;
  }
  // `weight`: 1 for a key that counts.
  template <class R>
  int64_t load(int64_t block, R* low, R* weight) const {
    const int64_t j0 = block * kTokens, n = std::min(kTokens, axis.band.n - j0);
    const R* from = at<R>(axis.k, axis.k_strides, b, g, 0);
    prefetch_rows(from, axis.k_strides[2], j0 + kTokens, axis.band.n, p.d);
    load_columns(low + kTokens, from + j0 * axis.k_strides[2], axis.k_strides[2], n, p.d);
    const uint8_t* keep = kept();
    for (int64_t t = 0; t < kTokens; ++t) weight[t] = t < n && !(keep && !keep[j0 + t]) ? 1 : 0;
    if (keep) {
      for (int64_t l = 1; l <= p.d; ++l) {
        for (int64_t t = 0; t < n; ++t) low[l * kTokens + t] = weight[t] ? low[l * kTokens + t] : 0;
      }
    }
    std::copy(weight, weight + kTokens, low);
    return n;
  }
};

template <class R>
void load_values(const Keys& keys, int64_t block, const R* weight, R* v, int64_t dvp) {
  const int64_t j0 = block * kTokens, n = std::min(kTokens, keys.axis.band.n - j0);
  const int64_t stride = keys.axis.v_strides[2];
  const R* from = at<R>(keys.axis.v, keys.axis.v_strides, keys.b, keys.g, j0);
  prefetch_rows(from, stride, kTokens, keys.axis.band.n - j0, keys.p.dv);
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t width = t < n && weight[t] ? keys.p.dv : 0;
    std::copy(from + (width ? t * stride : 0), from + (width ? t * stride : 0) + width,
              v + t * dvp);
    std::fill(v + t * dvp + width, v + (t + 1) * dvp, R(0));
  }
}

template <class R>
int64_t load_queries(const LowrankProblem& p, int64_t b, int64_t h, int64_t block, R* low) {
  const int64_t i0 = block * kTokens, n = std::min(kTokens, p.n_q - i0);
  const R* from = at<R>(p.q, p.q_strides, b, h, 0);
  prefetch_rows(from, p.q_strides[2], i0 + kTokens, p.n_q, p.d);
  load_columns(low + kTokens, from + i0 * p.q_strides[2], p.q_strides[2], n, p.d);
  for (int64_t t = 0; t < kTokens; ++t) low[t] = t < n ? 1 : 0;
  return n;
}

// dN = dO / y and dy = (dlse - <dO, out>) / y of one query; zero where it saw nothing.
template <class R>
PYLOSS_INLINE R cotangent(const LowrankProblem& p, const LowrankBackward& grads, int64_t b,
                          int64_t h, int64_t i, R* dn) {
  const int64_t row = (b * p.heads + h) * p.n_q + i;
  const R y = static_cast<const R*>(grads.y)[row];
  const R* dout = at<R>(grads.dout, grads.dout_strides, b, h, i);
  const R* out = static_cast<const R*>(grads.out) + row * p.dv;
  if (y == R(0)) {
    std::fill(dn, dn + p.dv, R(0));
    return R(0);
  }
  const R inverse = R(1) / y;
  R dot = grads.dlse ? static_cast<const R*>(grads.dlse)[row] : R(0);
  for (int64_t c = 0; c < p.dv; ++c) {
    dn[c] = dout[c] * inverse;
    dot -= dout[c] * out[c];
  }
  return dot * inverse;
}

// ---- sums
// ----------------------------------------------------------------------------------------

// z[a][lane] += U[a][t] weight[t]
template <class R>
void add_weights(const R* u, int64_t rows, const R* weight, R* z) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  for (int64_t a = 0; a < rows; ++a) {
    for (int64_t lane = 0; lane < kLanePad; lane += kLanes) {
      V sum = load(z + a * kLanePad + lane);
      for (int64_t t = lane; t < kTokens; t += kLanePad) {
        sum += load(u + a * kTokens + t) * load(weight + t);
      }
      store(z + a * kLanePad + lane, sum);
    }
  }
}

// Range `range` and blocks [begin, end) into `partial`; load_block(block, w) fills rows 0 .. d of
// w.low, w.v and w.weight.
template <class R, class LoadBlock>
void sum_task(const Monomials& mono, const SumPlan& plan, int64_t range, int64_t begin, int64_t end,
              const SumBuffers<R>& w, R* partial, LoadBlock&& load_block) {
  const int64_t a0 = plan.begin(range), a1 = plan.begin(range + 1), rows = a1 - a0;
  R *sums = partial + a0 * plan.dvp, *weights = partial + plan.count * plan.dvp + a0 * kLanePad;
  std::fill(sums, sums + rows * plan.dvp, R(0));
  std::fill(weights, weights + rows * kLanePad, R(0));
  for (int64_t first = begin; first < end; first += kFold) {
    std::fill(w.sums, w.sums + rows * plan.dvp, R(0));
    std::fill(w.weights, w.weights + rows * kLanePad, R(0));
    for (int64_t block = first; block < std::min(end, first + kFold); ++block) {
      load_block(block, w);
      complete_low(mono, w.low);
      each_tile(mono, w.low, w.tile, a0, a1, [&](int64_t a, int64_t z, const R* u) {
        product<R, false, End::kAdd>(z - a, plan.dv, kTokens, u, kTokens, w.v, plan.dvp,
                                     w.sums + (a - a0) * plan.dvp, plan.dvp);
        add_weights(u, z - a, w.weight, w.weights + (a - a0) * kLanePad);
      });
    }
    for (int64_t i = 0; i < rows * plan.dvp; ++i) sums[i] += w.sums[i];
    for (int64_t i = 0; i < rows * kLanePad; ++i) weights[i] += w.weights[i];
  }
}

// The chunk of `task`, in its source's blocks.
struct Piece {
  int64_t source, range, chunk;
  Piece(const SumPlan& plan, int64_t task)
      : source(task / (plan.ranges * plan.chunks)),
        range(task / plan.chunks % plan.ranges),
        chunk(task % plan.chunks) {}
};

template <class R>
void key_sums_task(const LowrankProblem& p, const Monomials& mono, const SumPlan& plan,
                   int64_t task, void* scratch, void* partials) {
  Arena arena(scratch);
  const SumBuffers<R> w(mono, plan, arena);
  const Piece piece(plan, task);
  const int64_t m = int64_t(p.axes.size()), head = piece.source / m;
  const Keys keys{p, p.axes[piece.source % m], head / p.kv_heads, head % p.kv_heads};
  const int64_t blocks = blocks_of(keys.axis.band.n);
  sum_task(mono, plan, piece.range, blocks * piece.chunk / plan.chunks,
           blocks * (piece.chunk + 1) / plan.chunks, w,
           static_cast<R*>(partials) + (piece.source * plan.chunks + piece.chunk) * plan.partial(),
           [&](int64_t block, const SumBuffers<R>& to) {
             keys.load(block, to.low, to.weight);
             load_values(keys, block, to.weight, to.v, plan.dvp);
           });
}

// E = U(q)^T [dN | dy], over the queries of all heads of a group.
template <class R>
void query_sums_task(const LowrankProblem& p, const LowrankBackward& grads, const Monomials& mono,
                     const SumPlan& plan, int64_t task, void* scratch, void* partials) {
  Arena arena(scratch);
  const SumBuffers<R> w(mono, plan, arena);
  const Piece piece(plan, task);
  const int64_t b = piece.source / p.kv_heads, g = piece.source % p.kv_heads;
  const int64_t per_head = blocks_of(p.n_q), blocks = per_head * p.group();
  sum_task(mono, plan, piece.range, blocks * piece.chunk / plan.chunks,
           blocks * (piece.chunk + 1) / plan.chunks, w,
           static_cast<R*>(partials) + (piece.source * plan.chunks + piece.chunk) * plan.partial(),
           [&](int64_t at, const SumBuffers<R>& to) {
             const int64_t h = g * p.group() + at / per_head, block = at % per_head;
             const int64_t n = load_queries(p, b, h, block, to.low);
             for (int64_t t = 0; t < kTokens; ++t) {
               R* v = to.v + t * plan.dvp;
               const int64_t filled = t < n ? p.dv : 0;
               to.weight[t] = t < n ? cotangent(p, grads, b, h, block * kTokens + t, v) : R(0);
               std::fill(v + filled, v + plan.dvp, R(0));
             }
           });
}

// ---- passes over rows
// ----------------------------------------------------------------------------

// result[c][t] += sum_a weights[a][c] U[a][t]
template <class R>
void add_results(const R* weights, int64_t width, int64_t a, int64_t z, const R* u, R* result,
                 int64_t rows) {
  product<R, true, End::kAdd>(rows, kTokens, z - a, weights + a * width, width, u, kTokens, result,
                              kTokens);
}

// Degree 0 has no monomial that writes the variables' gradients.
template <class R>
void clear_variables(const Monomials& mono, R* low_gradient) {
  std::fill(low_gradient + mono.low * kTokens, low_gradient + mono.low_rows() * kTokens, R(0));
}

// After all tiles: rows 1 .. d become the gradients of the variables.
template <class R>
void finish_gradient(const Monomials& mono, const R* low, R* low_gradient) {
  for (int64_t t = int64_t(mono.start.size()) - 3; t >= 2; --t) {
    spread_gradient(mono, low, mono.start[t], mono.start[t + 1],
                    low_gradient + mono.start[t] * kTokens, low_gradient);
  }
}

template <class R>
void gradient_tile(const Monomials& mono, const R* weights, int64_t width, int64_t a, int64_t z,
                   const RowBuffers<R>& w) {
  const bool is_low = a < mono.low;
  R* to = is_low ? w.low_gradient + a * kTokens : w.gradient;
  product<R, false, End::kStore>(z - a, kTokens, width, weights + a * width, width, w.side, kTokens,
                                 to, kTokens);
  if (!is_low) spread_gradient(mono, w.low, a, z, w.gradient, w.low_gradient);
}

// Blocks [begin, end) of the queries of one head.
template <class R>
int query_task(const LowrankProblem& p, const LowrankForward& f, const Monomials& mono,
               int64_t task, const void* weights, void* scratch) {
  Arena arena(scratch);
  const RowBuffers<R> w(mono, p.dv, false, arena);
  const int64_t blocks = blocks_of(p.n_q), tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  const int64_t head = task / tasks, b = head / p.heads, h = head % p.heads;
  const int64_t kv = b * p.kv_heads + h / p.group(), width = p.dv + 1;
  const R* of_head = static_cast<const R*>(weights) + kv * mono.count * width;
  bool sees = true;  // the first state counts the keys
  for (const void* state : f.states) {
    sees = sees && static_cast<const R*>(state)[kv * mono.count * width + p.dv] != R(0);
  }
  const int64_t begin = task % tasks * kTaskBlocks, end = std::min(blocks, begin + kTaskBlocks);
  int flags = 0;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = load_queries(p, b, h, block, w.low);
    complete_low(mono, w.low);
    std::fill(w.result, w.result + width * kTokens, R(0));
    each_tile(mono, w.low, w.tile, 0, mono.count, [&](int64_t a, int64_t z, const R* u) {
      add_results(of_head, width, a, z, u, w.result, width);
    });
    const int64_t row = head * p.n_q + block * kTokens;
    R *y = w.result + p.dv * kTokens, inverse[kTokens] = {};
    for (int64_t t = 0; t < n; ++t) {
      static_cast<R*>(f.y)[row + t] = sees ? y[t] : R(0);
      static_cast<R*>(f.lse)[row + t] = sees ? log_(y[t]) + R(p.centre) : -infinity_<R>();
      inverse[t] = sees ? R(1) / y[t] : R(0);
      if (sees) flags |= flags_of(y[t]);
    }
    for (int64_t c = 0; c < p.dv; ++c) {
      for (int64_t t = 0; t < kTokens; ++t) w.result[c * kTokens + t] *= inverse[t];
    }
    store_rows(static_cast<R*>(f.out) + row * p.dv, p.dv, w.result, n, p.dv);
  }
  return flags;
}

// dq = the variables' gradients of dU = [dN | dy] W^T.
template <class R>
void query_gradient_task(const LowrankProblem& p, const LowrankBackward& grads,
                         const Monomials& mono, int64_t task, const void* weights, void* scratch) {
  Arena arena(scratch);
  const RowBuffers<R> w(mono, p.dv, true, arena);
  const int64_t blocks = blocks_of(p.n_q), tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  const int64_t head = task / tasks, b = head / p.heads, h = head % p.heads;
  const int64_t kv = b * p.kv_heads + h / p.group(), width = p.dv + 1;
  const R* of_head = static_cast<const R*>(weights) + kv * mono.count * width;
  const int64_t begin = task % tasks * kTaskBlocks, end = std::min(blocks, begin + kTaskBlocks);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i0 = block * kTokens, n = load_queries(p, b, h, block, w.low);
    complete_low(mono, w.low);
    // [dN | dy] row by row into `result`, then monomial by row.
    for (int64_t t = 0; t < n; ++t) {
      R* row = w.result + t * width;
      row[p.dv] = cotangent(p, grads, b, h, i0 + t, row);
    }
    load_columns(w.side, w.result, width, n, width);
    clear_variables(mono, w.low_gradient);
    for (int64_t a = 0; a < mono.count;) {
      const int64_t z =
          std::min({mono.count, a + kMonomials, a < mono.low ? mono.low : mono.count});
      gradient_tile(mono, of_head, width, a, z, w);
      a = z;
    }
    finish_gradient(mono, w.low, w.low_gradient);
    store_rows(static_cast<R*>(grads.dq) + (head * p.n_q + i0) * p.d, p.d, w.low_gradient + kTokens,
               n, p.d);
  }
}

// dv = U dA, and dk = the variables' gradients of dU = [v | 1] dA^T, of one axis.
template <class R>
void key_gradient_task(const LowrankProblem& p, const LowrankBackward& grads, const Monomials& mono,
                       int64_t x, int64_t task, const void* state_gradients, void* scratch) {
  Arena arena(scratch);
  const RowBuffers<R> w(mono, p.dv, true, arena);
  const LowrankAxis& axis = p.axes[x];
  const int64_t blocks = blocks_of(axis.band.n), tasks = (blocks + kTaskBlocks - 1) / kTaskBlocks;
  const int64_t head = task / tasks, width = p.dv + 1;
  const Keys keys{p, axis, head / p.kv_heads, head % p.kv_heads};
  const R* of_head = static_cast<const R*>(state_gradients) + head * mono.count * width;
  const int64_t begin = task % tasks * kTaskBlocks, end = std::min(blocks, begin + kTaskBlocks);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t j0 = block * kTokens;
    R weight[kTokens];
    const int64_t n = keys.load(block, w.low, weight);
    complete_low(mono, w.low);
    if (grads.dk[x]) {
      load_columns(w.side, at<R>(axis.v, axis.v_strides, keys.b, keys.g, j0), axis.v_strides[2], n,
                   p.dv);
      if (axis.mask) {
        for (int64_t c = 0; c < p.dv; ++c) {
          for (int64_t t = 0; t < n; ++t) {
            w.side[c * kTokens + t] = weight[t] ? w.side[c * kTokens + t] : R(0);
          }
        }
      }
      std::copy(weight, weight + kTokens, w.side + p.dv * kTokens);
      clear_variables(mono, w.low_gradient);
    }
    std::fill(w.result, w.result + width * kTokens, R(0));
    each_tile(mono, w.low, w.tile, 0, mono.count, [&](int64_t a, int64_t z, const R* u) {
      if (grads.dv[x]) add_results(of_head, width, a, z, u, w.result, p.dv);
      if (grads.dk[x]) gradient_tile(mono, of_head, width, a, z, w);
    });
    if (grads.dv[x]) {
      store_rows(static_cast<R*>(grads.dv[x]) + (head * axis.band.n + j0) * p.dv, p.dv, w.result, n,
                 p.dv);
    }
    if (grads.dk[x]) {
      finish_gradient(mono, w.low, w.low_gradient);
      store_rows(static_cast<R*>(grads.dk[x]) + (head * axis.band.n + j0) * p.d, p.d,
                 w.low_gradient + kTokens, n, p.d);
    }
  }
}
