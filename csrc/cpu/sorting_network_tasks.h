// The operations on ranges of the batch, for one instruction set (per_instruction_set.h).
//
// `Lanes`: kLanes rows of the batch at once, x[n][kLanes]. `Single`: one row, whose comparators (in
// the sweeps) and rows of P or features (in the mixes) are the lanes.
#include "cpu/sorting_network_tile.h"
// After its vector types.
#include "cpu/sorting_network_values.h"

template <class R>
struct Shared {
  const sorting::Problem& p;
  const Net& net;
  sorting::Relaxation<R> relaxation;
  Shared(const sorting::Problem& problem, const Net& network)
      : p(problem), net(network), relaxation{R(problem.steepness), R(problem.art_lambda)} {}
  const R* x(int64_t item) const { return static_cast<const R*>(p.x) + item * p.n; }
};

template <class R>
bool has_nan(const R* x, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= !(x[i] == x[i]);
  return found;
}
template <class R>
void fill_nan(R* x, int64_t n) {
  std::fill_n(x, n, nan_<R>());
}
// The gradient of a row: 0 where x is infinite.
template <class R>
void finish_gradient(const R* x, const R* g, bool bad, int64_t n, int64_t g_stride, R* gx) {
  const R most = sorting::Limits<R>::kMax;
  for (int64_t i = 0; i < n; ++i) {
    const R value = bad ? nan_<R>() : g[i * g_stride];
    gx[i] = x[i] > most || x[i] < -most ? R(0) : value;
  }
}

// ---- kLanes rows of the batch
// ------------------------------------------------------------------------

template <class R>
class Lanes {
 public:
  static constexpr int kLanes = Vec<R>::kLanes;
  // d: features; `rows`: of P that a tile has.
  Lanes(const Shared<R>& shared, bool trace, bool back, const TilePlan* plan)
      : s_(shared),
        net_(shared.net),
        n_(shared.p.n),
        plan_(plan),
        x_(n_ * kLanes),
        g_(back ? n_ * kLanes : 0),
        trace_(trace ? 4 * net_.comparators() * kLanes : 0),
        dp_(back && plan ? net_.comparators() * kLanes : 0),
        w_(plan ? n_ * plan->vectors * kLanes : 0),
        copies_(plan ? plan->copies * n_ * plan->vectors * kLanes : 0),
        t_(plan ? plan->kept * kLanes : 0) {}

