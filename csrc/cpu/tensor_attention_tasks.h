// The tasks of tensor attention, for one instruction set (per_instruction_set.h).
//
// Forward, one query at a time: rows are the pairs (query, j), whose vectors are q * k1_j; columns
// are keys k. All pairs of one query share the running maximum, so an interval of keys per axis
// leaves no masked element in a tile, and
//
//     out = sum_j v1_j * (sum_k exp(S_jk - max) v2_k) / sum_jk exp(S_jk - max).
//
// Backward, one key f of the first axis at a time, with rows i and columns c:
//
//     S = scale (Q * k_f) Kc^T      D = (dO * v_f) Vc^T        P = exp(S - lse), dS = P (D - delta)
//     W = P^T dO       dVc += W * v_f,           dv_f = sum_c W_c * vc_c
//     G = dS^T Q       dKc += scale G * k_f,     dk_f = scale sum_c G_c * kc_c
//     X = dS Kc        dQ += scale X * k_f
//
// With capped scores, cap(S) in the place of S; dS is then times 1 - tanh^2, which the masks'
// gradients, sums of dS, come before.
#include "cpu/tensor_attention_gemm.h"

template <class T>
const T* at(const void* p, const int64_t* strides, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(p) + b * strides[0] + h * strides[1] + n * strides[2];
}

// The largest of n scores and `most`; NaN does not count.
template <class R>
PYLOSS_INLINE R largest(const R* s, int64_t n, R most) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  V m = V{} + most;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const V x = load(s + c);
    m = x > m ? x : m;
  }
  if (c < n) {
    const V x = load(s + c);
    m = (first_lanes<R>(n - c) & (x > m)) ? x : m;
  }
  for (int i = 0; i < kLanes; ++i) most = max_(most, R(m[i]));
  return most;
}

// A bias of -inf hides whatever the score is, infinity and NaN included.
template <class R>
PYLOSS_INLINE void add_bias(R* s, int64_t n, R row_bias, const R* column_bias) {
  constexpr int kLanes = Vec<R>::kLanes;
  using V = typename Vec<R>::V;
  for (int64_t c = 0; c < n; c += kLanes) {
    V bias = V{} + row_bias;
    if (column_bias) bias += load_part(column_bias + c, n - c);
    store(s + c, bias == V{} - infinity_<R>() ? bias : load(s + c) + bias);
  }
}

// s = cap tanh(s / cap).
template <class R>
PYLOSS_INLINE void cap_row(R* s, int64_t n, R cap) {
  constexpr int kLanes = Vec<R>::kLanes;
  for (int64_t c = 0; c < n; c += kLanes) store(s + c, cap * tanh_of(load(s + c) / cap));
}

// s = exp(s - shift); returns sum + s lane by lane.
template <class R>
PYLOSS_INLINE typename Vec<R>::V exp_row(R* s, int64_t n, R shift, typename Vec<R>::V sum) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const V p = exp_of(load(s + c) - shift);
    store(s + c, p);
    sum += p;
  }
  if (c < n) {
    const V p = first_lanes<R>(n - c) ? exp_of(load(s + c) - shift) : V{};
    store(s + c, p);
    sum += p;
  }
  return sum;
}

