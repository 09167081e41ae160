// Mixes of whole vectors: rows of P or features go through the layers, their gradients come back.
//
// No include guard: for one instruction set (per_instruction_set.h).
//
// A tile is w[n][vectors * kLanes]. Its lanes are rows of P, or columns of features, of one row of
// the batch, and a comparator's weights are one number each; or they are rows of the batch, and a
// vector of the tile is one row of P of each (PerLane): the way for small n.

template <class R>
struct Vec;
template <>
struct Vec<float> {
  typedef float V PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef int32_t I PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef int32_t Int;
  static constexpr int kLanes = PYLOSS_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef double V PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef int64_t I PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES);
  typedef int64_t Int;
  static constexpr int kLanes = PYLOSS_VECTOR_BYTES / 8;
};

// All tiles are aligned.
template <class R>
PYLOSS_INLINE typename Vec<R>::V load(const R* p) {
  return *reinterpret_cast<const typename Vec<R>::V*>(p);
}
template <class R>
PYLOSS_INLINE void store(R* p, typename Vec<R>::V v) {
  *reinterpret_cast<typename Vec<R>::V*>(p) = v;
}
// Sum by halves.
template <class R>
PYLOSS_INLINE R lane_sum(typename Vec<R>::V v) {
  constexpr int kLanes = Vec<R>::kLanes;
#if !PYLOSS_HAS_SHUFFLE
  R s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#else
  typename Vec<R>::I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  PYLOSS_UNROLL(4)
  for (int half = kLanes / 2; half > 0; half /= 2) v += PYLOSS_SHUFFLE(v, lane ^ half);
  return v[0];
#endif
}
// m[i][j] and m[j][i] change places.
template <class R>
PYLOSS_INLINE void transpose(typename Vec<R>::V* m) {
  constexpr int kLanes = Vec<R>::kLanes;
#if !PYLOSS_HAS_SHUFFLE
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const R x = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = x;
    }
  }
#else
  using V = typename Vec<R>::V;
  typename Vec<R>::I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  PYLOSS_UNROLL(4)
  for (int s = 1; s < kLanes; s *= 2) {
    // Blocks of s x s lanes, off the diagonal, change places.
    const auto second = (lane & s) != 0;
    const auto low = second ? lane - s + kLanes : lane, high = second ? lane + kLanes : lane + s;
    PYLOSS_UNROLL(16)
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const V a = m[i], b = m[i + s];
      m[i] = PYLOSS_SHUFFLE(a, b, low);
      m[i + s] = PYLOSS_SHUFFLE(a, b, high);
    }
  }
#endif
}

// log for finite x >= 0; of 0 some number below -100.
PYLOSS_INLINE Vec<float>::V log_of(Vec<float>::V x) {
  using namespace log_poly;
  using V = Vec<float>::V;
  using I = Vec<float>::I;
  const auto tiny = x < 1.17549435e-38f;  // subnormal
  x = tiny ? x * 16777216.0f : x;
  const I offset = reinterpret_cast<I>(x) - int32_t(kSqrtHalfBits);
  const V k = PYLOSS_CONVERT(offset >> 23, V) - (tiny ? V{} + 24.0f : V{});
  const V f = reinterpret_cast<V>((offset & 0x007fffff) + int32_t(kSqrtHalfBits)) - 1.0f;
  const V q =
      kC3 + f * (kC4 + f * (kC5 + f * (kC6 + f * (kC7 + f * (kC8 + f * (kC9 + f * kC10))))));
  const V y = (k * exp_poly::kLn2Lo + f * f * (f * q - 0.5f)) + f + k * exp_poly::kLn2Hi;
  return y + (x - x);
}
PYLOSS_INLINE Vec<double>::V log_of(Vec<double>::V x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x[i] = ::log(x[i]);
  return x;
}

