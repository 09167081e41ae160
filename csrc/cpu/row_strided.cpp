// Row softmax over strided classes. Formulas: common/row_softmax.h.
//
// Decomposition: a tile of up to kTile neighbouring positions, one SIMD lane each, walks down the
// classes. The tile's logits are kept in a buffer [classes][positions] that fits in cache for
// usual class counts: loaded once with the running maximum, exponentiated in place with the running
// sum, and, when the gradient is written in the forward, multiplied by one factor per position.
// What happens once per position is scalar but for its exponential and logarithm. Tiles do not
// depend on the thread count, and no sum crosses lanes.
//
// Memory traffic per logit of b bytes: statistics read b; backward reads b and writes b; with the
// gradient in the forward read b, write b in all.
//
// Numerics: float lanes (double for fp64); sums over classes are folded into double every kFold
// classes, since a lane adds them one after the other.
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include "cpu/row_strided.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/compiler.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"
#include "cpu/row_lines.h"

namespace pyloss::cpu {
namespace {

constexpr int64_t kTile = 256;
constexpr int64_t kFold = 64;
constexpr int64_t kAhead = 2;  // classes
constexpr int32_t kNoLabel = -1;

// A sum over classes per position.
template <class R>
struct LaneSum {
  alignas(64) R part[kTile];
  alignas(64) double total[kTile];

  void clear(int64_t n) {
    std::fill(part, part + n, R(0));
    std::fill(total, total + n, 0.0);
  }
  void fold(int64_t n) {
    for (int64_t l = 0; l < n; ++l) {
      total[l] += double(part[l]);
      part[l] = 0;
    }
  }
  void finish(int64_t n, R* out) {
    fold(n);
    for (int64_t l = 0; l < n; ++l) out[l] = R(total[l]);
  }
};

// Scratch of one thread: one value per position, and the kept logits.
template <class R>
struct Tile {
  alignas(64) R m[kTile], zy[kTile], zy2[kTile], rest[kTile];
  alignas(64) R sum[kTile], log_sum[kTile], miss[kTile];
  alignas(64) R ez[kTile], wz[kTile], w[kTile], mass[kTile], soft_loss[kTile];
  alignas(64) R a[kTile], b[kTile], spread[kTile], soft[kTile];  // RowCoeffs
  alignas(64) R label_a[kTile], label[kTile], label2[kTile];
  alignas(64) R first[kTile], token[kTile], above[kTile], loss[kTile];  // plain problems
  alignas(64) R z[kTile], r[kTile], out[kTile];
  alignas(64) int32_t y[kTile], y2[kTile], rank[kTile], argmax[kTile];
  LaneSum<R> sums[2];
  std::vector<R> kept;
};

// A larger buffer is given back after its tile: it serves wide transposed matrices, and a thread
// would hold it for ever.
constexpr size_t kKeptElements = size_t(1) << 20;

template <class R>
class TileWalk {
 public:
  // `plain`: is_plain(p), and no statistics are asked for: plain_epilogue comes next.
  TileWalk(const RowSoftmaxProblem& p, Tile<R>& t, int64_t outer, int64_t first, int64_t n,
           bool plain)
      : p_(p),
        t_(t),
        transform_(p.options),
        first_row_(outer * p.inner + first),
        n_(n),
        weight_(static_cast<const R*>(p.weight)),
        tau_a_(R(1 - p.options.tau)),
        one_pass_soft_(p.kind == TargetKind::kDense && p.options.tau == 1),
        plain_(plain) {}

  // False: every position is ignored.
  bool load_targets() {
    if (plain_) return load_plain_targets();
    int64_t active = 0;
    for (int64_t l = 0; l < n_; ++l) {
      active_[l] = load_target(p_, first_row_ + l, &targets_[l]);
      active += active_[l];
      t_.y[l] = active_[l] ? int32_t(targets_[l].y) : kNoLabel;
      t_.y2[l] = active_[l] ? int32_t(targets_[l].y2) : kNoLabel;
    }
    all_active_ = active == n_;
    return active > 0;
  }

