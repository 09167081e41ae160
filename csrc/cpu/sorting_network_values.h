// Sweeps of the values through the layers, and of their gradients back, for one instruction set
// (per_instruction_set.h). Loops over lanes that the compiler vectorises; a lane is a row of the
// batch (x[n][kLanes]) or a comparator of one row.

// What a sweep leaves for the mixes of P and for the way back, one entry per comparator and lane.
template <class R>
struct Trace {
  R *alpha, *beta;
  R* step;   // d alpha / d d times d
  R* slope;  // d alpha / d d; null where nothing but the values is differentiated
  Trace from(int64_t at) const {
    return {alpha + at, beta + at, step + at, slope ? slope + at : nullptr};
  }
};
enum class Keep { kNothing, kValues, kAll };

// m comparators whose wires stand in lo[] and hi[].
template <sorting::Distribution kKind, Keep kKeep, class R>
PYLOSS_INLINE void mix_lanes(R* __restrict lo, R* __restrict hi, int m,
                             const sorting::Relaxation<R>& relaxation, const Trace<R>& trace) {
  R* __restrict alpha = trace.alpha;
  R* __restrict beta = trace.beta;
  R* __restrict step = trace.step;
  R* __restrict slope = trace.slope;
  for (int i = 0; i < m; ++i) {
    const auto mixed = sorting::mix_values<kKind, LaneMath<R>>(lo[i], hi[i], relaxation);
    lo[i] = mixed.lo;
    hi[i] = mixed.hi;
    if (kKeep != Keep::kNothing) {
      alpha[i] = mixed.alpha;
      beta[i] = mixed.beta;
      step[i] = mixed.slope * mixed.d;
    }
    if (kKeep == Keep::kAll) slope[i] = mixed.slope;
  }
}

// dp: dL / d alpha by way of P or of features, or null.
template <bool kDp, class R>
PYLOSS_INLINE void mix_gradient_lanes(R* __restrict lo, R* __restrict hi, int m,
                                      const Trace<R>& trace, const R* __restrict dp) {
  const R* __restrict alpha = trace.alpha;
  const R* __restrict beta = trace.beta;
  const R* __restrict step = trace.step;
  const R* __restrict slope = trace.slope;
  for (int i = 0; i < m; ++i) {
    const R own = kDp ? dp[i] * slope[i] : R(0);
    sorting::mix_gradients(&lo[i], &hi[i], alpha[i], beta[i], R(1), step[i], own);
  }
}

// fn(lo[], hi[], m, c) for runs of m comparators of layer l from number c on, of wires in x[n];
// what fn writes into the two arrays goes back to the wires. Short runs are gathered.
constexpr int kGathered = 64;
template <class R, class Fn>
PYLOSS_INLINE void for_runs(const Net& net, int l, R* x, Fn&& fn) {
  const sorting::Layer& layer = net.layer[l];
  const bool arithmetic = !net.table;
  if (arithmetic && layer.period >= 16) {
    for (int32_t c = 0; c < layer.count;) {
      const int32_t in_run = (c + layer.skip) & (layer.period - 1);
      const int32_t m = std::min(layer.period - in_run, layer.count - c);
      const sorting::Comparator pair = sorting::comparator(layer, c);
      fn(x + pair.lo, x + pair.hi, m, c);
      c += m;
    }
    return;
  }
  alignas(64) R lo[kGathered], hi[kGathered];
  int32_t at_lo[kGathered], at_hi[kGathered];
  for (int32_t c = 0; c < layer.count; c += kGathered) {
    const int m = std::min<int32_t>(kGathered, layer.count - c);
    if (net.network == sorting::Network::kOddEven) {
      R* pairs = x + layer.shift + 2 * c;
      for (int i = 0; i < m; ++i) {
        lo[i] = pairs[2 * i];
        hi[i] = pairs[2 * i + 1];
      }
      fn(lo, hi, m, c);
      for (int i = 0; i < m; ++i) {
        pairs[2 * i] = lo[i];
        pairs[2 * i + 1] = hi[i];
      }
      continue;
    }
    for (int i = 0; i < m; ++i) {
      const sorting::Comparator pair =
          arithmetic ? sorting::comparator(layer, c + i) : net.at(l, c + i);
      at_lo[i] = pair.lo;
      at_hi[i] = pair.hi;
    }
    for (int i = 0; i < m; ++i) {
      lo[i] = x[at_lo[i]];
      hi[i] = x[at_hi[i]];
    }
    fn(lo, hi, m, c);
    for (int i = 0; i < m; ++i) {
      x[at_lo[i]] = lo[i];
      x[at_hi[i]] = hi[i];
    }
  }
}

