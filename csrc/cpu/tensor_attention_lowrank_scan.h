// The tasks of near-linear tensor attention with causality or windows, for one instruction set
// (per_instruction_set.h).
//
// Per monomial a and column c of [v | 1] the sum H_x over the keys that query t sees changes by one
// key from a query to the next:
//
//   N[t,c] += w_a U[t,a] prod_x H_x[t,a,c]
//
// Lanes are monomials, so that H_x += U(k)[lanes] v[c] needs no lane sums and any dv fills the
// vectors; rows are row by monomial here. A chunk of kTokens queries starts from sums over whole
// blocks of keys, which are matrix products. Nothing is ever subtracted: the keys that leave a
// window are added up from the back, once, into `suffix`. The backward makes H_x again, turns it
// into I_x[t,a,c] = w_a U[t,a] dN[t,c] prod_{y != x} H_y, and does to the I_x, from the last query
// to the first, what the forward did to the keys.
#include "cpu/tensor_attention_lowrank_blocks.h"

// Sum of the lanes, four at a time.
template <class R>
PYLOSS_INLINE R fold_lanes(const R* p) {
  if constexpr (Vec<R>::kLanes < 4) return p[0] + p[1];
  R sum[4] = {p[0], p[1], p[2], p[3]};
  for (int i = 4; i < Vec<R>::kLanes; i += 4) {
    for (int l = 0; l < 4; ++l) sum[l] += p[i + l];
  }
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// ---- rows
// ----------------------------------------------------------------------------------------

template <class R>
struct ScanTile {
  int64_t a0, a1, low;    // the first `low` are monomials of low degree
  std::vector<Run> runs;  // of the others
  std::vector<R> weights;

  ScanTile(const Monomials& mono, const ScanPlan& plan, int64_t tile) {
    a0 = tile * plan.columns;
    a1 = std::min(mono.count, a0 + plan.columns);
    low = std::max<int64_t>(0, std::min(a1, mono.low) - a0);
    runs = runs_of(mono, std::max(a0, mono.low), a1, a0);
    weights.assign(plan.columns, R(0));
    for (int64_t a = a0; a < a1; ++a) weights[a - a0] = R(mono.weight[a]);
  }
};

// Runs of degree 2, 3, .. below the highest.
inline std::vector<std::vector<Run>> low_runs(const Monomials& mono) {
  std::vector<std::vector<Run>> levels;
  for (size_t t = 2; t + 2 < mono.start.size(); ++t) {
    levels.push_back(runs_of(mono, mono.start[t], mono.start[t + 1], 0));
  }
  return levels;
}

// Children of one row. Vectors run over the end of a run, into the next one or the padding.
template <class R>
PYLOSS_INLINE void make_runs(const std::vector<Run>& runs, const R* low, R* to) {
  constexpr int kLanes = Vec<R>::kLanes;
  for (const Run& run : runs) {
    const R parent = low[run.parent], *x = low + 1 + run.var;
    for (int64_t i = 0; i < run.n; i += kLanes) store(to + run.at + i, parent * load(x + i));
  }
}

// `low` has the constant and the variables; the rest of it, and the tile.
template <class R>
void make_rows(const ScanPlan& plan, const std::vector<std::vector<Run>>& levels,
               const ScanTile<R>& tile, const ScanRows<R>& rows) {
  for (int64_t t = 0; t < kTokens; ++t) {
    R *low = rows.low + t * plan.low_stride, *u = rows.u + t * plan.row_stride;
    for (const std::vector<Run>& runs : levels) make_runs(runs, low, low);
    std::copy(low + tile.a0, low + tile.a0 + tile.low, u);
    make_runs(tile.runs, low, u);
    for (int64_t a = tile.a1 - tile.a0; a < plan.columns; ++a) u[a] = R(0);
  }
}

// dx[t * stride + l] += the variables' gradients of dU, for the rows [begin, end).
template <class R>
void spread_rows(const Monomials& mono, const ScanPlan& plan,
                 const std::vector<std::vector<Run>>& levels, const ScanTile<R>& tile,
                 const ScanRows<R>& rows, R* low_gradient, int64_t begin, int64_t end, R* dx) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  const auto spread = [&](const std::vector<Run>& runs, const R* low, const R* gradient, R* to) {
    for (const Run& run : runs) {
      const R parent = low[run.parent], *x = low + 1 + run.var, *g = gradient + run.at;
      R* dvar = to + 1 + run.var;
      V sum{};
      for (int64_t i = 0; i < run.n; i += kLanes) {
        V child = load(g + i);
        if (run.n - i < kLanes) child = first_lanes<R>(run.n - i) ? child : V{};
        sum += child * load(x + i);
        store(dvar + i, load(dvar + i) + child * parent);
      }
      R lanes[kLanes];
      store(lanes, sum);
      to[run.parent] += fold_lanes(lanes);
    }
  };
  for (int64_t t = begin; t < end; ++t) {
    const R *low = rows.low + t * plan.low_stride, *du = rows.du + t * plan.row_stride;
    R* to = low_gradient + t * plan.low_stride;
    std::fill(to, to + plan.low_stride, R(0));
    for (int64_t a = 0; a < tile.low; ++a) to[tile.a0 + a] += du[a];
    spread(tile.runs, low, du, to);
    for (size_t level = levels.size(); level-- > 0;) spread(levels[level], low, to, to);
    for (int64_t l = 0; l < mono.d; ++l) dx[(t - begin) * mono.d + l] += to[1 + l];
  }
}