template <class R>
struct Broadcast {
  const R *alpha, *beta;
  static constexpr bool kPerLane = false;
  PYLOSS_INLINE typename Vec<R>::V a(int64_t c) const { return alpha[c] - typename Vec<R>::V{}; }
  PYLOSS_INLINE typename Vec<R>::V b(int64_t c) const { return beta[c] - typename Vec<R>::V{}; }
  PYLOSS_INLINE void add(R* dp, int64_t c, typename Vec<R>::V v) const { dp[c] += lane_sum<R>(v); }
};
template <class R>
struct PerLane {
  const R *alpha, *beta;
  static constexpr bool kPerLane = true;
  PYLOSS_INLINE typename Vec<R>::V a(int64_t c) const { return load(alpha + c * Vec<R>::kLanes); }
  PYLOSS_INLINE typename Vec<R>::V b(int64_t c) const { return load(beta + c * Vec<R>::kLanes); }
  PYLOSS_INLINE void add(R* dp, int64_t c, typename Vec<R>::V v) const {
    store(dp + c * Vec<R>::kLanes, load(dp + c * Vec<R>::kLanes) + v);
  }
};

// One span forwards; kKeep: the differences of the wires go to t. Returns the end of t.
template <int kVectors, bool kTable, bool kKeep, class W, class R>
R* mix_span(const Net& net, int l, const Span& span, const W& weights, R* w, int64_t stride, R* t) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  const sorting::Layer layer = net.layer[l];
  const int64_t first = net.first[l];
  w += span.vector * kLanes;
  for (int32_t c = span.begin; c < span.end; ++c) {
    const sorting::Comparator pair = kTable ? net.at(l, c) : sorting::comparator(layer, c);
    R *lo = w + pair.lo * stride, *hi = w + pair.hi * stride;
    const V a = weights.a(first + c), b = weights.b(first + c);
    PYLOSS_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const V x = load(lo + v * kLanes), y = load(hi + v * kLanes);
      if (kKeep) store(t + v * kLanes, x - y);
      store(lo + v * kLanes, a * x + b * y);
      store(hi + v * kLanes, b * x + a * y);
    }
    if (kKeep) t += kVectors * kLanes;
  }
  return t;
}

// One span backwards: dp += sum of the differences of the gradients times those kept in t.
template <int kVectors, bool kTable, class W, class R>
const R* mix_span_back(const Net& net, int l, const Span& span, const W& weights, R* w,
                       int64_t stride, const R* t, R* dp) {
  using V = typename Vec<R>::V;
  constexpr int kLanes = Vec<R>::kLanes;
  const sorting::Layer layer = net.layer[l];
  const int64_t first = net.first[l];
  w += span.vector * kLanes;
  t -= int64_t(span.end - span.begin) * kVectors * kLanes;
  const R* start = t;
  for (int32_t c = span.begin; c < span.end; ++c) {
    const sorting::Comparator pair = kTable ? net.at(l, c) : sorting::comparator(layer, c);
    R *lo = w + pair.lo * stride, *hi = w + pair.hi * stride;
    const V a = weights.a(first + c), b = weights.b(first + c);
    V sum{};
    PYLOSS_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const V x = load(lo + v * kLanes), y = load(hi + v * kLanes);
      sum += (x - y) * load(t + v * kLanes);
      store(lo + v * kLanes, a * x + b * y);
      store(hi + v * kLanes, b * x + a * y);
    }
    weights.add(dp, first + c, sum);
    t += kVectors * kLanes;
  }
  return start;
}