  void sort(int64_t item, int64_t end, R* y) {
    load_items(item, end);
    sweep<Keep::kNothing, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), Trace<R>{});
    store_values(x_.get(), y);
  }
  void sort_backward(int64_t item, int64_t end, const R* gy, R* gx) {
    load_items(item, end);
    sweep<Keep::kValues, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(false));
    load_values(gy, g_.get());
    sweep_back<true>(net_, 0, net_.layers, g_.get(), trace(false), static_cast<R*>(nullptr));
    store_gradient(gx);
  }

  void apply(int64_t item, int64_t end, const sorting::Features& f, R* out) {
    load_items(item, end);
    sweep<Keep::kValues, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(false));
    const Order order{net_, !f.transpose};
    for (int64_t k = 0; k < f.width; ++k) {
      load_features(f, static_cast<const R*>(f.f), f.shared, k);
      mix_tile<false>(order, plan_->tiles[0], 0, net_.layers, weights(), w_.get(), t_.get());
      for (int lane = 0; lane < count_; ++lane) {
        R* to = out + (item_ + lane) * n_ * f.width + k;
        for (int64_t i = 0; i < n_; ++i) {
          to[i * f.width] = bad_[lane] ? nan_<R>() : w_[i * kLanes + lane];
        }
      }
    }
  }
  // gf: of the whole batch, or the sum for shared features, or null.
  void apply_backward(int64_t item, int64_t end, const sorting::Features& f, const R* g, R* gx,
                      R* gf) {
    load_items(item, end);
    sweep<Keep::kAll, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(true));
    std::fill_n(dp_.get(), net_.comparators() * kLanes, R(0));
    const Order order{net_, !f.transpose};
    for (int64_t k = 0; k < f.width; ++k) {
      load_features(f, static_cast<const R*>(f.f), f.shared, k);
      mix_and_back(order, plan_->tiles[0], plan_->cuts[0], weights(), w_.get(), t_.get(),
                   copies_.get(), dp_.get(), [&](R*) { load_features(f, g, false, k); });
      if (!gf) continue;
      for (int lane = 0; lane < count_; ++lane) {
        R* to = gf + (f.shared ? 0 : (item_ + lane) * n_ * f.width) + k;
        for (int64_t i = 0; i < n_; ++i) {
          const R value = bad_[lane] ? nan_<R>() : w_[i * kLanes + lane];
          to[i * f.width] = f.shared ? to[i * f.width] + value : value;
        }
      }
    }
    std::fill_n(g_.get(), n_ * kLanes, R(0));
    sweep_back<true>(net_, 0, net_.layers, g_.get(), trace(true), dp_.get());
    store_gradient(gx);
  }

  void permutation(int64_t item, int64_t end, R* y, R* permutation) {
    load_items(item, end);
    sweep<Keep::kValues, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(false));
    store_values(x_.get(), y);
    const Order order{net_, false};
    for (const RowTile& tile : plan_->tiles) {
      unit_rows(tile);
      mix_tile<false>(order, tile, 0, net_.layers, weights(), w_.get(), t_.get());
      each_entry(tile, [&](int lane, int64_t at, R* w) {
        permutation[(item_ + lane) * n_ * n_ + at] = bad_[lane] ? nan_<R>() : *w;
      });
    }
  }
  void permutation_backward(int64_t item, int64_t end, const R* gy, const R* gp, R* gx) {
    load_items(item, end);
    sweep<Keep::kAll, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(true));
    std::fill_n(dp_.get(), net_.comparators() * kLanes, R(0));
    const Order order{net_, false};
    for (size_t i = 0; i < plan_->tiles.size(); ++i) {
      const RowTile& tile = plan_->tiles[i];
      unit_rows(tile);
      mix_and_back(order, tile, plan_->cuts[i], weights(), w_.get(), t_.get(), copies_.get(),
                   dp_.get(), [&](R* w) {
                     std::fill_n(w, n_ * tile.vectors * kLanes, R(0));
                     each_entry(tile, [&](int lane, int64_t at, R* entry) {
                       *entry = gp[(item_ + lane) * n_ * n_ + at];
                     });
                   });
    }
    back_to_x(gy, gx);
  }

  void loss(int64_t item, int64_t end, const RankTargets& targets, R* loss, R* gx) {
    load_items(item, end);
    sweep<Keep::kAll, true>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace(true));
    if (gx) std::fill_n(dp_.get(), net_.comparators() * kLanes, R(0));
    const Order order{net_, false};
    double sums[kLanes] = {};
    for (size_t i = 0; i < plan_->tiles.size(); ++i) {
      const RowTile& tile = plan_->tiles[i];
      const auto gradients = [&](R* w) {
        for (int v = 0; v < tile.vectors; ++v) {
          const int64_t row = tile.row + v;
          if (row < 0 || row >= n_) continue;
          LaneTargets<R> t;
          for (int lane = 0; lane < count_; ++lane) {
            const int64_t at = (item_ + lane) * n_ + row;
            t.set(lane, targets.first[at], targets.width(at));
          }
          const auto terms = loss_lanes(targets.kind, w + v * kLanes,
                                        int64_t(tile.vectors) * kLanes, n_, t, gx != nullptr);
          for (int lane = 0; lane < count_; ++lane) sums[lane] += terms[lane];
        }
      };
      unit_rows(tile);
      if (gx) {
        mix_and_back(order, tile, plan_->cuts[i], weights(), w_.get(), t_.get(), copies_.get(),
                     dp_.get(), gradients);
      } else {
        mix_tile<false>(order, tile, 0, net_.layers, weights(), w_.get(), t_.get());
        gradients(w_.get());
      }
    }
    for (int lane = 0; lane < count_; ++lane) {
      loss[item_ + lane] = bad_[lane] ? nan_<R>() : R(sums[lane] * loss_scale<R>(targets.kind, n_));
    }
    if (gx) back_to_x(nullptr, gx);
  }

 private:
  Trace<R> trace(bool all) const {
    const int64_t size = net_.comparators() * kLanes;
    R* at = trace_.get();
    return {at, at + size, at + 2 * size, all ? at + 3 * size : nullptr};
  }
  PerLane<R> weights() const { return {trace_.get(), trace_.get() + net_.comparators() * kLanes}; }

  void load_items(int64_t item, int64_t end) {
    item_ = item;
    count_ = int(end - item);
    for (int lane = 0; lane < kLanes; ++lane) {
      bad_[lane] = lane < count_ && has_nan(s_.x(item + lane), n_);
    }
    load_values(static_cast<const R*>(s_.p.x), x_.get());
    for (int lane = 0; lane < count_; ++lane) {
      for (int64_t i = 0; bad_[lane] && i < n_; ++i) x_[i * kLanes + lane] = R(0);
    }
  }
  void load_values(const R* from, R* to) const {
    typename Vec<R>::V block[kLanes];
    from += item_ * n_;
    int64_t i = 0;
    for (; count_ == kLanes && i + kLanes <= n_; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&block[lane], from + lane * n_ + i, sizeof block[lane]);
      }
      transpose<R>(block);
      for (int j = 0; j < kLanes; ++j) store(to + (i + j) * kLanes, block[j]);
    }
    for (; i < n_; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        to[i * kLanes + lane] = lane < count_ ? from[lane * n_ + i] : R(0);
      }
    }
  }
  void store_values(const R* from, R* to) const {
    typename Vec<R>::V block[kLanes];
    to += item_ * n_;
    int64_t i = 0;
    for (; count_ == kLanes && i + kLanes <= n_; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) block[j] = load(from + (i + j) * kLanes);
      transpose<R>(block);
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(to + lane * n_ + i, &block[lane], sizeof block[lane]);
      }
    }
    for (; i < n_; ++i) {
      for (int lane = 0; lane < count_; ++lane) to[lane * n_ + i] = from[i * kLanes + lane];
    }
    for (int lane = 0; lane < count_; ++lane) {
      if (bad_[lane]) fill_nan(to + lane * n_, n_);
    }
  }
  void store_gradient(R* gx) const {
    store_values(g_.get(), gx);
    for (int lane = 0; lane < count_; ++lane) {
      R* to = gx + (item_ + lane) * n_;
      finish_gradient(s_.x(item_ + lane), to, bad_[lane], n_, 1, to);
    }
  }
  void back_to_x(const R* gy, R* gx) {
    if (gy) {
      load_values(gy, g_.get());
    } else {
      std::fill_n(g_.get(), n_ * kLanes, R(0));
    }
    sweep_back<true>(net_, 0, net_.layers, g_.get(), trace(true), dp_.get());
    store_gradient(gx);
  }
  void load_features(const sorting::Features& f, const R* from, bool shared, int64_t k) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      const R* row = from + (shared ? 0 : (item_ + std::min(lane, count_ - 1)) * n_ * f.width) + k;
      for (int64_t i = 0; i < n_; ++i) w_[i * kLanes + lane] = row[i * f.width];
    }
  }
  void unit_rows(const RowTile& tile) const {
    const int64_t stride = int64_t(tile.vectors) * kLanes;
    std::fill_n(w_.get(), n_ * stride, R(0));
    for (int v = 0; v < tile.vectors; ++v) {
      const int64_t row = tile.row + v;
      if (row >= 0 && row < n_) std::fill_n(w_.get() + row * stride + v * kLanes, kLanes, R(1));
    }
  }
  // fn(lane, i n + r, entry) for the entries of P in a tile.
  template <class Fn>
  void each_entry(const RowTile& tile, Fn&& fn) const {
    const int64_t stride = int64_t(tile.vectors) * kLanes;
    for (int v = 0; v < tile.vectors; ++v) {
      const int64_t row = tile.row + v;
      if (row < 0 || row >= n_) continue;
      for (int lane = 0; lane < count_; ++lane) {
        for (int64_t r = 0; r < n_; ++r) {
          fn(lane, row * n_ + r, w_.get() + r * stride + v * kLanes + lane);
        }
      }
    }
  }

  const Shared<R>& s_;
  const Net& net_;
  const int64_t n_;
  const TilePlan* plan_;
  Array<R> x_, g_, trace_, dp_, w_, copies_, t_;
  int64_t item_ = 0;
  int count_ = 0;
  bool bad_[kLanes] = {};
};