// Keys [j0, j0 + kTokens); those out of [0, end) or masked are zero.
template <class R>
void load_key_rows(const Keys& keys, const ScanPlan& plan, int64_t j0, int64_t end,
                   const ScanRows<R>& rows) {
  const uint8_t* keep = keys.kept();
  const int64_t d = keys.p.d, dv = keys.p.dv;
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t j = j0 + t;
    R *low = rows.low + t * plan.low_stride, *v = rows.v + t * plan.width;
    if (j < 0 || j >= end || (keep && !keep[j])) {
      std::fill(low, low + plan.low_stride, R(0));
      std::fill(v, v + plan.width, R(0));
      continue;
    }
    const R* k = at<R>(keys.axis.k, keys.axis.k_strides, keys.b, keys.g, j);
    const R* from = at<R>(keys.axis.v, keys.axis.v_strides, keys.b, keys.g, j);
    low[0] = R(1);
    std::copy(k, k + d, low + 1);
    std::copy(from, from + dv, v);
    v[dv] = R(1);
  }
}

template <class R>
void load_query_rows(const LowrankProblem& p, const ScanPlan& plan, int64_t b, int64_t h,
                     int64_t i0, int64_t n, const ScanRows<R>& rows) {
  for (int64_t t = 0; t < kTokens; ++t) {
    R* low = rows.low + t * plan.low_stride;
    if (t >= n) {
      std::fill(low, low + plan.low_stride, R(0));
      continue;
    }
    const R* q = at<R>(p.q, p.q_strides, b, h, i0 + t);
    low[0] = R(1);
    std::copy(q, q + p.d, low + 1);
  }
}

// ---- bases
// ---------------------------------------------------------------------------------------

// sum += [v | 1]^T U of the rows from `first` on: column by monomial.
template <class R>
void add_block(const ScanPlan& plan, const ScanRows<R>& rows, int64_t first, R* sum) {
  product<R, true, End::kAdd>(plan.width, plan.columns, kTokens - first,
                              rows.v + first * plan.width, plan.width,
                              rows.u + first * plan.row_stride, plan.row_stride, sum, plan.columns);
}