  void statistics(const RowSoftmaxForward& f) {
    const int64_t width = padded(n_);
    t_.kept.resize(p_.classes * width);
    if (!plain_) {
      for (R* unasked : {t_.ez, t_.wz, t_.w, t_.mass, t_.soft_loss}) {
        std::fill(unasked, unasked + n_, R(0));
      }
    }
    std::fill(t_.m, t_.m + width, -infinity_<R>());
    for (int64_t c = 0; c < p_.classes; ++c) {
      // The hardware does not follow strides of several pages.
      if (p_.x_strides.inner == 1) prefetch(x_line(c + kAhead), n_ * dtype_size(p_.dtype));
      load_max(c, line(c));
    }
    if (p_.options.margin != 0) take_margin();
    if (plain_) {
      take_labels();
    } else {
      for (int64_t l = 0; l < width; ++l) {
        t_.zy[l] = l < n_ && t_.y[l] >= 0 ? line(t_.y[l])[l] : -infinity_<R>();
        t_.zy2[l] = l < n_ && t_.y2[l] >= 0 ? line(t_.y2[l])[l] : -infinity_<R>();
      }
    }
    if (f.extras || f.index) extras();
    if (one_pass_soft_ || (p_.options.smoothing > 0 && !p_.soft())) weighted_sums();
    for (int64_t l = 0; l < n_ && !plain_; ++l) {
      if (t_.y[l] >= 0) line(t_.y[l])[l] = -infinity_<R>();  // leaves the sum
    }
    over_classes(1, [&](int64_t c) { line_exp_sum(line(c), n_, t_.m, t_.sums[0].part); });
    t_.sums[0].finish(padded(n_), t_.rest);
    line_terms(t_.m, t_.rest, t_.zy, n_, t_.sum, t_.log_sum, t_.miss);
    if (one_pass_soft_) {
      for (int64_t l = 0; l < n_; ++l) {
        t_.mass[l] = t_.w[l];
        t_.soft_loss[l] = t_.w[l] * t_.log_sum[l] - t_.wz[l];
      }
    } else if (p_.soft()) {
      over_classes(2, [&](int64_t c) {
        load(c, t_.z);
        load_soft(c);
        line_soft_sums(t_.z, t_.r, n_, t_.m, t_.log_sum, tau_a_, t_.sums[0].part, t_.sums[1].part);
      });
      t_.sums[0].finish(n_, t_.soft_loss);
      t_.sums[1].finish(n_, t_.mass);
    }
  }

  // The epilogue of a plain problem, statistics and coefficients at once.
  void plain_epilogue(const RowSoftmaxForward& f) {
    const R* norm = static_cast<const R*>(f.norm);
    line_plain_losses(p_, norm, n_, plain_rows());
    if (f.grad) plain_coefficients([norm](int64_t) { return norm[kNormLoss]; });
    for (R* zeros : {t_.b, t_.spread, t_.soft, t_.label_a, t_.label2}) {
      std::fill(zeros, zeros + n_, R(0));
    }
    for (int64_t l = 0; l < n_ && !all_active_; ++l) {
      if (!active_[l]) t_.m[l] = t_.rest[l] = t_.zy[l] = t_.loss[l] = 0;
    }
    R* stats = static_cast<R*>(f.stats) + first_row_;
    const int64_t rows = p_.rows();
    std::copy(t_.m, t_.m + n_, stats + kStatMax * rows);
    std::copy(t_.rest, t_.rest + n_, stats + kStatRest * rows);
    std::copy(t_.zy, t_.zy + n_, stats + kStatTarget * rows);
    std::copy(t_.loss, t_.loss + n_, stats + kStatLoss * rows);
  }