// ---- one row of the batch
// ----------------------------------------------------------------------------

template <class R>
class Single {
 public:
  static constexpr int kLanes = Vec<R>::kLanes;
  Single(const Shared<R>& shared, bool trace, bool back, const TilePlan* plan)
      : s_(shared),
        net_(shared.net),
        n_(shared.p.n),
        back_(back && plan),
        plan_(plan),
        x_(n_),
        g_(back ? n_ : 0),
        trace_(trace ? 4 * padded(net_.comparators()) : 0),
        dp_(back && plan ? net_.comparators() : 0),
        w_(plan ? n_ * plan->vectors * kLanes : 0),
        copies_(plan ? plan->copies * n_ * plan->vectors * kLanes : 0),
        t_(plan ? plan->kept * kLanes : 0) {}

  void sort(int64_t item, R* y) {
    y += item * n_;
    if (has_nan(s_.x(item), n_)) return fill_nan(y, n_);
    std::copy_n(s_.x(item), n_, y);
    sweep<Keep::kNothing, false>(net_, s_.relaxation, 0, net_.layers, y, Trace<R>{});
  }

  // Values only, so n may be large: from copies of x about every sqrt(L) layers.
  void sort_backward(int64_t item, const R* gy, R* gx) {
    gx += item * n_;
    if (has_nan(s_.x(item), n_)) return finish_gradient(s_.x(item), gx, true, n_, 1, gx);
    constexpr int64_t kTogether = 1 << 18;
    const int layers = net_.layers;
    const int step = net_.comparators() <= kTogether ? std::max(layers, 1)
                                                     : int(std::ceil(std::sqrt(double(layers))));
    const int segments = std::max(1, (layers + step - 1) / step);
    const auto end_of = [&](int i) { return std::min(layers, (i + 1) * step); };
    int64_t most = 0;
    for (int i = 0; i < segments; ++i) {
      most = std::max(most, net_.first[end_of(i)] - net_.first[i * step]);
    }
    const Array<R> kept(3 * most), copies(int64_t(segments) * n_);
    const Trace<R> trace{kept.get(), kept.get() + most, kept.get() + 2 * most, nullptr};
    R* x = copies.get();
    std::copy_n(s_.x(item), n_, x);
    for (int i = 0; i + 1 < segments; ++i, x += n_) {
      std::copy_n(x, n_, x + n_);
      sweep<Keep::kNothing, false>(net_, s_.relaxation, i * step, end_of(i), x + n_, Trace<R>{});
    }
    std::copy_n(gy + item * n_, n_, gx);
    for (int i = segments - 1; i >= 0; --i, x -= n_) {
      sweep<Keep::kValues, false>(net_, s_.relaxation, i * step, end_of(i), x, trace);
      sweep_back<false>(net_, i * step, end_of(i), gx, trace, static_cast<R*>(nullptr));
    }
    finish_gradient(s_.x(item), gx, false, n_, 1, gx);
  }