// emit(e, running, suffix) for e = 0, 1, ..: the records e - length + 1 .. e add up to running +
// suffix (null: none); records before the first are zero. Sums of segments of `length` records
// from their beginning, and of the segment before from its end, into the records themselves.
template <class R, class Emit>
void window_sums(R* records, int64_t count, int64_t length, int64_t size, R* running, Emit&& emit) {
  for (int64_t begin = 0; begin < count; begin += length) {
    const int64_t end = std::min(count, begin + length);
    std::fill(running, running + size, R(0));
    for (int64_t e = begin; e < end; ++e) {
      for (int64_t i = 0; i < size; ++i) running[i] += records[e * size + i];
      const int64_t first = e - length + 1;
      emit(e, running, first >= 0 && first < begin ? records + first * size : nullptr);
    }
    for (int64_t e = end - 2; e >= begin; --e) {
      for (int64_t i = 0; i < size; ++i) records[e * size + i] += records[(e + 1) * size + i];
    }
  }
}

template <class R>
struct Scan {
  const LowrankProblem& p;
  const Monomials& mono;
  const ScanPlan& plan;
  const ScanBuffers<R>& w;
  int64_t b, h;
  std::vector<std::vector<Run>> levels;

  Scan(const LowrankProblem& p, const Monomials& mono, const ScanPlan& plan,
       const ScanBuffers<R>& w, int64_t head)
      : p(p),
        mono(mono),
        plan(plan),
        w(w),
        b(head / p.heads),
        h(head % p.heads),
        levels(low_runs(mono)) {
    // Vectors run over the end of a row: what lies there must be finite.
    const auto clear = [&](const ScanRows<R>& rows) {
      std::fill(rows.low, rows.low + kTokens * plan.low_stride, R(0));
    };
    clear(w.queries);
    for (size_t x = 0; x < plan.axes.size(); ++x) {
      clear(w.entering[x]);
      clear(w.leaving[x]);
    }
  }
  Keys keys(size_t x) const { return {p, p.axes[x], b, h / p.group()}; }

  // False where none of the rows is a key.
  bool load_keys(size_t x, const ScanTile<R>& tile, int64_t j0, int64_t end,
                 const ScanRows<R>& rows) const {
    if (j0 + kTokens <= 0 || j0 >= end) return false;
    load_key_rows(keys(x), plan, j0, end, rows);
    make_rows(plan, levels, tile, rows);
    return true;
  }

  // What all queries of a chunk see, for every chunk.
  void make_base(size_t x, const ScanTile<R>& tile) const {
    const ScanAxis& axis = plan.axes[x];
    const ScanRows<R>& rows = w.entering[x];
    const int64_t size = plan.record();
    R* const base = w.base[x];
    std::fill(base, base + plan.chunks * size, R(0));
    if (axis.window == 0) {
      const int64_t begin = std::min(axis.n, axis.entered(0));
      for (int64_t j0 = 0; j0 < begin; j0 += kTokens) {
        if (load_keys(x, tile, j0, begin, rows)) add_block(plan, rows, 0, base);
      }
      for (int64_t c = 1; c < plan.chunks; ++c) {
        R* sum = base + c * size;
        std::copy(sum - size, sum, sum);
        if (load_keys(x, tile, axis.entered(c - 1), axis.n, rows)) add_block(plan, rows, 0, sum);
      }
      return;
    }
    if (axis.whole == 0 && axis.rest == 0) return;
    const int64_t blocks = plan.chunks + axis.whole;
    for (int64_t k = 0; k < blocks; ++k) {
      R* block = w.blocks + k * size;
      if (axis.whole) std::fill(block, block + size, R(0));
      if (!load_keys(x, tile, axis.entered(k - axis.whole - 1), axis.n, rows)) continue;
      if (axis.whole) add_block(plan, rows, 0, block);
      if (axis.rest && k < plan.chunks) {
        add_block(plan, rows, kTokens - axis.rest, base + k * size);
      }
    }
    if (!axis.whole) return;
    window_sums(w.blocks, blocks, axis.whole, size, w.running,
                [&](int64_t e, const R* running, const R* suffix) {
                  if (e < axis.whole) return;
                  R* sum = base + (e - axis.whole) * size;
                  for (int64_t i = 0; i < size; ++i) sum[i] += running[i];
                  for (int64_t i = 0; suffix && i < size; ++i) sum[i] += suffix[i];
                });
  }