// Layers begin .. end - 1 of kLanes rows at once (x[n][kLanes]) or of one row (x[n]); the trace
// starts with the first comparator of layer `begin`.
template <sorting::Distribution kKind, Keep kKeep, bool kBatch, class R>
void sweep_of(const Net& net, const sorting::Relaxation<R>& relaxation, int begin, int end, R* x,
              const Trace<R>& trace) {
  constexpr int kLanes = Vec<R>::kLanes;
  for (int l = begin; l < end; ++l) {
    const int64_t at = net.first[l] - net.first[begin];
    if (kBatch) {
      for (int32_t c = 0; c < net.layer[l].count; ++c) {
        const sorting::Comparator pair = net.at(l, c);
        mix_lanes<kKind, kKeep>(x + int64_t(pair.lo) * kLanes, x + int64_t(pair.hi) * kLanes,
                                kLanes, relaxation,
                                kKeep == Keep::kNothing ? trace : trace.from((at + c) * kLanes));
      }
    } else {
      for_runs(net, l, x, [&](R* lo, R* hi, int m, int32_t c) {
        mix_lanes<kKind, kKeep>(lo, hi, m, relaxation,
                                kKeep == Keep::kNothing ? trace : trace.from(at + c));
      });
    }
  }
}

template <Keep kKeep, bool kBatch, class R>
void sweep(const Net& net, const sorting::Relaxation<R>& relaxation, int begin, int end, R* x,
           const Trace<R>& trace) {
  using sorting::Distribution;
  switch (net.distribution) {
#define PYLOSS_SWEEP(kind) \
  case kind:               \
    return sweep_of<kind, kKeep, kBatch>(net, relaxation, begin, end, x, trace);
    PYLOSS_SWEEP(Distribution::kLogistic)
    PYLOSS_SWEEP(Distribution::kLogisticPhi)
    PYLOSS_SWEEP(Distribution::kGaussian)
    PYLOSS_SWEEP(Distribution::kCauchy)
    PYLOSS_SWEEP(Distribution::kReciprocal)
    PYLOSS_SWEEP(Distribution::kOptimal)
#undef PYLOSS_SWEEP
  }
}

// g from behind layer end - 1 to before layer `begin`; dp is laid out as the trace, or null.
template <bool kDp, bool kBatch, class R>
void sweep_back_of(const Net& net, int begin, int end, R* g, const Trace<R>& trace, const R* dp) {
  constexpr int kLanes = Vec<R>::kLanes;
  for (int l = end - 1; l >= begin; --l) {
    const int64_t at = net.first[l] - net.first[begin];
    if (kBatch) {
      for (int32_t c = 0; c < net.layer[l].count; ++c) {
        const sorting::Comparator pair = net.at(l, c);
        const int64_t lane = (at + c) * kLanes;
        mix_gradient_lanes<kDp>(g + int64_t(pair.lo) * kLanes, g + int64_t(pair.hi) * kLanes,
                                kLanes, trace.from(lane), kDp ? dp + lane : nullptr);
      }
    } else {
      for_runs(net, l, g, [&](R* lo, R* hi, int m, int32_t c) {
        mix_gradient_lanes<kDp>(lo, hi, m, trace.from(at + c), kDp ? dp + at + c : nullptr);
      });
    }
  }
}
template <bool kBatch, class R>
void sweep_back(const Net& net, int begin, int end, R* g, const Trace<R>& trace, const R* dp) {
  if (dp) {
    sweep_back_of<true, kBatch>(net, begin, end, g, trace, dp);
  } else {
    sweep_back_of<false, kBatch>(net, begin, end, g, trace, dp);
  }
}