  void apply(int64_t item, const sorting::Features& f, R* out) {
    out += item * n_ * f.width;
    if (!start(item)) return fill_nan(out, n_ * f.width);
    const R* from = static_cast<const R*>(f.f) + (f.shared ? 0 : item * n_ * f.width);
    const Order order{net_, !f.transpose};
    for (const RowTile& tile : plan_->tiles) {
      load_features(from, f.width, tile);
      mix_tile<false>(order, tile, 0, net_.layers, weights(), w_.get(), t_.get());
      store_features(out, f.width, tile, false);
    }
  }
  void apply_backward(int64_t item, const sorting::Features& f, const R* g, R* gx, R* gf) {
    gx += item * n_;
    if (gf && !f.shared) gf += item * n_ * f.width;
    if (!start(item)) {
      if (gf) fill_nan(gf, n_ * f.width);
      return finish_gradient(s_.x(item), gx, true, n_, 1, gx);
    }
    const R* from = static_cast<const R*>(f.f) + (f.shared ? 0 : item * n_ * f.width);
    const Order order{net_, !f.transpose};
    for (size_t i = 0; i < plan_->tiles.size(); ++i) {
      const RowTile& tile = plan_->tiles[i];
      load_features(from, f.width, tile);
      mix_and_back(order, tile, plan_->cuts[i], weights(), w_.get(), t_.get(), copies_.get(),
                   dp_.get(), [&](R*) { load_features(g + item * n_ * f.width, f.width, tile); });
      if (gf) store_features(gf, f.width, tile, f.shared);
    }
    back_to_x(item, nullptr, gx);
  }