  // Gradients of the keys [j0, j0 + kTokens) before `end`, which are loaded: all of them in the
  // base sums whose gradients are `one` and `two`, those from `first` on in that of `three`.
  void base_keys_gradient(size_t x, const ScanTile<R>& tile, int64_t j0, int64_t end, const R* one,
                          const R* two, const R* three, int64_t first, R* gradients) const {
    const ScanRows<R>& rows = w.entering[x];
    std::fill(rows.du, rows.du + kTokens * plan.row_stride, R(0));
    std::fill(rows.dv, rows.dv + kTokens * plan.value_stride, R(0));
    const auto add = [&](const R* sum, int64_t from) {
      if (!sum) return;
      product<R, false, End::kAdd>(kTokens - from, plan.columns, plan.width,
                                   rows.v + from * plan.width, plan.width, sum, plan.columns,
                                   rows.du + from * plan.row_stride, plan.row_stride);
      for (int64_t a = 0; a < plan.columns; ++a) {
        for (int64_t c = 0; c < plan.width; ++c) {
          w.transposed[a * plan.value_stride + c] = sum[c * plan.columns + a];
        }
      }
      product<R, false, End::kAdd>(
          kTokens - from, p.dv, plan.columns, rows.u + from * plan.row_stride, plan.row_stride,
          w.transposed, plan.value_stride, rows.dv + from * plan.value_stride, plan.value_stride);
    };
    add(one, 0);
    add(two, 0);
    add(three, first);
    add_key_gradients(x, tile, rows, j0, end, gradients);
  }

  // du and dv of rows to the gradients of the keys among them.
  void add_key_gradients(size_t x, const ScanTile<R>& tile, const ScanRows<R>& rows, int64_t j0,
                         int64_t end, R* gradients) const {
    const int64_t first = std::max<int64_t>(0, -j0), last = std::min(kTokens, end - j0);
    if (first >= last) return;
    R* dk = gradients + plan.key_partial[x];
    spread_rows(mono, plan, levels, tile, rows, w.low_gradient, first, last,
                dk + (j0 + first) * p.d);
    R* dv = dk + p.axes[x].band.n * p.d;
    for (int64_t t = first; t < last; ++t) {
      for (int64_t c = 0; c < p.dv; ++c)
        dv[(j0 + t) * p.dv + c] += rows.dv[t * plan.value_stride + c];
    }
  }

  // What make_base did, backward.
  void base_gradients(size_t x, const ScanTile<R>& tile, R* gradients) const {
    const ScanAxis& axis = plan.axes[x];
    const int64_t size = plan.record();
    R *const of_base = w.base_gradient[x], *none = nullptr;
    if (axis.window == 0) {
      R* total = w.running;  // of the chunks after the block
      std::fill(total, total + size, R(0));
      for (int64_t c = plan.chunks - 1; c >= 0; --c) {
        for (int64_t i = 0; i < size; ++i) total[i] += of_base[c * size + i];
        if (c > 0 && load_keys(x, tile, axis.entered(c - 1), axis.n, w.entering[x])) {
          base_keys_gradient(x, tile, axis.entered(c - 1), axis.n, total, none, none, 0, gradients);
        }
      }
      const int64_t begin = std::min(axis.n, axis.entered(0));
      for (int64_t j0 = 0; j0 < begin; j0 += kTokens) {
        if (load_keys(x, tile, j0, begin, w.entering[x])) {
          base_keys_gradient(x, tile, j0, begin, total, none, none, 0, gradients);
        }
      }
      return;
    }
    if (axis.whole == 0 && axis.rest == 0) return;
    const int64_t blocks = plan.chunks + axis.whole;
    std::fill(of_base + plan.chunks * size, of_base + blocks * size, R(0));
    const auto block = [&](int64_t k, const R* running, const R* suffix) {
      const int64_t j0 = axis.entered(k - axis.whole - 1);
      const R* rest = axis.rest && k < plan.chunks ? of_base + k * size : nullptr;
      if ((!running && !rest) || !load_keys(x, tile, j0, axis.n, w.entering[x])) return;
      base_keys_gradient(x, tile, j0, axis.n, running, suffix, rest, kTokens - axis.rest,
                         gradients);
    };
    block(0, nullptr, nullptr);
    if (axis.whole) {
      window_sums(
          of_base, blocks - 1, axis.whole, size, w.running,
          [&](int64_t e, const R* running, const R* suffix) { block(e + 1, running, suffix); });
    } else {
      for (int64_t k = 1; k < plan.chunks; ++k) block(k, nullptr, nullptr);
    }
  }