  void store_statistics(const RowSoftmaxForward& f) {
    for (int64_t l = 0; l < n_; ++l) {
      const int64_t row = first_row_ + l;
      if (!active_[l]) {
        store_ignored_row<R>(p_, f, row);
        continue;
      }
      RowResult<R> r;
      r.target = targets_[l];
      r.terms = terms_[l] = terms(l);
      r.rest = t_.rest[l];
      r.zy = t_.zy[l];
      r.zy2 = t_.zy2[l];
      r.wz = t_.wz[l];
      r.soft_loss = t_.soft_loss[l];
      r.soft_mass = t_.mass[l];
      r.ez = t_.ez[l];
      r.argmax =
          f.index ? (std::isnan(r.terms.sum) ? first_nan(l, t_.argmax[l]) : t_.argmax[l]) : -1;
      r.rank = f.index && p_.kind != TargetKind::kDense ? t_.rank[l] : 0;
      store_result(p_, f, row, r);
    }
  }

  // Coefficients from statistics() of this walk; `upstream(row, token)` gives the cotangents.
  template <class Upstream>
  void coefficients(R weight_sum, const Upstream& upstream) {
    for (int64_t l = 0; l < n_; ++l) {
      if (!active_[l]) {
        set_coefficients(l, RowCoeffs<R>{0, 0, 0, 0, 0, 0, 0});
        continue;
      }
      set_coefficients(
          l, row_coeffs(p_, targets_[l], terms_[l], upstream(first_row_ + l, targets_[l].token),
                        weight_sum, t_.mass[l]));
    }
  }

  // The same from the statistics that the forward saved.
  void load_coefficients(const RowSoftmaxBackward& b) {
    const auto saved = [&](int row, R* to) {
      const R* from = static_cast<const R*>(b.stats) + row * p_.rows() + first_row_;
      std::copy(from, from + n_, to);
      std::fill(to + n_, to + padded(n_), R(0));
    };
    saved(kStatMax, t_.m);
    saved(kStatRest, t_.rest);
    saved(kStatTarget, t_.zy);
    line_terms(t_.m, t_.rest, t_.zy, n_, t_.sum, t_.log_sum, t_.miss);
    const R* norm = static_cast<const R*>(b.norm);
    if (plain_) {
      const bool each = p_.options.reduction == Reduction::kNone;
      const R* above = static_cast<const R*>(b.grad_loss) + (each ? first_row_ : 0);
      if (each) return plain_coefficients([=](int64_t l) { return above[l] * norm[kNormLoss]; });
      return plain_coefficients([=](int64_t) { return above[0] * norm[kNormLoss]; });
    }
    if (p_.stat_rows() > 4) {
      saved(kStatTarget2, t_.zy2);
      saved(kStatSoft, t_.mass);
    } else {
      std::fill(t_.zy2, t_.zy2 + n_, R(0));
      std::fill(t_.mass, t_.mass + n_, R(0));
    }
    for (int64_t l = 0; l < n_; ++l) {
      if (active_[l]) terms_[l] = terms(l);
    }
    coefficients(norm[kNormWeightSum],
                 [&](int64_t row, R token) { return load_upstream(p_, b, row, token); });
  }

  bool can_keep() const { return !transform_.cap && (!p_.soft() || one_pass_soft_); }