  void permutation(int64_t item, R* y, R* permutation) {
    y += item * n_;
    permutation += item * n_ * n_;
    if (!start(item)) {
      fill_nan(y, n_);
      return fill_nan(permutation, n_ * n_);
    }
    std::copy_n(x_.get(), n_, y);
    const Order order{net_, false};
    for (const RowTile& tile : plan_->tiles) {
      unit_rows(tile);
      mix_tile<false>(order, tile, 0, net_.layers, weights(), w_.get(), t_.get());
      move_rows<false>(tile, permutation);
    }
  }
  void permutation_backward(int64_t item, const R* gy, const R* gp, R* gx) {
    gx += item * n_;
    if (!start(item)) return finish_gradient(s_.x(item), gx, true, n_, 1, gx);
    const Order order{net_, false};
    for (size_t i = 0; i < plan_->tiles.size(); ++i) {
      const RowTile& tile = plan_->tiles[i];
      unit_rows(tile);
      mix_and_back(order, tile, plan_->cuts[i], weights(), w_.get(), t_.get(), copies_.get(),
                   dp_.get(),
                   [&](R*) { move_rows<true>(tile, const_cast<R*>(gp) + item * n_ * n_); });
    }
    back_to_x(item, gy, gx);
  }

  void loss(int64_t item, const RankTargets& targets, R* loss, R* gx) {
    if (gx) gx += item * n_;
    if (!start(item)) {
      loss[item] = nan_<R>();
      if (gx) finish_gradient(s_.x(item), gx, true, n_, 1, gx);
      return;
    }
    const Order order{net_, false};
    double sum = 0;
    for (size_t i = 0; i < plan_->tiles.size(); ++i) {
      const RowTile& tile = plan_->tiles[i];
      const auto gradients = [&](R* w) {
        for (int v = 0; v < tile.vectors; ++v) {
          const int64_t row = tile.row + v * kLanes;
          LaneTargets<R> t;
          for (int lane = 0; lane < kLanes; ++lane) {
            if (row + lane < 0 || row + lane >= n_) continue;
            const int64_t at = item * n_ + row + lane;
            t.set(lane, targets.first[at], targets.width(at));
          }
          const auto terms = loss_lanes(targets.kind, w + v * kLanes,
                                        int64_t(tile.vectors) * kLanes, n_, t, gx != nullptr);
          for (int lane = 0; lane < kLanes; ++lane) {
            if (row + lane >= 0 && row + lane < n_) sum += terms[lane];
          }
        }
      };
      unit_rows(tile);
      if (gx) {
        mix_and_back(order, tile, plan_->cuts[i], weights(), w_.get(), t_.get(), copies_.get(),
                     dp_.get(), gradients);
      } else {
        mix_tile<false>(order, tile, 0, net_.layers, weights(), w_.get(), t_.get());
        gradients(w_.get());
      }
    }
    loss[item] = R(sum * loss_scale<R>(targets.kind, n_));
    if (gx) back_to_x(item, nullptr, gx);
  }