  // ---- inside a chunk ----

  // use(t, H) for the queries t < n, H the sums of kC columns from c on and of the monomials from
  // a on.
  template <int kC, class Use>
  PYLOSS_INLINE void sweep(size_t x, const R* base, int64_t a, int64_t c, int64_t n,
                           Use&& use) const {
    using V = typename Vec<R>::V;
    constexpr int kLanes = Vec<R>::kLanes;
    // Copies: stores to vectors may alias everything that lies in memory.
    const ScanRows<R> in = w.entering[x], out = w.leaving[x];
    const int64_t window = plan.axes[x].window, row_stride = plan.row_stride, width = plan.width;
    const auto add = [=](V* sum, const ScanRows<R>& rows, int64_t t) {
      const V u = load(rows.u + t * row_stride + a);
      const R* v = rows.v + t * width + c;
      PYLOSS_UNROLL(4)
      for (int i = 0; i < kC; ++i) sum[i] += u * v[i];
    };
    V sum[kC];
    PYLOSS_UNROLL(4)
    for (int i = 0; i < kC; ++i) sum[i] = load(base + i * plan.columns);
    if (window == 0) {
      for (int64_t t = 0; t < n; ++t) {
        use(t, sum);
        add(sum, in, t);
      }
      return;
    }
    R* const suffix = w.suffix;
    for (int64_t begin = 0; begin < n; begin += window) {
      const bool first = begin == 0;
      const int64_t length = first ? plan.axes[x].leaving() : window;
      const auto keep = [&](int64_t t) {
        for (int i = 0; i < kC; ++i) store(suffix + (t * kC + i) * kLanes, sum[i]);
      };
      if (!first) {
        for (int i = 0; i < kC; ++i) sum[i] = V{};
      }
      keep(length);
      for (int64_t t = length - 1; t >= 0; --t) {
        add(sum, first ? out : in, first ? t : begin - window + t);
        keep(t);
      }
      for (int i = 0; i < kC; ++i) sum[i] = V{};
      for (int64_t t = begin; t < std::min(n, begin + window); ++t) {
        V seen[kC];
        for (int i = 0; i < kC; ++i) {
          seen[i] = sum[i] + load(suffix + ((t - begin) * kC + i) * kLanes);
        }
        use(t, seen);
        add(sum, in, t);
      }
    }
  }