// Steps begin .. end - 1.
template <bool kKeep, class W, class R>
R* mix_tile(const Order& order, const RowTile& tile, int begin, int end, const W& weights, R* w,
            R* t) {
  const Net& net = order.net;
  const int64_t stride = int64_t(tile.vectors) * Vec<R>::kLanes;
  for (int step = begin; step < end; ++step) {
    const int l = order.layer(step);
    const Spans spans = tile.spans(net, l);
    for (int i = 0; i < spans.count; ++i) {
      const Span& s = spans.span[i];
      if (net.table) {
        t = s.vectors == 1   ? mix_span<1, true, kKeep>(net, l, s, weights, w, stride, t)
            : s.vectors == 2 ? mix_span<2, true, kKeep>(net, l, s, weights, w, stride, t)
                             : mix_span<4, true, kKeep>(net, l, s, weights, w, stride, t);
      } else {
        t = s.vectors == 1   ? mix_span<1, false, kKeep>(net, l, s, weights, w, stride, t)
            : s.vectors == 2 ? mix_span<2, false, kKeep>(net, l, s, weights, w, stride, t)
                             : mix_span<4, false, kKeep>(net, l, s, weights, w, stride, t);
      }
    }
  }
  return t;
}
// Back from behind step end - 1 to before step `begin`; t is the end of what was kept.
template <class W, class R>
void mix_tile_back(const Order& order, const RowTile& tile, int begin, int end, const W& weights,
                   R* w, const R* t, R* dp) {
  const Net& net = order.net;
  const int64_t stride = int64_t(tile.vectors) * Vec<R>::kLanes;
  for (int step = end - 1; step >= begin; --step) {
    const int l = order.layer(step);
    const Spans spans = tile.spans(net, l);
    for (int i = spans.count - 1; i >= 0; --i) {
      const Span& s = spans.span[i];
      if (net.table) {
        t = s.vectors == 1   ? mix_span_back<1, true>(net, l, s, weights, w, stride, t, dp)
            : s.vectors == 2 ? mix_span_back<2, true>(net, l, s, weights, w, stride, t, dp)
                             : mix_span_back<4, true>(net, l, s, weights, w, stride, t, dp);
      } else {
        t = s.vectors == 1   ? mix_span_back<1, false>(net, l, s, weights, w, stride, t, dp)
            : s.vectors == 2 ? mix_span_back<2, false>(net, l, s, weights, w, stride, t, dp)
                             : mix_span_back<4, false>(net, l, s, weights, w, stride, t, dp);
      }
    }
  }
}

// A tile forwards, a function of its result that leaves the gradients in its place, and backwards.
// Segments before the last are computed again from copies of the tile.
template <class W, class R, class Fn>
void mix_and_back(const Order& order, const RowTile& tile, const std::vector<int>& cuts,
                  const W& weights, R* w, R* t, R* copies, R* dp, Fn&& gradients) {
  const int64_t size = int64_t(order.net.n) * tile.vectors * Vec<R>::kLanes;
  const int last = int(cuts.size()) - 2;
  for (int i = 0; i < last; ++i) {
    std::memcpy(copies + i * size, w, size * sizeof(R));
    mix_tile<false>(order, tile, cuts[i], cuts[i + 1], weights, w, t);
  }
  const R* end = mix_tile<true>(order, tile, cuts[last], cuts[last + 1], weights, w, t);
  gradients(w);
  mix_tile_back(order, tile, cuts[last], cuts[last + 1], weights, w, end, dp);
  for (int i = last - 1; i >= 0; --i) {
    R* x = copies + i * size;
    end = mix_tile<true>(order, tile, cuts[i], cuts[i + 1], weights, x, t);
    mix_tile_back(order, tile, cuts[i], cuts[i + 1], weights, w, end, dp);
  }
}

// ---- losses
// ------------------------------------------------------------------------------------------

// Targets of the lanes of one vector of a tile: 1 / count for ranks first .. end - 1.
template <class R>
struct LaneTargets {
  typename Vec<R>::I first{}, end{};
  typename Vec<R>::V share{};
  bool single = true;  // every count is 1
  void set(int lane, int32_t begin, int32_t count) {
    first[lane] = begin;
    end[lane] = int32_t(std::min<int64_t>(int64_t(begin) + count, INT32_MAX));
    share[lane] = R(1) / R(count);
    single &= count == 1;
  }
};