template <class T, class R>
void forward_task(const TensorAttentionProblem& p, const TensorAttentionForward& f,
                  const ForwardPlan& plan, int64_t task, void* scratch) {
  using V = typename Vec<R>::V;
  Arena arena(scratch);
  const ForwardBuffers<R> w(p, plan, arena);
  const TensorAttentionAxis &first = p.axes[0], &second = p.axes[1];
  const int64_t head = task / plan.blocks, b = head / p.heads, h = head % p.heads;
  const int64_t g = h / p.group(), dvp = padded(p.dv), s_stride = w.kScoreStride;
  const int64_t i0 = task % plan.blocks * plan.queries, i1 = std::min(p.n_q, i0 + plan.queries);
  const int64_t j_begin = first.band.begin(i0), j_end = first.band.end(i1 - 1);
  const int64_t k_begin = second.band.begin(i0), k_end = second.band.end(i1 - 1);
  copy_rows(w.k1, p.d, at<T>(first.k, first.k_strides, b, g, j_begin), first.k_strides[2],
            j_end - j_begin, p.d, first.bias_k);
  copy_rows(w.v1, dvp, at<T>(first.v, first.v_strides, b, g, j_begin), first.v_strides[2],
            j_end - j_begin, p.dv, first.bias_v);
  const R cap = R(p.softcap);
  std::fill(w.acc, w.acc + (i1 - i0) * dvp, R(0));
  std::fill(w.sum, w.sum + (i1 - i0), R(0));
  std::fill(w.max, w.max + (i1 - i0), -infinity_<R>());

  for (int64_t c0 = k_begin; c0 < k_end; c0 += kKeyBlock) {
    const int64_t c1 = std::min(k_end, c0 + kKeyBlock);
    copy_transposed(w.kt, w.kt_stride, at<T>(second.k, second.k_strides, b, g, c0),
                    second.k_strides[2], c1 - c0, p.d, second.bias_k);
    copy_rows(w.v2, dvp, at<T>(second.v, second.v_strides, b, g, c0), second.v_strides[2], c1 - c0,
              p.dv, second.bias_v);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t k0 = std::max(c0, second.band.begin(i)), k1 = std::min(c1, second.band.end(i));
      const int64_t j0 = first.band.begin(i), j1 = first.band.end(i), width = k1 - k0;
      if (k0 >= k1 || j0 >= j1) continue;
      const T* q = at<T>(p.q, p.q_strides, b, h, i);
      for (int64_t l = 0; l < p.d; ++l) w.q[l] = R(to_float(q[l])) * R(p.scale);
      const R* bias1 = first.mask ? at<R>(first.mask, first.mask_strides, b, h, i) : nullptr;
      const R* bias2 = second.mask ? at<R>(second.mask, second.mask_strides, b, h, i) : nullptr;
      R& most = w.max[i - i0];
      R* acc = w.acc + (i - i0) * dvp;
      V sum{};
      const int64_t pieces = (j1 - j0 + kPairRows - 1) / kPairRows;
      for (int64_t t = 0; t < pieces; ++t) {
        const int64_t r0 = j0 + (j1 - j0) * t / pieces, r1 = j0 + (j1 - j0) * (t + 1) / pieces;
        for (int64_t j = r0; j < r1; ++j) {
          const R* key = w.k1 + (j - j_begin) * p.d;
          R* pair = w.pairs + (j - r0) * p.d;
          for (int64_t l = 0; l < p.d; ++l) pair[l] = w.q[l] * key[l];
        }
        product<R, false, End::kStore>(r1 - r0, width, p.d, w.pairs, p.d, w.kt + (k0 - c0),
                                       w.kt_stride, w.s, s_stride);
        R now = most;
        for (int64_t j = r0; j < r1; ++j) {
          R* s = w.s + (j - r0) * s_stride;
          if (cap != R(0)) cap_row(s, width, cap);
          if (bias1 || bias2) {
            add_bias(s, width, bias1 ? bias1[j] : R(0), bias2 ? bias2 + k0 : nullptr);
          }
          now = largest(s, width, now);
        }
        if (now > most) {
          const R factor = exp_lane(most - now);  // 0 the first time: most is -inf
          for (int64_t l = 0; l < dvp; ++l) acc[l] *= factor;
          w.sum[i - i0] *= factor;
          sum *= factor;
          most = now;
        }
        // Nothing but masked pairs so far: their exponentials are 0 with any finite shift.
        const R shift = most == -infinity_<R>() ? R(0) : most;
        for (int64_t j = r0; j < r1; ++j)
          sum = exp_row(w.s + (j - r0) * s_stride, width, shift, sum);
        product<R, false, End::kWeigh>(r1 - r0, p.dv, width, w.s, s_stride, w.v2 + (k0 - c0) * dvp,
                                       dvp, acc, dvp, {w.v1 + (r0 - j_begin) * dvp});
      }
      w.sum[i - i0] += lane_sum<R>(sum);
    }
  }

  for (int64_t i = i0; i < i1; ++i) {
    const R sum = w.sum[i - i0];
    const R* acc = w.acc + (i - i0) * dvp;
    T* out = static_cast<T*>(f.out) + (head * p.n_q + i) * p.dv;
    const R factor = sum == R(0) ? R(0) : R(1) / sum;
    for (int64_t c = 0; c < p.dv; ++c) out[c] = FromFloat<T>::of(acc[c] * factor);
    static_cast<R*>(f.lse)[head * p.n_q + i] =
        sum == R(0) ? -infinity_<R>() : w.max[i - i0] + log_(sum);
  }
}

// ---- backward
// ------------------------------------------------------------------------------------