  // The same backward: the items, gradients of H, to du, to the lanes of dv and to the base.
  template <int kC>
  PYLOSS_INLINE void sweep_back(size_t x, R* base_gradient, int64_t a, int64_t c, int64_t n) const {
    using V = typename Vec<R>::V;
    constexpr int kLanes = Vec<R>::kLanes;
    const ScanRows<R> in = w.entering[x], out = w.leaving[x];
    const int64_t window = plan.axes[x].window, row_stride = plan.row_stride, width = plan.width;
    R *const items = w.items[x], *const in_lanes = w.lanes[x],
             *const out_lanes = w.leaving_lanes[x];
    V sum[kC];
    const auto clear = [&] {
      for (int i = 0; i < kC; ++i) sum[i] = V{};
    };
    const auto add = [&](int64_t t) {
      for (int i = 0; i < kC; ++i) sum[i] += load(items + (t * kC + i) * kLanes);
    };
    const auto give = [&](const ScanRows<R>& rows, R* lanes, int64_t t) {
      const V u = load(rows.u + t * row_stride + a);
      const R* v = rows.v + t * width + c;
      R* du = rows.du + t * row_stride + a;
      V g = load(du);
      for (int i = 0; i < kC; ++i) {
        R* lane = lanes + (t * kC + i) * kLanes;
        g += sum[i] * v[i];
        store(lane, load(lane) + sum[i] * u);
      }
      store(du, g);
    };
    const auto finish_base = [&] {
      for (int i = 0; i < kC; ++i) store(base_gradient + i * plan.columns, sum[i]);
    };
    if (window == 0) {
      clear();
      for (int64_t t = n - 1; t >= 0; --t) {
        give(in, in_lanes, t);
        add(t);
      }
      finish_base();
      return;
    }
    for (int64_t begin = 0; begin < n; begin += window) {
      const bool first = begin == 0;
      const int64_t end = std::min(n, begin + window);
      const int64_t length = first ? plan.axes[x].leaving() : window;
      clear();
      for (int64_t t = end - 1; t >= begin; --t) {
        give(in, in_lanes, t);
        add(t);
      }
      clear();
      for (int64_t t = 0; t < length; ++t) {
        if (begin + t < end) add(begin + t);
        if (first) {
          give(out, out_lanes, t);
        } else {
          give(in, in_lanes, begin - window + t);
        }
      }
      for (int64_t t = begin + length; t < end; ++t) add(t);
      if (first) finish_base();
    }
  }

  // sums[t, c] += N of n queries, for kC columns.
  template <int kC>
  void forward_columns(int64_t chunk, int64_t c, int64_t n, R* result) const {
    using V = typename Vec<R>::V;
    constexpr int kLanes = Vec<R>::kLanes;
    const size_t m = plan.axes.size();
    R *const lanes = w.lanes[0], *const products = w.sums[0], *const of_queries = w.queries.u;
    const int64_t row_stride = plan.row_stride;
    std::fill(lanes, lanes + n * kC * kLanes, R(0));
    for (int64_t a = 0; a < plan.columns; a += kLanes) {
      const auto base = [&](size_t x) {
        return w.base[x] + chunk * plan.record() + c * plan.columns + a;
      };
      for (size_t x = 0; x + 1 < m; ++x) {
        sweep<kC>(x, base(x), a, c, n, [=](int64_t t, const V* sum) {
          for (int i = 0; i < kC; ++i) {
            R* to = products + (t * kC + i) * kLanes;
            store(to, x == 0 ? sum[i] : load(to) * sum[i]);
          }
        });
      }
      sweep<kC>(m - 1, base(m - 1), a, c, n, [=](int64_t t, const V* sum) {
        const V u = load(of_queries + t * row_stride + a);
        for (int i = 0; i < kC; ++i) {
          const int64_t at = (t * kC + i) * kLanes;
          const V all = m == 1 ? sum[i] : load(products + at) * sum[i];
          store(lanes + at, load(lanes + at) + u * all);
        }
      });
    }
    for (int64_t t = 0; t < n; ++t) {
      for (int i = 0; i < kC; ++i) {
        result[t * plan.width + c + i] += fold_lanes(lanes + (t * kC + i) * kLanes);
      }
    }
  }