  // From the kept exponentials, in place; without entropy cotangents.
  void gradient_kept(void* grad, const Strides& strides, bool stream) {
    const R pre = transform_.pre;
    if constexpr (std::is_same_v<R, float>) {
      if (plain_ && all_active_ && writes_rows(p_.dtype) && !stream && strides.inner == 1) {
        return plain_gradient(static_cast<char*>(grad), strides);
      }
    }
    for (int64_t l = n_; l < padded(n_); ++l) t_.a[l] = t_.spread[l] = 0;
    for (int64_t l = 0; l < n_; ++l) t_.a[l] *= pre;
    for (int64_t l = 0; l < n_; ++l) t_.spread[l] *= pre;
    for (int64_t c = 0; c < p_.classes; ++c) {
      line_affine(line(c), n_, t_.a, t_.spread, weight(c), line(c));
      if (one_pass_soft_) {
        load_soft(c);
        R* z = line(c);
        for (int64_t l = 0; l < n_; ++l) z[l] -= t_.soft[l] * t_.r[l] * pre;
      }
    }
    for (int64_t l = 0; l < n_; ++l) {
      if (t_.y[l] < 0) continue;
      // `spread` is scaled already; the label's entry needs it as it was.
      const R spread = t_.spread[l] != 0 ? t_.spread[l] / pre : R(0);
      const RowCoeffs<R> k{0, t_.b[l], spread, 0, t_.label_a[l], t_.label[l], 0};
      line(t_.y[l])[l] = pre * label_entry(t_.m[l], k, t_.zy[l], weight(t_.y[l]));
      if (t_.y2[l] >= 0) line(t_.y2[l])[l] -= pre * t_.label2[l];
    }
    for (int64_t c = 0; c < p_.classes; ++c) store(line(c), grad, strides, c, stream);
  }

  // From the logits.
  void gradient(void* grad, const Strides& strides, bool stream) {
    if (plain_) {
      const PlainCoeffs<R> k{t_.m, t_.a, t_.label, t_.y};
      for (int64_t c = 0; c < p_.classes; ++c) {
        load(c, t_.z);
        line_plain_gradient(t_.z, n_, int32_t(c), k, t_.out);
        block_chain(t_.z, n_, transform_, t_.out);
        store(t_.out, grad, strides, c, stream);
      }
      return;
    }
    const LineCoeffs k{t_.m, t_.a, t_.b, t_.spread, t_.label_a, t_.label, t_.label2, t_.y, t_.y2};
    for (int64_t c = 0; c < p_.classes; ++c) {
      load(c, t_.z);
      line_gradient(t_.z, n_, int32_t(c), weight(c), k, t_.out);
      if (p_.soft()) {
        load_soft(c);
        line_soft_gradient(t_.z, t_.r, n_, t_.m, t_.log_sum, t_.soft, tau_a_, t_.out);
      }
      block_chain(t_.z, n_, transform_, t_.out);
      store(t_.out, grad, strides, c, stream);
    }
  }

  void clear(void* grad, const Strides& strides) {
    for (int64_t c = 0; c < p_.classes; ++c) store(t_.out, grad, strides, c, false);
  }

 private:
  // As load_target with one label and nothing optional but weights: short loops, without the
  // records that the other losses need.
  bool load_plain_targets() {
    int64_t active;
    if (p_.target_dtype == DType::kI64) {
      active = read_labels(static_cast<const int64_t*>(p_.target));
    } else if (p_.target_dtype == DType::kI32) {
      active = read_labels(static_cast<const int32_t*>(p_.target));
    } else {
      active = read_labels(static_cast<const uint8_t*>(p_.target));
    }
    all_active_ = active == n_;
    const R* w = static_cast<const R*>(p_.weight);
    const R* token = static_cast<const R*>(p_.token_weight);
    std::fill(t_.first, t_.first + n_, R(1));
    std::fill(t_.token, t_.token + n_, R(1));
    std::fill(t_.first + n_, t_.first + padded(n_), R(0));
    std::fill(t_.token + n_, t_.token + padded(n_), R(0));
    if (token) std::copy(token + first_row_, token + first_row_ + n_, t_.token);
    for (int64_t l = 0; l < n_ && w; ++l) t_.first[l] = active_[l] ? w[t_.y[l]] : R(0);
    for (int64_t l = 0; l < n_ && !all_active_; ++l) {
      if (!active_[l]) t_.first[l] = t_.token[l] = 0;
    }
    return active > 0;
  }