// One row of P and dS from S and D, in place; the columns outside of [begin, end) become 0.
// Returns the sum of dS. `dmask` is the row of the second mask's gradient.
template <bool kCapped, class R>
PYLOSS_INLINE R softmax_backward_row(R* s, R* dp, int64_t begin, int64_t end, int64_t columns,
                                     R cap, R lse, R delta, R row_bias, const R* column_bias,
                                     R* dmask) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  if (row_bias == -infinity_<R>() || lse == infinity_<R>()) end = begin;  // hidden: all is 0
  for (int64_t c = 0; c < begin; ++c) s[c] = dp[c] = R(0);
  V sum{};
  const R shift = row_bias - lse;
  for (int64_t c = begin; c < end; c += kLanes) {
    V x = load(s + c), slope{};
    if constexpr (kCapped) {
      const V t = tanh_of(x / cap);
      x = cap * t;
      slope = R(1) - t * t;
    }
    x += shift;
    const V bias = column_bias ? load_part(column_bias + c, end - c) : V{};
    V prob = exp_of(x + bias);
    V grad = prob * (load(dp + c) - delta);
    if (column_bias) {
      const auto hidden = bias == V{} - infinity_<R>();
      prob = hidden ? V{} : prob;
      grad = hidden ? V{} : grad;
    }
    if (end - c < kLanes) {
      prob = first_lanes<R>(end - c) ? prob : V{};
      grad = first_lanes<R>(end - c) ? grad : V{};
    }
    store(s + c, prob);
    if constexpr (kCapped) {
      store(dp + c, grad * slope);
    } else {
      store(dp + c, grad);
    }
    sum += grad;
    if (dmask) {
      for (int i = 0; i < kLanes && c + i < end; ++i) dmask[c + i] += grad[i];
    }
  }
  for (int64_t c = std::max(begin, end); c < columns; ++c) s[c] = dp[c] = R(0);
  return lane_sum<R>(sum);
}

// total += rows * factor, row by row, own += sum of rows * others, and rows = 0.
template <class R>
void flush_rows(R* rows, int64_t count, int64_t n, R* total, const R* factor, const R* others,
                R* own) {
  constexpr int kLanes = Vec<R>::kLanes;
  for (int64_t l = 0; l < n; l += kLanes) {
    const typename Vec<R>::V f = load(factor + l);
    typename Vec<R>::V sum = load(own + l);
    for (int64_t at = l; at < count * n; at += n) {
      const typename Vec<R>::V x = load(rows + at);
      store(total + at, load(total + at) + x * f);
      sum += x * load(others + at);
      store(rows + at, typename Vec<R>::V{});
    }
    store(own + l, sum);
  }
}