 private:
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  Trace<R> trace() const {
    const int64_t size = padded(net_.comparators());
    R* at = trace_.get();
    return {at, at + size, at + 2 * size, at + 3 * size};
  }
  Broadcast<R> weights() const { return {trace_.get(), trace_.get() + padded(net_.comparators())}; }
  // The values and the trace; false for a row with NaN.
  bool start(int64_t item) {
    if (has_nan(s_.x(item), n_)) return false;
    if (back_) std::fill_n(dp_.get(), net_.comparators(), R(0));
    std::copy_n(s_.x(item), n_, x_.get());
    sweep<Keep::kAll, false>(net_, s_.relaxation, 0, net_.layers, x_.get(), trace());
    return true;
  }
  void back_to_x(int64_t item, const R* gy, R* gx) {
    if (gy) {
      std::copy_n(gy + item * n_, n_, g_.get());
    } else {
      std::fill_n(g_.get(), n_, R(0));
    }
    sweep_back<false>(net_, 0, net_.layers, g_.get(), trace(), dp_.get());
    finish_gradient(s_.x(item), g_.get(), false, n_, 1, gx);
  }
  void load_features(const R* from, int64_t d, const RowTile& tile) const {
    const int64_t height = int64_t(tile.vectors) * kLanes, m = std::min(height, d - tile.row);
    for (int64_t i = 0; i < n_; ++i) {
      R* to = w_.get() + i * height;
      std::copy_n(from + i * d + tile.row, m, to);
      std::fill_n(to + m, height - m, R(0));
    }
  }
  void store_features(R* to, int64_t d, const RowTile& tile, bool add) const {
    const int64_t height = int64_t(tile.vectors) * kLanes, m = std::min(height, d - tile.row);
    for (int64_t i = 0; i < n_; ++i) {
      const R* from = w_.get() + i * height;
      R* row = to + i * d + tile.row;
      for (int64_t k = 0; k < m; ++k) row[k] = add ? row[k] + from[k] : from[k];
    }
  }
  void unit_rows(const RowTile& tile) const {
    const int64_t height = int64_t(tile.vectors) * kLanes;
    std::fill_n(w_.get(), n_ * height, R(0));
    for (int64_t q = 0; q < height; ++q) {
      const int64_t row = tile.row + q;
      if (row >= 0 && row < n_) w_[row * height + q] = R(1);
    }
  }
  // Between a tile and its rows of a matrix [n][n]: in (kIn) or out.
  template <bool kIn>
  void move_rows(const RowTile& tile, R* matrix) const {
    using V = typename Vec<R>::V;
    const int64_t height = int64_t(tile.vectors) * kLanes;
    for (int v = 0; v < tile.vectors; ++v) {
      const int64_t row = tile.row + v * kLanes;
      R* w = w_.get() + v * kLanes;
      const bool whole = row >= 0 && row + kLanes <= n_;
      int64_t r = 0;
      V block[kLanes];
      for (; whole && r + kLanes <= n_; r += kLanes) {
        for (int j = 0; j < kLanes; ++j) {
          if (kIn) std::memcpy(&block[j], matrix + (row + j) * n_ + r, sizeof block[j]);
          if (!kIn) block[j] = load(w + (r + j) * height);
        }
        transpose<R>(block);
        for (int j = 0; j < kLanes; ++j) {
          if (kIn) store(w + (r + j) * height, block[j]);
          if (!kIn) std::memcpy(matrix + (row + j) * n_ + r, &block[j], sizeof block[j]);
        }
      }
      for (; r < n_; ++r) {
        for (int lane = 0; lane < kLanes; ++lane) {
          R& entry = w[r * height + lane];
          const bool real = row + lane >= 0 && row + lane < n_;
          if (kIn) entry = real ? matrix[(row + lane) * n_ + r] : R(0);
          if (!kIn && real) matrix[(row + lane) * n_ + r] = entry;
        }
      }
    }
  }

  const Shared<R>& s_;
  const Net& net_;
  const int64_t n_;
  const bool back_;
  const TilePlan* plan_;
  Array<R> x_, g_, trace_, dp_, w_, copies_, t_;
};

// ---- the whole batch
// ---------------------------------------------------------------------------------

// Worth two threads?
template <class R>
int width_for(const sorting::Problem& p, const Net& net, int64_t mixes, int threads) {
  const double vectors = double(p.items) * double(net.comparators()) * double(mixes);
  return vectors < 2e4 ? 1 : threads;
}
// Whether kLanes rows of the batch go together: not if that wastes lanes, or if their traces, of
// `arrays` numbers per comparator, leave the cache.
template <class R>
bool in_lanes(const sorting::Problem& p, const Net& net, int64_t arrays) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  return p.items >= kLanes / 2 &&
         net.comparators() * kLanes * arrays * int64_t(sizeof(R)) <= 2 * l2_cache_bytes();
}
template <class R>
bool rows_in_lanes(const sorting::Problem& p) {
  return p.items >= Vec<R>::kLanes / 2 && p.n <= 15;
}
// Room for a tile's differences. Somewhat more than the cache: what a segment does not have to
// compute again outweighs what it fetches from the next level; twice the cache no longer does.
template <class R>
int64_t vectors_in_cache() {
  return 3 * l2_cache_bytes() / 2 / int64_t(sizeof(typename Vec<R>::V));
}
template <class R>
int64_t groups_of(int64_t items) {
  return (items + Vec<R>::kLanes - 1) / Vec<R>::kLanes;
}