  template <class T>
  int64_t read_labels(const T* labels) {
    labels += first_row_;
    const int64_t ignored = p_.options.ignore_index;
    int64_t skipped = 0;
    for (int64_t l = 0; l < n_; ++l) skipped += int64_t(labels[l]) == ignored;
    for (int64_t l = 0; l < n_; ++l) t_.y[l] = int32_t(labels[l]);
    std::fill(t_.y2, t_.y2 + n_, kNoLabel);
    std::fill(active_, active_ + n_, true);
    for (int64_t l = 0; l < n_ && skipped > 0; ++l) {
      if (int64_t(labels[l]) != ignored) continue;
      active_[l] = false;
      t_.y[l] = kNoLabel;
    }
    return n_ - skipped;
  }

  PlainRows<R> plain_rows() {
    return {t_.m,     t_.zy,    t_.sum,  t_.log_sum, t_.miss, t_.first,
            t_.token, t_.above, t_.loss, t_.a,       t_.label};
  }

  // `above(l)`: what comes from above, without the row's token weight.
  template <class Above>
  void plain_coefficients(const Above& above) {
    for (int64_t l = 0; l < n_; ++l) t_.above[l] = weighted_upstream(t_.token[l], above(l));
    std::fill(t_.above + n_, t_.above + padded(n_), R(0));
    line_plain_coeffs(p_, n_, plain_rows());
    for (int64_t l = 0; l < n_ && !all_active_; ++l) {
      if (!active_[l]) t_.a[l] = t_.label[l] = 0;
    }
  }

  // The labels' logits, which leave the sum.
  void take_labels() {
    for (int64_t l = 0; l < n_; ++l) {
      if (t_.y[l] < 0) {
        t_.zy[l] = -infinity_<R>();
        continue;
      }
      R& z = line(t_.y[l])[l];
      t_.zy[l] = z;
      z = -infinity_<R>();
    }
    for (int64_t l = n_; l < padded(n_); ++l) t_.zy[l] = -infinity_<R>();
  }

  // The softmax, scaled, straight to where it stays; the labels' entries afterwards, while their
  // lines are in cache.
  void plain_gradient(char* grad, const Strides& strides) {
    const R pre = transform_.pre;
    for (int64_t l = 0; l < n_; ++l) t_.a[l] *= pre;
    const auto at = [&](int64_t c) {
      return element(grad, p_.dtype, strides, p_.inner, first_row_, c);
    };
    for (int64_t c = 0; c < p_.classes; ++c) line_scale(line(c), n_, t_.a, p_.dtype, at(c));
    char* first = at(0);
    for (int64_t l = 0; l < n_; ++l) {
      const R entry = pre * -t_.label[l];
      if (p_.dtype == DType::kBF16) {
        reinterpret_cast<BF16*>(first)[t_.y[l] * strides.cls + l] = float_to_bf16(entry);
      } else {
        reinterpret_cast<float*>(first)[t_.y[l] * strides.cls + l] = entry;
      }
    }
  }

  R* line(int64_t c) { return t_.kept.data() + c * padded(n_); }
  R weight(int64_t c) const { return weight_ ? weight_[c] : R(1); }

  RowTerms<R> terms(int64_t l) const {
    RowTerms<R> r;
    r.m = t_.m[l];
    r.sum = t_.sum[l];
    r.log_sum = t_.log_sum[l];
    r.miss = t_.miss[l];
    add_losses(p_, targets_[l], t_.zy[l], t_.zy2[l], &r);
    return r;
  }

  void set_coefficients(int64_t l, const RowCoeffs<R>& c) {
    t_.a[l] = c.a;
    t_.b[l] = c.b;
    t_.spread[l] = c.spread;
    t_.soft[l] = c.soft;
    t_.label_a[l] = c.label_a;
    t_.label[l] = c.label;
    t_.label2[l] = c.label2;
  }

  const char* x_line(int64_t c) const {
    return element(static_cast<const char*>(p_.x), p_.dtype, p_.x_strides, p_.inner, first_row_, c);
  }