template <class T, class R>
void backward_task(const TensorAttentionProblem& p, const TensorAttentionBackward& out,
                   const BackwardPlan& plan, int64_t task, void* scratch, void* partial) {
  Arena arena(scratch);
  const BackwardBuffers<R> w(p, plan, arena);
  const TensorAttentionAxis &first = p.axes[0], &second = p.axes[1];
  const int64_t count = static_cast<int64_t>(plan.ranges.size());
  const KeyRange& range = plan.ranges[task % count];
  const int64_t head = task / count, b = head / p.heads, h = head % p.heads, g = h / p.group();
  const int64_t dp = plan.dp, dvp = plan.dvp, s_stride = w.kScoreStride;
  const int64_t queries = range.i1 - range.i0, columns = range.c1 - range.c0;
  R* const parts = static_cast<R*>(partial) + head * plan.per_head;
  R* const dq = plan.dq(parts, range);
  R* const dk_second = plan.dk_second(parts, range);
  R* const dv_second = plan.dv_second(parts, range);
  R* const dk_first = plan.dk_first(parts);
  R* const dv_first = plan.dv_first(parts, first.band.n);
  std::fill(dq, dv_second + columns * dvp, R(0));
  std::fill(dk_first + range.f0 * dp, dk_first + range.f1 * dp, R(0));
  std::fill(dv_first + range.f0 * dvp, dv_first + range.f1 * dvp, R(0));
  if (queries == 0) return;
  const bool want_q = out.dq, want_k = out.dk[0] || out.dk[1], want_v = out.dv[0] || out.dv[1];
  const R cap = R(p.softcap);
  const auto backward_row = [&](R* s, R* dp, auto... rest) {
    return cap == R(0) ? softmax_backward_row<false>(s, dp, rest...)
                       : softmax_backward_row<true>(s, dp, rest...);
  };
  const bool want_scores = want_q || want_k || out.dmask[0] || out.dmask[1];

  copy_rows(w.q, dp, at<T>(p.q, p.q_strides, b, h, range.i0), p.q_strides[2], queries, p.d, 0.0);
  copy_rows(w.dout, dvp, at<T>(out.dout, out.dout_strides, b, h, range.i0), out.dout_strides[2],
            queries, p.dv, 0.0);
  copy_rows(w.kc, dp, at<T>(second.k, second.k_strides, b, g, range.c0), second.k_strides[2],
            columns, p.d, second.bias_k);
  copy_rows(w.vc, dvp, at<T>(second.v, second.v_strides, b, g, range.c0), second.v_strides[2],
            columns, p.dv, second.bias_v);
  copy_transposed(w.kct, w.t_stride, w.kc, dp, columns, p.d, 0.0);
  copy_transposed(w.vct, w.t_stride, w.vc, dvp, columns, p.dv, 0.0);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t at_row = head * p.n_q + range.i0 + i;
    const T* o = static_cast<const T*>(out.out) + at_row * p.dv;
    R delta = out.dlse ? -static_cast<const R*>(out.dlse)[at_row] : R(0);
    for (int64_t c = 0; c < p.dv; ++c) delta += w.dout[i * dvp + c] * R(to_float(o[c]));
    const R lse = static_cast<const R*>(out.lse)[at_row];
    w.delta[i] = delta;
    w.lse[i] = lse == -infinity_<R>() ? infinity_<R>() : lse;  // a masked row: P = 0
  }
  std::fill(w.g, w.g + columns * dp, R(0));
  std::fill(w.w, w.w + columns * dvp, R(0));

  for (int64_t f = range.f0; f < range.f1; ++f) {
    const int64_t i_begin = first.band.first_query(f, p.n_q),
                  i_end = first.band.last_query(f, p.n_q);
    if (i_begin >= i_end) continue;
    const int64_t c_begin = second.band.begin(i_begin), c_end = second.band.end(i_end - 1);
    if (c_begin >= c_end) continue;
    copy_rows(w.kf, dp, at<T>(first.k, first.k_strides, b, g, f), 0, 1, p.d, first.bias_k);
    copy_rows(w.vf, dvp, at<T>(first.v, first.v_strides, b, g, f), 0, 1, p.dv, first.bias_v);
    for (int64_t l = 0; l < p.d; ++l) w.kf[l] *= R(p.scale);

    const int64_t row_blocks = (i_end - i_begin + kQueryRows - 1) / kQueryRows;
    const bool at_once = row_blocks == 1;  // W and G are whole after one block of rows
    for (int64_t rb = 0; rb < row_blocks; ++rb) {
      const int64_t r0 = i_begin + (i_end - i_begin) * rb / row_blocks;
      const int64_t r1 = i_begin + (i_end - i_begin) * (rb + 1) / row_blocks, rows = r1 - r0;
      const R* q = w.q + (r0 - range.i0) * dp;
      const R* dout = w.dout + (r0 - range.i0) * dvp;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t l = 0; l < p.d; ++l) w.qf[r * dp + l] = q[r * dp + l] * w.kf[l];
        for (int64_t l = 0; l < p.dv; ++l) w.doutf[r * dvp + l] = dout[r * dvp + l] * w.vf[l];
      }
      std::fill(w.x, w.x + rows * dp, R(0));
      const int64_t block_begin = second.band.begin(r0), block_end = second.band.end(r1 - 1);
      const int64_t pieces = (block_end - block_begin + kBackwardColumns - 1) / kBackwardColumns;
      // Few rows at a time where the interval of columns moves with the row.
      const int64_t tiles = (rows + PYLOSS_TILE_ROWS - 1) / PYLOSS_TILE_ROWS;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t c0 = block_begin + (block_end - block_begin) * piece / pieces;
        const int64_t c1 = block_begin + (block_end - block_begin) * (piece + 1) / pieces;
        const int64_t width = c1 - c0;
        const auto tile_row = [&](int64_t t) { return rows * t / tiles; };
        const auto first_column = [&](int64_t r) {
          return std::max(c0, second.band.begin(r0 + r));
        };
        const auto last_column = [&](int64_t r) { return std::min(c1, second.band.end(r0 + r)); };
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t ra = tile_row(t), rz = tile_row(t + 1);
          const int64_t ca = first_column(ra), cz = last_column(rz - 1);
          if (ca < cz) {
            product<R, false, End::kStore>(rz - ra, cz - ca, p.d, w.qf + ra * dp, dp,
                                           w.kct + (ca - range.c0), w.t_stride,
                                           w.s + ra * s_stride + (ca - c0), s_stride);
            if (want_scores) {
              product<R, false, End::kStore>(rz - ra, cz - ca, p.dv, w.doutf + ra * dvp, dvp,
                                             w.vct + (ca - range.c0), w.t_stride,
                                             w.dp + ra * s_stride + (ca - c0), s_stride);
            }
          }
          for (int64_t r = ra; r < rz; ++r) {
            const int64_t i = r0 + r;
            R* dmask_c = nullptr;
            if (out.dmask[1]) {
              dmask_c = static_cast<R*>(out.dmask[1]) + (head * p.n_q + i) * second.band.n + c0;
            }
            const R sum = backward_row(
                w.s + r * s_stride, w.dp + r * s_stride, first_column(r) - c0, last_column(r) - c0,
                width, cap, w.lse[i - range.i0], w.delta[i - range.i0],
                first.mask ? at<R>(first.mask, first.mask_strides, b, h, i)[f] : R(0),
                second.mask ? at<R>(second.mask, second.mask_strides, b, h, i) + c0 : nullptr,
                dmask_c);
            if (out.dmask[0]) {
              static_cast<R*>(out.dmask[0])[(head * p.n_q + i) * first.band.n + f] += sum;
            }
          }
          if (want_q && ca < cz) {
            product<R, false, End::kAdd>(rz - ra, p.d, cz - ca, w.dp + ra * s_stride + (ca - c0),
                                         s_stride, w.kc + (ca - range.c0) * dp, dp, w.x + ra * dp,
                                         dp);
          }
        }
        // Where the interval of columns moves with the row, a few columns at a time meet fewer
        // rows.
        const int64_t step = second.band.window ? PYLOSS_TILE_ROWS : width;
        for (int64_t ca = c0; ca < c1; ca += step) {
          const int64_t cz = std::min(c1, ca + step);
          const int64_t ra = std::max(r0, second.band.first_query(ca, p.n_q)) - r0;
          const int64_t rz = std::min(r1, second.band.last_query(cz - 1, p.n_q)) - r0;
          const int64_t corner = ra * s_stride + (ca - c0);
          if (ra >= rz) continue;
          const int64_t at_v = (ca - range.c0) * dvp, at_k = (ca - range.c0) * dp;
          if (want_v) {
            const R *a = w.s + corner, *rows_of = dout + ra * dvp;
            if (at_once) {
              product<R, true, End::kSpread>(cz - ca, p.dv, rz - ra, a, s_stride, rows_of, dvp,
                                             dv_second + at_v, dvp,
                                             {w.vc + at_v, w.vf, dv_first + f * dvp});
            } else {
              product<R, true, End::kAdd>(cz - ca, p.dv, rz - ra, a, s_stride, rows_of, dvp,
                                          w.w + at_v, dvp);
            }
          }
          if (want_k) {
            const R *a = w.dp + corner, *rows_of = q + ra * dp;
            if (at_once) {
              product<R, true, End::kSpread>(cz - ca, p.d, rz - ra, a, s_stride, rows_of, dp,
                                             dk_second + at_k, dp,
                                             {w.kc + at_k, w.kf, dk_first + f * dp});
            } else {
              product<R, true, End::kAdd>(cz - ca, p.d, rz - ra, a, s_stride, rows_of, dp,
                                          w.g + at_k, dp);
            }
          }
        }
      }
      if (want_q) {
        R* to = dq + (r0 - range.i0) * dp;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t l = 0; l < p.d; ++l) to[r * dp + l] += w.x[r * dp + l] * w.kf[l];
        }
      }
    }
    const int64_t c = c_begin - range.c0, seen = c_end - c_begin;
    if (want_v && !at_once) {
      flush_rows(w.w + c * dvp, seen, dvp, dv_second + c * dvp, w.vf, w.vc + c * dvp,
                 dv_first + f * dvp);
    }
    if (want_k && !at_once) {
      flush_rows(w.g + c * dp, seen, dp, dk_second + c * dp, w.kf, w.kc + c * dp,
                 dk_first + f * dp);
    }
    for (int64_t l = 0; l < p.d; ++l) dk_first[f * dp + l] *= R(p.scale);
  }
}

inline Tasks tasks_of(DType t) {
  Tasks found{};
  dispatch_float(t, [&](auto x) {
    using T = decltype(x);
    using R = std::conditional_t<std::is_same<T, double>::value, double, float>;
    found = {&forward_task<T, R>, &backward_task<T, R>};
  });
  return found;
}