// fn(worker, first item, end) for groups of kLanes items of a batch.
template <class R, class Fn>
void each_group(const Shared<R>& s, bool trace, bool back, const TilePlan* plan, int threads,
                Fn&& fn) {
  constexpr int64_t kLanes = Vec<R>::kLanes;
  run_slots(groups_of<R>(s.p.items), threads, [&](const auto& next) {
    Lanes<R> worker(s, trace, back, plan);
    for (int64_t i; (i = next()) >= 0;) {
      fn(worker, i * kLanes, std::min(s.p.items, (i + 1) * kLanes));
    }
  });
}
// fn(worker, item).
template <class R, class Fn>
void each_item(const Shared<R>& s, bool trace, bool back, const TilePlan* plan, int threads,
               Fn&& fn) {
  run_slots(s.p.items, threads, [&](const auto& next) {
    Single<R> worker(s, trace, back, plan);
    for (int64_t i; (i = next()) >= 0;) fn(worker, i);
  });
}

template <class R>
struct Batch {
  static constexpr int kLanes = Vec<R>::kLanes;

  static void sort(const sorting::Problem& p, const Net& net, void* y, int threads) {
    const Shared<R> s(p, net);
    R* out = static_cast<R*>(y);
    threads = width_for<R>(p, net, 1, threads);
    if (p.items >= kLanes / 2 && p.n * int64_t(kLanes * sizeof(R)) <= l2_cache_bytes()) {
      each_group(s, false, false, nullptr, threads,
                 [&](Lanes<R>& w, int64_t i, int64_t end) { w.sort(i, end, out); });
    } else {
      each_item(s, false, false, nullptr, threads,
                [&](Single<R>& w, int64_t i) { w.sort(i, out); });
    }
  }
  static void sort_backward(const sorting::Problem& p, const Net& net, const void* gy, void* gx,
                            int threads) {
    const Shared<R> s(p, net);
    const R* g = static_cast<const R*>(gy);
    R* out = static_cast<R*>(gx);
    threads = width_for<R>(p, net, 1, threads);
    if (in_lanes<R>(p, net, 3)) {
      each_group(s, true, true, nullptr, threads,
                 [&](Lanes<R>& w, int64_t i, int64_t end) { w.sort_backward(i, end, g, out); });
    } else {
      each_item(s, false, false, nullptr, threads,
                [&](Single<R>& w, int64_t i) { w.sort_backward(i, g, out); });
    }
  }