  template <int kC>
  void backward_columns(int64_t chunk, int64_t c, int64_t n) const {
    using V = typename Vec<R>::V;
    constexpr int kLanes = Vec<R>::kLanes;
    const size_t m = plan.axes.size();
    R *const sums_0 = w.sums[0], *const sums_1 = w.sums[m == 2];
    R *const items_0 = w.items[0], *const items_1 = w.items[m == 2];
    for (size_t x = 0; x < m; ++x) {
      std::fill(w.lanes[x], w.lanes[x] + kTokens * kC * kLanes, R(0));
      std::fill(w.leaving_lanes[x], w.leaving_lanes[x] + kTokens * kC * kLanes, R(0));
    }
    for (int64_t a = 0; a < plan.columns; a += kLanes) {
      const int64_t at_base = chunk * plan.record() + c * plan.columns + a;
      for (size_t x = 0; x < m; ++x) {
        R* const sums = w.sums[x];
        sweep<kC>(x, w.base[x] + at_base, a, c, n, [=](int64_t t, const V* sum) {
          for (int i = 0; i < kC; ++i) store(sums + (t * kC + i) * kLanes, sum[i]);
        });
      }
      const ScanRows<R> queries = w.queries;
      const int64_t row_stride = plan.row_stride, width = plan.width;
      for (int64_t t = 0; t < n; ++t) {
        const V u = load(queries.u + t * row_stride + a);
        const R* cotangent = queries.v + t * width + c;
        R* du = queries.du + t * row_stride + a;
        V g = load(du);
        for (int i = 0; i < kC; ++i) {
          const int64_t at = (t * kC + i) * kLanes;
          const V item = u * cotangent[i];
          if (m == 2) {
            const V h0 = load(sums_0 + at), h1 = load(sums_1 + at);
            store(items_0 + at, item * h1);
            store(items_1 + at, item * h0);
            g += cotangent[i] * (h0 * h1);
            continue;
          }
          V all = V{} + cotangent[i];
          for (size_t x = 0; x < m; ++x) {
            all *= load(w.sums[x] + at);
            V others = item;
            for (size_t y = 0; y < m; ++y) {
              if (y != x) others *= load(w.sums[y] + at);
            }
            store(w.items[x] + at, others);
          }
          g += all;
        }
        store(du, g);
      }
      for (size_t x = 0; x < m; ++x) {
        sweep_back<kC>(x, w.base_gradient[x] + at_base, a, c, n);
      }
    }
    const auto fold = [&](const R* lanes, R* dv) {
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int i = 0; i < kC; ++i) {
          dv[t * plan.value_stride + c + i] = fold_lanes(lanes + (t * kC + i) * kLanes);
        }
      }
    };
    for (size_t x = 0; x < m; ++x) {
      fold(w.lanes[x], w.entering[x].dv);
      if (plan.axes[x].window) fold(w.leaving_lanes[x], w.leaving[x].dv);
    }
  }

  // fn(number, first column): groups of 3 to 5 columns, since one alone would wait for latencies.
  template <class Fn>
  void each_group(Fn&& fn) const {
    const int64_t groups = (plan.width + kColumns - 1) / kColumns;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t c = plan.width * i / groups, count = plan.width * (i + 1) / groups - c;
      switch (count) {
        case 1:
          fn(std::integral_constant<int, 1>{}, c);
          break;
        case 2:
          fn(std::integral_constant<int, 2>{}, c);
          break;
        case 3:
          fn(std::integral_constant<int, 3>{}, c);
          break;
        case 4:
          fn(std::integral_constant<int, 4>{}, c);
          break;
        default:
          fn(std::integral_constant<int, kColumns>{}, c);
      }
    }
  }

  // The rows of a chunk; a block without a key is zero.
  void load_chunk(const ScanTile<R>& tile, int64_t chunk, int64_t n) const {
    load_query_rows(p, plan, b, h, chunk * kTokens, n, w.queries);
    make_rows(plan, levels, tile, w.queries);
    for (int64_t t = 0; t < n; ++t) {
      R* u = w.queries.u + t * plan.row_stride;
      for (int64_t a = 0; a < plan.columns; ++a) u[a] *= tile.weights[a];
    }
    for (size_t x = 0; x < plan.axes.size(); ++x) {
      const ScanAxis& axis = plan.axes[x];
      const auto load_or_clear = [&](int64_t j0, const ScanRows<R>& rows) {
        if (load_keys(x, tile, j0, axis.n, rows)) return;
        std::fill(rows.u, rows.u + kTokens * plan.row_stride, R(0));
        std::fill(rows.v, rows.v + kTokens * plan.width, R(0));
      };
      load_or_clear(axis.entered(chunk), w.entering[x]);
      if (axis.window) load_or_clear(axis.entered(chunk) - axis.window, w.leaving[x]);
    }
  }

  // result: [N | y] of all queries.
  void forward(const ScanTile<R>& tile, R* result) const {
    for (size_t x = 0; x < plan.axes.size(); ++x) make_base(x, tile);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t n = std::min(kTokens, p.n_q - chunk * kTokens);
      load_chunk(tile, chunk, n);
      R* rows = result + chunk * kTokens * plan.width;
      each_group([&](auto columns, int64_t c) {
        forward_columns<decltype(columns)::value>(chunk, c, n, rows);
      });
    }
  }

  void backward(const LowrankBackward& grads, const ScanTile<R>& tile, R* gradients) const {
    for (size_t x = 0; x < plan.axes.size(); ++x) make_base(x, tile);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t i0 = chunk * kTokens, n = std::min(kTokens, p.n_q - i0);
      load_chunk(tile, chunk, n);
      for (int64_t t = 0; t < n; ++t) {
        R* row = w.queries.v + t * plan.width;
        row[p.dv] = cotangent(p, grads, b, h, i0 + t, row);
      }
      std::fill(w.queries.du, w.queries.du + kTokens * plan.row_stride, R(0));
      for (size_t x = 0; x < plan.axes.size(); ++x) {
        std::fill(w.entering[x].du, w.entering[x].du + kTokens * plan.row_stride, R(0));
        std::fill(w.leaving[x].du, w.leaving[x].du + kTokens * plan.row_stride, R(0));
      }
      each_group([&](auto columns, int64_t c) {
        backward_columns<decltype(columns)::value>(chunk, c, n);
      });
      for (int64_t t = 0; t < n; ++t) {
        R* du = w.queries.du + t * plan.row_stride;
        for (int64_t a = 0; a < plan.columns; ++a) du[a] *= tile.weights[a];
      }
      spread_rows(mono, plan, levels, tile, w.queries, w.low_gradient, 0, n, gradients + i0 * p.d);
      for (size_t x = 0; x < plan.axes.size(); ++x) {
        const ScanAxis& axis = plan.axes[x];
        add_key_gradients(x, tile, w.entering[x], axis.entered(chunk), axis.n, gradients);
        if (!axis.window) continue;
        add_key_gradients(x, tile, w.leaving[x], axis.entered(chunk) - axis.window, axis.n,
                          gradients);
      }
    }
    for (size_t x = 0; x < plan.axes.size(); ++x) base_gradients(x, tile, gradients);
  }
};