// The loss terms of rows of P, one per lane, summed over the ranks; `w` becomes their derivative
// times `scale`.
template <bool kGrad, class R>
typename Vec<R>::V bce_lanes(R* w, int64_t stride, int32_t n, const LaneTargets<R>& target,
                             R scale) {
  using V = typename Vec<R>::V;
  using I = typename Vec<R>::I;
  using Int = typename Vec<R>::Int;
  const V one = V{} + R(1);
  V logs{}, rest{};
  if (target.single) {
    // One logarithm per factors 1 - P of several ranks, since each is at least 2^-24 (2^-53) or 0;
    // `rest` is what the subtractions rounded off, which matters for small P.
    V product = one, hit = one;
    int factors = 0;
    for (int32_t r = 0; r < n; ++r) {
      R* at = w + r * stride;
      const V p0 = load(at), p = p0 > R(1) ? one : p0, z = one - p;
      const I inside = (target.first <= Int(r)) & (target.end > Int(r));
      const V factor = inside ? one : z;
      const auto dead = factor <= R(0);
      product *= dead ? one : factor;
      logs -= dead ? V{} + R(100) : V{};
      rest += inside ? V{} : (one - z) - p;
      hit = inside ? p : hit;
      if (++factors == 4) {
        logs += log_of(product);
        product = one;
        factors = 0;
      }
      if (kGrad) {
        const V pz = p * z;
        const V over = (pz < R(1e-12) ? V{} + R(1e-12) : pz);
        store(at, (p - (inside ? one : V{})) * scale / over);
      }
    }
    const V log_hit = log_of(hit);
    logs += log_of(product);
    return -(logs + rest + (log_hit < R(-100) ? V{} - R(100) : log_hit));
  }
  for (int32_t r = 0; r < n; ++r) {
    R* at = w + r * stride;
    const V p0 = load(at), p = p0 > R(1) ? one : p0, z = one - p;
    const I inside = (target.first <= Int(r)) & (target.end > Int(r));
    const V q = inside ? target.share : V{};
    const V log_p = log_of(p), log_z = log_of(z) + ((one - z) - p);
    logs += q * (log_p < R(-100) ? V{} - R(100) : log_p) +
            (one - q) * (log_z < R(-100) ? V{} - R(100) : log_z);
    if (kGrad) {
      const V pz = p * z;
      store(at, (p - q) * scale / (pz < R(1e-12) ? V{} + R(1e-12) : pz));
    }
  }
  return -logs;
}

template <bool kGrad, class R>
typename Vec<R>::V ce_lanes(R* w, int64_t stride, int32_t n, const LaneTargets<R>& target,
                            R scale) {
  using V = typename Vec<R>::V;
  using I = typename Vec<R>::I;
  using Int = typename Vec<R>::Int;
  const V one = V{} + R(1);
  V logs{}, hit = one;
  for (int32_t r = 0; r < n; ++r) {
    R* at = w + r * stride;
    const V p = load(at);
    const I inside = (target.first <= Int(r)) & (target.end > Int(r));
    if (target.single) {
      hit = inside ? p : hit;
      if (kGrad) store(at, (inside & (p > R(1e-30))) ? -scale / p : V{});
    } else {
      const V q = inside ? target.share : V{};
      const V shown = p < R(1e-30) ? V{} + R(1e-30) : p;
      logs += inside ? q * log_of(shown) : V{};
      if (kGrad) store(at, (inside & (p > R(1e-30))) ? -scale * q / p : V{});
    }
  }
  if (target.single) logs = log_of(hit < R(1e-30) ? V{} + R(1e-30) : hit);
  return -logs;
}

template <class R>
R loss_scale(sorting::Loss kind, int64_t n) {
  return kind == sorting::Loss::kBce ? R(1) / (R(n) * R(n)) : R(1) / R(n);
}
template <class R>
PYLOSS_INLINE typename Vec<R>::V loss_lanes(sorting::Loss kind, R* w, int64_t stride, int32_t n,
                                            const LaneTargets<R>& target, bool grad) {
  const R scale = loss_scale<R>(kind, n);
  if (kind == sorting::Loss::kBce) {
    return grad ? bce_lanes<true, R>(w, stride, n, target, scale)
                : bce_lanes<false, R>(w, stride, n, target, scale);
  }
  return grad ? ce_lanes<true, R>(w, stride, n, target, scale)
              : ce_lanes<false, R>(w, stride, n, target, scale);
}