  static void apply(const sorting::Problem& p, const Net& net, const sorting::Features& f,
                    void* out, int threads) {
    const Shared<R> s(p, net);
    R* to = static_cast<R*>(out);
    const Order order{net, !f.transpose};
    if (f.width < kLanes / 2 && in_lanes<R>(p, net, 3)) {
      const TilePlan plan(order, 1, kLanes, 1, true, false, 0);
      each_group(s, true, false, &plan, width_for<R>(p, net, 1 + f.width, threads),
                 [&](Lanes<R>& w, int64_t i, int64_t end) { w.apply(i, end, f, to); });
    } else {
      const TilePlan plan(order, f.width, kLanes, 4, true, false, 0);
      each_item(s, true, false, &plan, width_for<R>(p, net, 1 + f.width / kLanes, threads),
                [&](Single<R>& w, int64_t i) { w.apply(i, f, to); });
    }
  }
  static void apply_backward(const sorting::Problem& p, const Net& net, const sorting::Features& f,
                             const void* g, void* gx, void* gf, int threads) {
    const Shared<R> s(p, net);
    const R* from = static_cast<const R*>(g);
    R *to = static_cast<R*>(gx), *to_f = static_cast<R*>(gf);
    const Order order{net, !f.transpose};
    const bool together = f.width < kLanes / 2 && in_lanes<R>(p, net, 6);
    const TilePlan plan =
        together ? TilePlan(order, 1, kLanes, 1, true, true, vectors_in_cache<R>())
                 : TilePlan(order, f.width, kLanes, 4, true, true, vectors_in_cache<R>());
    const int width = width_for<R>(p, net, 1 + (together ? f.width : f.width / kLanes), threads);
    if (!f.shared || !gf) {
      if (together) {
        each_group(s, true, true, &plan, width, [&](Lanes<R>& w, int64_t i, int64_t end) {
          w.apply_backward(i, end, f, from, to, to_f);
        });
      } else {
        each_item(s, true, true, &plan, width,
                  [&](Single<R>& w, int64_t i) { w.apply_backward(i, f, from, to, to_f); });
      }
      return;
    }
    // Shared features: sums over parts of the batch whose number does not depend on the threads.
    const int64_t groups = groups_of<R>(p.items), parts = std::min<int64_t>(groups, 32);
    const int64_t size = p.n * f.width;
    const Array<R> sums(parts * size);
    std::fill_n(sums.get(), parts * size, R(0));
    run_slots(parts, width, [&](const auto& next) {
      for (int64_t part; (part = next()) >= 0;) {
        const int64_t begin = groups * part / parts * kLanes;
        const int64_t end = std::min(p.items, groups * (part + 1) / parts * kLanes);
        if (together) {
          Lanes<R> worker(s, true, true, &plan);
          for (int64_t i = begin; i < end; i += kLanes) {
            worker.apply_backward(i, std::min(end, i + kLanes), f, from, to, &sums[part * size]);
          }
        } else {
          Single<R> worker(s, true, true, &plan);
          for (int64_t i = begin; i < end; ++i) {
            worker.apply_backward(i, f, from, to, &sums[part * size]);
          }
        }
      }
    });
    for (int64_t i = 0; i < size; ++i) {
      R sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + i];
      to_f[i] = sum;
    }
  }

  static TilePlan rows_plan(const sorting::Problem& p, const Order& order, bool differences) {
    return rows_in_lanes<R>(p)
               ? TilePlan(order, p.n, 1, 4, false, differences, vectors_in_cache<R>())
               : TilePlan(order, p.n, kLanes, 4, false, differences, vectors_in_cache<R>());
  }
  static void permutation(const sorting::Problem& p, const Net& net, void* y, void* permutation,
                          int threads) {
    const Shared<R> s(p, net);
    R *to = static_cast<R*>(y), *to_p = static_cast<R*>(permutation);
    const Order order{net, false};
    const TilePlan plan = rows_plan(p, order, false);
    threads = width_for<R>(p, net, 1 + p.n / kLanes, threads);
    if (rows_in_lanes<R>(p)) {
      each_group(s, true, false, &plan, threads,
                 [&](Lanes<R>& w, int64_t i, int64_t end) { w.permutation(i, end, to, to_p); });
    } else {
      each_item(s, true, false, &plan, threads,
                [&](Single<R>& w, int64_t i) { w.permutation(i, to, to_p); });
    }
  }
  static void permutation_backward(const sorting::Problem& p, const Net& net, const void* gy,
                                   const void* gp, void* gx, int threads) {
    const Shared<R> s(p, net);
    const R *g = static_cast<const R*>(gy), *g_p = static_cast<const R*>(gp);
    R* to = static_cast<R*>(gx);
    const Order order{net, false};
    const TilePlan plan = rows_plan(p, order, true);
    threads = width_for<R>(p, net, 1 + p.n / kLanes, threads);
    if (rows_in_lanes<R>(p)) {
      each_group(s, true, true, &plan, threads, [&](Lanes<R>& w, int64_t i, int64_t end) {
        w.permutation_backward(i, end, g, g_p, to);
      });
    } else {
      each_item(s, true, true, &plan, threads,
                [&](Single<R>& w, int64_t i) { w.permutation_backward(i, g, g_p, to); });
    }
  }
  static void loss(const sorting::Problem& p, const Net& net, const RankTargets& targets,
                   void* loss, void* gx, int threads) {
    const Shared<R> s(p, net);
    R *to = static_cast<R*>(loss), *to_x = static_cast<R*>(gx);
    const Order order{net, false};
    const TilePlan plan = rows_plan(p, order, gx != nullptr);
    threads = width_for<R>(p, net, 1 + p.n / kLanes, threads);
    if (rows_in_lanes<R>(p)) {
      each_group(s, true, gx != nullptr, &plan, threads,
                 [&](Lanes<R>& w, int64_t i, int64_t end) { w.loss(i, end, targets, to, to_x); });
    } else {
      each_item(s, true, gx != nullptr, &plan, threads,
                [&](Single<R>& w, int64_t i) { w.loss(i, targets, to, to_x); });
    }
  }
};

template <class R>
SortingOps ops_of() {
  using B = Batch<R>;
  return {B::sort,        B::sort_backward,        B::apply, B::apply_backward,
          B::permutation, B::permutation_backward, B::loss};
}
inline SortingOps ops_of(DType t) {
  return t == DType::kF64 ? ops_of<double>() : ops_of<float>();
}