  // z of class c, padded.
  void load(int64_t c, R* z) {
    const char* x = x_line(c);
    if (p_.x_strides.inner == 1) {
      load_block(x, p_.dtype, n_, transform_, z);
      return;
    }
    line_gather(x, p_.dtype, p_.x_strides.inner, n_, t_.out);
    load_block(t_.out, sizeof(R) == 8 ? DType::kF64 : DType::kF32, n_, transform_, z);
  }

  // The same, and the running maximum.
  void load_max(int64_t c, R* z) {
    if constexpr (std::is_same_v<R, float>) {
      if (p_.x_strides.inner == 1 && transform_.identity && writes_rows(p_.dtype)) {
        return load_lines(x_line(c), p_.dtype, n_, z, t_.m);
      }
    }
    load(c, z);
    line_max(z, n_, t_.m);
  }

  // r of class c.
  void load_soft(int64_t c) {
    const R w = weight(c);
    if (p_.kind != TargetKind::kDense) {
      for (int64_t l = 0; l < n_; ++l) t_.r[l] = soft_coefficient(p_, targets_[l], c, R(0), w);
      return;
    }
    const char* q = element(static_cast<const char*>(p_.target), p_.target_dtype, p_.target_strides,
                            p_.inner, first_row_, c);
    if (p_.target_strides.inner == 1) {
      load_values(q, p_.target_dtype, n_, t_.r);
    } else {
      line_gather(q, p_.target_dtype, p_.target_strides.inner, n_, t_.r);
    }
    const R keep = R(1 - p_.options.smoothing), spread = targets_[0].spread;
    if (keep == 1 && spread == 0 && w == 1) return;
    for (int64_t l = 0; l < n_; ++l) t_.r[l] = w * (t_.r[l] * keep + spread);
  }

  void store(R* v, void* grad, const Strides& strides, int64_t c, bool stream) {
    if (!all_active_) {  // ignored positions give zeros whatever their logits hold
      for (int64_t l = 0; l < n_; ++l) v[l] = active_[l] ? v[l] : R(0);
    }
    char* out = element(static_cast<char*>(grad), p_.dtype, strides, p_.inner, first_row_, c);
    if (strides.inner == 1) return store_block(v, n_, p_.dtype, out, stream);
    line_scatter(v, n_, p_.dtype, strides.inner, out);
  }

  // Calls fn for every class, with `count` sums that start at zero and are folded on the way.
  template <class Fn>
  void over_classes(int count, const Fn& fn) {
    for (int i = 0; i < count; ++i) t_.sums[i].clear(padded(n_));
    for (int64_t c = 0; c < p_.classes; ++c) {
      fn(c);
      if (c % kFold != kFold - 1) continue;
      for (int i = 0; i < count; ++i) t_.sums[i].fold(padded(n_));
    }
  }

  // From the labels' lines, and the maximum anew.
  void take_margin() {
    for (int64_t l = 0; l < n_; ++l) {
      if (t_.y[l] >= 0) line(t_.y[l])[l] -= R(p_.options.margin);
    }
    std::fill(t_.m, t_.m + padded(n_), -infinity_<R>());
    for (int64_t c = 0; c < p_.classes; ++c) line_max(line(c), n_, t_.m);
  }

  void extras() {
    std::fill(t_.rank, t_.rank + kTile, 0);
    std::fill(t_.argmax, t_.argmax + kTile, -1);
    const LineExtras e{t_.sums[0].part, t_.zy, t_.rank, t_.argmax};
    over_classes(1, [&](int64_t c) { line_extras(line(c), n_, t_.m, int32_t(c), e); });
    t_.sums[0].finish(n_, t_.ez);
  }

  void weighted_sums() {
    over_classes(2, [&](int64_t c) {
      if (one_pass_soft_) {
        load_soft(c);
      } else {
        std::fill(t_.r, t_.r + n_, weight(c));
      }
      line_weighted_sum(line(c), t_.r, n_, t_.m, t_.sums[0].part, t_.sums[1].part);
    });
    t_.sums[0].finish(n_, t_.wz);
    t_.sums[1].finish(n_, t_.w);
  }