// Task `task`: range task % ranges of head task / ranges; `partials` takes its [N | y].
template <class R>
void scan_task(const LowrankProblem& p, const Monomials& mono, const ScanPlan& plan, int64_t task,
               void* scratch, void* partials) {
  Arena arena(scratch);
  const ScanBuffers<R> w(plan, false, arena);
  const Scan<R> scan(p, mono, plan, w, task / plan.ranges);
  R* result = static_cast<R*>(partials) + task * p.n_q * plan.width;
  std::fill(result, result + p.n_q * plan.width, R(0));
  const int64_t range = task % plan.ranges;
  for (int64_t t = plan.first_tile(range); t < plan.first_tile(range + 1); ++t) {
    scan.forward(ScanTile<R>(mono, plan, t), result);
  }
}

template <class R>
void scan_gradient_task(const LowrankProblem& p, const LowrankBackward& grads,
                        const Monomials& mono, const ScanPlan& plan, int64_t task, void* scratch,
                        void* partials) {
  Arena arena(scratch);
  const ScanBuffers<R> w(plan, true, arena);
  const Scan<R> scan(p, mono, plan, w, task / plan.ranges);
  R* result = static_cast<R*>(partials) + task * plan.gradients;
  std::fill(result, result + plan.gradients, R(0));
  const int64_t range = task % plan.ranges;
  for (int64_t t = plan.first_tile(range); t < plan.first_tile(range + 1); ++t) {
    scan.backward(grads, ScanTile<R>(mono, plan, t), result);
  }
}

template <class R>
LowrankTasks lowrank_tasks() {
  return {&key_sums_task<R>,       &query_sums_task<R>,   &query_task<R>,
          &query_gradient_task<R>, &key_gradient_task<R>, &scan_task<R>,
          &scan_gradient_task<R>};
}