  int64_t first_nan(int64_t l, int64_t otherwise) {
    for (int64_t c = 0; c < p_.classes; ++c) {
      load(c, t_.z);
      if (t_.z[l] != t_.z[l]) return c;
    }
    return otherwise;
  }

  const RowSoftmaxProblem& p_;
  Tile<R>& t_;
  const RowTransform<R> transform_;
  const int64_t first_row_, n_;
  const R* weight_;
  const R tau_a_;
  const bool one_pass_soft_, plain_;
  bool all_active_ = false;
  RowTarget<R> targets_[kTile];
  RowTerms<R> terms_[kTile];
  bool active_[kTile];
};

// Positions per tile: the kept logits fit in half of the second-level cache, if 64 positions do.
int64_t tile_width(const RowSoftmaxProblem& p) {
  const int64_t column = p.classes * int64_t(sizeof(float));
  const int64_t fit = l2_cache_bytes() / 2 / std::max<int64_t>(column, 1);
  return std::min(kTile, std::max(kLanes, fit / kLanes * kLanes));
}

// Not inlined: the compiler would look the thread's address up again for every access.
template <class R>
PYLOSS_NOINLINE Tile<R>& thread_tile() {
  thread_local Tile<R> tile;
  return tile;
}

template <class R, class Fn>
void for_tiles(const RowSoftmaxProblem& p, bool plain, int threads, const Fn& fn) {
  if (p.rows() == 0) return;
  const int64_t width = tile_width(p), tiles = (p.inner + width - 1) / width;
  parallel_for(p.outer * tiles, std::max<int64_t>(1, rows_per_range(p.classes) / width), threads,
               [&](int64_t begin, int64_t end) {
                 Tile<R>& tile = thread_tile<R>();
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % tiles * width;
                   TileWalk<R> walk(p, tile, i / tiles, first, std::min(width, p.inner - first),
                                    plain);
                   fn(walk);
                 }
                 if (tile.kept.size() > kKeptElements) std::vector<R>().swap(tile.kept);
                 stream_fence();
               });
}

}  // namespace

template <class R>
void strided_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads) {
  const R* norm = static_cast<const R*>(f.norm);
  const bool stream = f.grad && should_stream(p, f.grad);
  const bool plain = is_plain(p) && !f.extras && !f.index;
  for_tiles<R>(p, plain, threads, [&](TileWalk<R>& walk) {
    const bool any = walk.load_targets();
    if (any) walk.statistics(f);
    if (any && plain) {
      walk.plain_epilogue(f);
    } else {
      walk.store_statistics(f);
    }
    if (!f.grad) return;
    if (!any) return walk.clear(f.grad, f.grad_strides);
    if (!plain) {
      walk.coefficients(norm[kNormWeightSum],
                        [&](int64_t, R token) { return unit_upstream(f, token); });
    }
    if (walk.can_keep()) {
      walk.gradient_kept(f.grad, f.grad_strides, stream);
    } else {
      walk.gradient(f.grad, f.grad_strides, stream);
    }
  });
}

template <class R>
void strided_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads) {
  const bool stream = should_stream(p, b.grad);
  for_tiles<R>(p, is_plain(p) && !b.grad_extras, threads, [&](TileWalk<R>& walk) {
    if (!walk.load_targets()) return walk.clear(b.grad, b.grad_strides);
    walk.load_coefficients(b);
    walk.gradient(b.grad, b.grad_strides, stream);
  });
}

template void strided_forward<float>(const RowSoftmaxProblem&, const RowSoftmaxForward&, int);
template void strided_forward<double>(const RowSoftmaxProblem&, const RowSoftmaxForward&, int);
template void strided_backward<float>(const RowSoftmaxProblem&, const RowSoftmaxBackward&, int);
template void strided_backward<double>(const RowSoftmaxProblem&, const RowSoftmaxBackward&, int);

}  // namespace pyloss::cpu
