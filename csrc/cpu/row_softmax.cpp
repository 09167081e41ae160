// Row softmax on the CPU: rows whose classes are contiguous. Formulas: common/row_softmax.h.
//
// Decomposition: a row is cut into segments of kSegment columns, a segment into blocks of kBlock.
// A block becomes float in the first-level cache, gives its maximum and its sum of exponentials
// relative to that maximum; blocks merge into segments and segments into the row in index order,
// in double. Threads take rows; when rows are few and long they take segments instead. Neither
// choice looks at the thread count, so the bits never depend on it.
//
// Memory traffic per logit of b bytes: statistics read b; backward reads b and writes b. With the
// gradient written in the forward (scalar reduction, row fits in the second-level cache): read b,
// write b, in all. The exponentials of the row then stay in cache as floats and the gradient is one
// multiplication each.
//
// Numerics: float lanes within a block, double between blocks (fp64 logits: double).
// Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include "cpu/row_softmax.h"

#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"
#include "cpu/row_strided.h"

namespace pyloss::cpu {
namespace {

constexpr int64_t kSegment = 16 * kBlock;
// Fewer rows than this are shared out by segment.
constexpr int64_t kFewRows = 16;
constexpr int64_t kNarrow = 48;

// What a pass over columns finds. Everything but `part` concerns single entries of the row.
template <class R>
struct Scan {
  RowPart<double> part;
  R zy = -infinity_<R>(), zy2 = -infinity_<R>();
  bool has_y = false, has_y2 = false;
  R best = -infinity_<R>();
  int64_t argmax = -1, rank = 0;

  void append(const Scan& next) {  // next lies to the right
    part = merge(part, next.part);
    if (next.has_y) zy = next.zy;
    if (next.has_y2) zy2 = next.zy2;
    if (argmax < 0 || next.best > best) {
      best = next.best;
      argmax = next.argmax;
    }
    rank += next.rank;
  }
};

// A row's exponentials, kept between its statistics and its gradient.
template <class R>
struct KeptRow {
  R* values;              // exp(z - reference of the block)
  std::vector<R> slopes;  // dz/dx, where it is not constant
  std::vector<R> references;

  void reserve(int64_t classes, bool cap) {
    // At a cache line: every vector store to another place would touch two of them.
    constexpr size_t kLine = 64;
    memory_.resize(padded(classes) + kLine / sizeof(R));
    void* start = memory_.data();
    size_t bytes = memory_.size() * sizeof(R);
    values = static_cast<R*>(std::align(kLine, padded(classes) * sizeof(R), start, bytes));
    slopes.resize(cap ? padded(classes) : 0);
    references.resize(classes / kBlock + 1);
  }

 private:
  std::vector<R> memory_;
};

template <class R>
class Rows {
 public:
  explicit Rows(const RowSoftmaxProblem& p)
      : p_(p),
        transform_(p.options),
        size_(dtype_size(p.dtype)),
        weight_(static_cast<const R*>(p.weight)),
        margin_(R(p.options.margin)),
        one_pass_soft_(p.kind == TargetKind::kDense && p.options.tau == 1) {}

  const char* x_row(int64_t row) const {
    return element(static_cast<const char*>(p_.x), p_.dtype, p_.x_strides, p_.inner, row, 0);
  }

  // Statistics of columns [begin, end), the margin taken from the label. `f` tells which extras are
  // wanted; `kept` may be null.
  Scan<R> scan(int64_t row, const RowTarget<R>& t, const RowSoftmaxForward& f, int64_t begin,
               int64_t end, KeptRow<R>* kept) const {
    const char* x = x_row(row);
    Scan<R> s;
    R zy = 0;
    if (f.index && t.y >= 0) zy = value_at(x, t.y);
    alignas(64) R buffer[kBlock], r[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = std::min(kBlock, end - at);
      R* z = kept ? kept->values + at : buffer;
      R block_m = load_block(x + at * size_, p_.dtype, n, transform_, z);
      if (margin_ != 0 && t.y >= at && t.y < at + n) {
        const bool largest = z[t.y - at] == block_m;
        z[t.y - at] -= margin_;
        if (largest) block_m = block_max(z, n);
      }
      const R m = finite_floor(block_m);
      RowPart<double> part;
      part.m = block_m;
      if (f.index) {
        if (s.argmax < 0 || block_m > s.best) {
          s.best = block_m;
          s.argmax = at + find(z, n, block_m);
        }
        if (t.y >= 0) s.rank += block_count_above(z, n, zy);
      }
      if (one_pass_soft_) {
        soft_block(row, t, at, n, r);
        add_weighted(z, r, n, m, &part);
      } else if (t.spread != 0 && !p_.soft()) {
        add_weighted(z, weight_ ? weight_ + at : nullptr, n, m, &part);
      }
      if (kept && transform_.cap) block_slope(z, n, transform_, kept->slopes.data() + at);
      if (t.y2 >= at && t.y2 < at + n) {
        s.zy2 = z[t.y2 - at];
        s.has_y2 = true;
      }
      if (t.y >= at && t.y < at + n) {
        s.zy = z[t.y - at];
        s.has_y = true;
        z[t.y - at] = -infinity_<R>();  // leaves the sums
      }
      if (f.extras) part.ez = block_entropy_sum(z, n, m);
      // Usually the next block, or the next row's first.
      part.rest = block_exp_sum(z, n, m, x + (at + n) * size_, size_);
      if (kept) kept->references[at / kBlock] = m;
      s.part = at == begin ? part : merge(s.part, part);
    }
    return s;
  }

  // The epilogue, and for soft targets the second pass.
  RowResult<R> finish(int64_t row, const RowTarget<R>& t, const Scan<R>& s) const {
    RowResult<R> r;
    r.target = t;
    r.rest = R(s.part.rest);
    r.zy = s.zy;
    r.zy2 = s.zy2;
    r.terms = row_terms(p_, t, R(s.part.m), r.rest, s.zy, s.zy2);
    r.wz = R(s.part.wz);
    const R uy = max_(s.zy - r.terms.m, R(-1e4));
    r.ez = R(s.part.ez) + (p_.kind == TargetKind::kDense ? R(0) : exp_(uy) * uy);
    r.soft_loss = r.soft_mass = 0;
    if (one_pass_soft_) {
      r.soft_mass = R(s.part.w);
      r.soft_loss = R(s.part.w * double(r.terms.log_sum) - s.part.wz);
    } else if (p_.soft()) {
      soft_sums(row, t, r.terms, &r.soft_mass, &r.soft_loss);
    }
    r.argmax = std::isnan(r.terms.sum) && s.argmax >= 0 ? first_nan(row, s.argmax) : s.argmax;
    r.rank = s.rank;
    return r;
  }

  // Gradient of columns [begin, end), recomputed from the logits.
  void gradient(int64_t row, const RowTarget<R>& t, const RowTerms<R>& terms, const RowCoeffs<R>& c,
                R zy, int64_t begin, int64_t end, char* out_row, bool stream) const {
    const char* x = x_row(row);
    if constexpr (std::is_same_v<R, float>) {
      if (transform_.identity && c.b == 0 && c.spread == 0 && c.soft == 0 && writes_label_only(t)) {
        const Entry label{t.y - begin, label_entry(terms.m, c, zy, R(1))};
        return exp_row(x + begin * size_, end - begin, terms.m, c.a, label, p_.dtype,
                       out_row + begin * size_, stream);
      }
    }
    const GradientTerms g{double(terms.m), double(c.a), double(c.b), double(c.spread)};
    const SoftTerms soft{double(terms.m), double(terms.log_sum), 1 - p_.options.tau};
    alignas(64) R z[kBlock], out[kBlock], r[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = std::min(kBlock, end - at);
      load_block(x + at * size_, p_.dtype, n, transform_, z);
      block_gradient(z, n, g, weight_ ? weight_ + at : nullptr, out);
      fix_labels(t, terms, c, zy, at, n, out);
      if (c.soft != 0) {
        soft_block(row, t, at, n, r);
        block_soft_gradient(z, r, n, soft, double(c.soft), out);
      }
      block_chain(z, n, transform_, out);
      store_block(out, n, p_.dtype, out_row + at * size_, stream);
    }
  }

  // The same from the kept exponentials: no entropy term, soft targets only at tau = 1.
  bool can_keep() const {
    const int64_t rows = transform_.cap ? 4 : 3;  // kept, its slopes, and what streams through
    return (!p_.soft() || one_pass_soft_) &&
           p_.classes * int64_t(sizeof(R)) * rows <= l2_cache_bytes();
  }
  void gradient_kept(int64_t row, const RowTarget<R>& t, const RowTerms<R>& terms,
                     const RowCoeffs<R>& c, R zy, const KeptRow<R>& kept, char* out_row,
                     bool stream) const {
    const R pre = transform_.cap ? R(1) : transform_.pre;
    alignas(64) R out[kBlock], r[kBlock];
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      const R scale = c.a * exp_(kept.references[at / kBlock] - terms.m);
      const R* w = weight_ ? weight_ + at : nullptr;
      R shift = c.spread;
      if constexpr (std::is_same_v<R, float>) {
        if (shift == 0 && c.soft == 0 && writes_label_only(t)) {
          const Entry label{t.y - at, label_entry(terms.m, c, zy, R(1)) * pre};
          scale_row(kept.values + at, n, scale * pre, label, p_.dtype, out_row + at * size_,
                    stream);
          continue;
        }
      }
      if (c.soft != 0) {
        soft_block(row, t, at, n, r);
        w = r;
        shift = c.soft;
      }
      block_affine(kept.values + at, n, scale * pre, shift * pre, w, out);
      if (t.y >= at && t.y < at + n) {
        out[t.y - at] = label_entry(terms.m, c, zy, weight_ ? weight_[t.y] : R(1)) * pre;
      }
      if (t.y2 >= at && t.y2 < at + n) out[t.y2 - at] -= c.label2 * pre;
      if (transform_.cap) block_multiply(kept.slopes.data() + at, n, out);
      store_block(out, n, p_.dtype, out_row + at * size_, stream);
    }
  }

 private:
  // Whether a row's gradient is its softmax, scaled, but for the label's entry.
  bool writes_label_only(const RowTarget<R>& t) const {
    return writes_rows(p_.dtype) && t.y >= 0 && t.y2 < 0 && !transform_.cap;
  }

  R value_at(const char* x, int64_t c) const {
    // The whole group, so that the value has the bits that scan() will see.
    const int64_t at = c / kLanes * kLanes;
    alignas(64) R z[kLanes];
    load_block(x + at * size_, p_.dtype, std::min(kLanes, p_.classes - at), transform_, z);
    return z[c - at] - margin_;
  }

  static int64_t find(const R* z, int64_t n, R value) {
    for (int64_t i = 0; i < n; ++i) {
      if (z[i] == value) return i;
    }
    return 0;
  }

  int64_t first_nan(int64_t row, int64_t otherwise) const {
    const char* x = x_row(row);
    alignas(64) R z[kBlock];
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      load_block(x + at * size_, p_.dtype, n, transform_, z);
      for (int64_t i = 0; i < n; ++i) {
        if (z[i] != z[i]) return at + i;
      }
    }
    return otherwise;
  }

  static void add_weighted(const R* z, const R* w, int64_t n, R m, RowPart<double>* part) {
    R wz, ws;
    block_weighted_sum(z, w, n, m, &wz, &ws);
    part->wz = wz;
    part->w = ws;
  }

  void fix_labels(const RowTarget<R>& t, const RowTerms<R>& terms, const RowCoeffs<R>& c, R zy,
                  int64_t at, int64_t n, R* out) const {
    if (t.y >= at && t.y < at + n) {
      out[t.y - at] = label_entry(terms.m, c, zy, weight_ ? weight_[t.y] : R(1));
    }
    if (t.y2 >= at && t.y2 < at + n) out[t.y2 - at] -= c.label2;
  }

  // r_c of columns [at, at + n), padded with zeros.
  void soft_block(int64_t row, const RowTarget<R>& t, int64_t at, int64_t n, R* r) const {
    const R* w = weight_ ? weight_ + at : nullptr;
    if (p_.kind == TargetKind::kDense) {
      load_values(element(static_cast<const char*>(p_.target), p_.target_dtype, p_.target_strides,
                          p_.inner, row, at),
                  p_.target_dtype, n, r);
      const R keep = R(1 - p_.options.smoothing), spread = t.spread;
      if (keep != 1 || spread != 0) {
        for (int64_t i = 0; i < n; ++i) r[i] = keep * r[i] + spread;
      }
      if (w) {
        for (int64_t i = 0; i < n; ++i) r[i] *= w[i];
      }
    } else {
      for (int64_t i = 0; i < n; ++i) r[i] = t.spread * (w ? w[i] : R(1));
      if (t.y >= at && t.y < at + n) r[t.y - at] += t.first;
      if (t.y2 >= at && t.y2 < at + n) r[t.y2 - at] += t.second;
    }
    for (int64_t i = n; i < padded(n); ++i) r[i] = 0;
  }

  void soft_sums(int64_t row, const RowTarget<R>& t, const RowTerms<R>& terms, R* mass,
                 R* loss) const {
    const char* x = x_row(row);
    const SoftTerms soft{double(terms.m), double(terms.log_sum), 1 - p_.options.tau};
    alignas(64) R z[kBlock], r[kBlock];
    double masses = 0, losses = 0;
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      load_block(x + at * size_, p_.dtype, n, transform_, z);
      soft_block(row, t, at, n, r);
      R a, b;
      block_soft_sums(z, r, n, soft, &a, &b);
      masses += double(a);
      losses += double(b);
    }
    *mass = R(masses);
    *loss = R(losses);
  }

  const RowSoftmaxProblem& p_;
  const RowTransform<R> transform_;
  const int64_t size_;
  const R* weight_;
  const R margin_;
  const bool one_pass_soft_;
};

void fill_row(const RowSoftmaxProblem& p, char* out, int64_t begin, int64_t end) {
  const int64_t size = dtype_size(p.dtype);
  memset(out + begin * size, 0, (end - begin) * size);  // zero bits are zero in every dtype
}

template <class R>
void forward_rows(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int64_t begin,
                  int64_t end) {
  const Rows<R> rows(p);
  const R* norm = static_cast<const R*>(f.norm);
  const bool keep = f.grad && rows.can_keep();
  const bool stream = f.grad && should_stream(p, f.grad);
  thread_local KeptRow<R> kept;
  if (keep) kept.reserve(p.classes, p.options.softcap > 0);
  for (int64_t row = begin; row < end; ++row) {
    char* out = f.grad
                    ? element(static_cast<char*>(f.grad), p.dtype, f.grad_strides, p.inner, row, 0)
                    : nullptr;
    RowTarget<R> t;
    if (!load_target(p, row, &t)) {
      store_ignored_row<R>(p, f, row);
      if (out) fill_row(p, out, 0, p.classes);
      continue;
    }
    KeptRow<R>* keep_in = keep ? &kept : nullptr;
    Scan<R> s = rows.scan(row, t, f, 0, std::min(p.classes, kSegment), keep_in);
    for (int64_t c = kSegment; c < p.classes; c += kSegment) {
      s.append(rows.scan(row, t, f, c, std::min(p.classes, c + kSegment), keep_in));
    }
    const RowResult<R> r = rows.finish(row, t, s);
    store_result(p, f, row, r);
    if (!out) continue;
    const RowCoeffs<R> c =
        row_coeffs(p, t, r.terms, unit_upstream(f, t.token), norm[kNormWeightSum], r.soft_mass);
    if (keep) {
      rows.gradient_kept(row, t, r.terms, c, r.zy, kept, out, stream);
    } else {
      rows.gradient(row, t, r.terms, c, r.zy, 0, p.classes, out, stream);
    }
  }
  if (stream) stream_fence();
}

// Statistics by segment, for few long rows; the gradient is left to gradient_segments.
template <class R>
void forward_segments(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads) {
  const Rows<R> rows(p);
  const int64_t segments = (p.classes + kSegment - 1) / kSegment;
  std::vector<Scan<R>> scans(p.rows() * segments);
  parallel_for(p.rows() * segments, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / segments, c = i % segments * kSegment;
      RowTarget<R> t;
      if (!load_target(p, row, &t)) continue;
      scans[i] = rows.scan(row, t, f, c, std::min(p.classes, c + kSegment), nullptr);
    }
  });
  parallel_for(p.rows(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      RowTarget<R> t;
      if (!load_target(p, row, &t)) {
        store_ignored_row<R>(p, f, row);
        continue;
      }
      Scan<R> s;
      for (int64_t i = 0; i < segments; ++i) s.append(scans[row * segments + i]);
      store_result(p, f, row, rows.finish(row, t, s));
    }
  });
}

// Gradient of (row, columns) pieces; `upstream(row, token)` gives the row's cotangents.
template <class R, class Upstream>
void gradient_pieces(const RowSoftmaxProblem& p, const void* stats, const void* norm, void* grad,
                     const Strides& grad_strides, int64_t columns, int64_t grain, int threads,
                     const Upstream& upstream) {
  const Rows<R> rows(p);
  const int64_t pieces = std::max<int64_t>(1, (p.classes + columns - 1) / columns);
  const bool stream = should_stream(p, grad);
  const R weight_sum = static_cast<const R*>(norm)[kNormWeightSum];
  parallel_for(p.rows() * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, c0 = i % pieces * columns;
      const int64_t c1 = std::min(p.classes, c0 + columns);
      char* out = element(static_cast<char*>(grad), p.dtype, grad_strides, p.inner, row, 0);
      RowTarget<R> t;
      if (!load_target(p, row, &t)) {
        fill_row(p, out, c0, c1);
        continue;
      }
      R zy, zy2, soft_mass;
      const RowTerms<R> terms = load_terms(p, stats, row, t, &zy, &zy2, &soft_mass);
      const RowCoeffs<R> c = row_coeffs(p, t, terms, upstream(row, t.token), weight_sum, soft_mass);
      rows.gradient(row, t, terms, c, zy, c0, c1, out, stream);
    }
    if (stream) stream_fence();
  });
}

bool by_segment(const RowSoftmaxProblem& p) {
  return p.rows() < kFewRows && p.classes > kSegment;
}

// Rows for this file; others go by positions (row_strided.h). So do narrow rows when there are
// many: a SIMD group per row would be mostly padding.
bool by_rows(const RowSoftmaxProblem& p, const Strides* other) {
  const bool one = p.classes == 1;
  if (p.classes <= kNarrow && p.inner >= kLanes) return false;
  return (one || p.x_strides.cls == 1) && (!other || one || other->cls == 1) &&
         (p.kind != TargetKind::kDense || one || p.target_strides.cls == 1);
}

template <class R>
void forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads) {
  prepare_norm<R>(p, static_cast<R*>(f.norm));
  if (f.grad) advise_huge_pages(f.grad, p.rows() * p.classes * dtype_size(p.dtype));
  threads = useful_threads(p.rows() * p.classes, threads);
  if (!by_rows(p, f.grad ? &f.grad_strides : nullptr)) {
    strided_forward<R>(p, f, threads);
  } else if (by_segment(p)) {
    forward_segments<R>(p, f, threads);
    if (f.grad) {
      gradient_pieces<R>(p, f.stats, f.norm, f.grad, f.grad_strides, kSegment, 1, threads,
                         [&](int64_t, R token) { return unit_upstream(f, token); });
    }
  } else {
    parallel_for(p.rows(), f.grad ? rows_per_range(p, threads) : rows_per_range(p.classes), threads,
                 [&](int64_t begin, int64_t end) { forward_rows<R>(p, f, begin, end); });
  }
  finish_loss<R>(p, f);
}

template <class R>
void backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads) {
  if (b.grad != p.x) advise_huge_pages(b.grad, p.rows() * p.classes * dtype_size(p.dtype));
  threads = useful_threads(p.rows() * p.classes, threads);
  if (!by_rows(p, &b.grad_strides)) return strided_backward<R>(p, b, threads);
  const bool split = by_segment(p);
  gradient_pieces<R>(p, b.stats, b.norm, b.grad, b.grad_strides,
                     split ? kSegment : std::max<int64_t>(p.classes, 1),
                     split ? 1 : rows_per_range(p, threads), threads,
                     [&](int64_t row, R token) { return load_upstream(p, b, row, token); });
}

template <class R>
void scale(void* data, DType t, int64_t n, R factor, int threads) {
  if (factor == 1) return;
  const bool finite = std::isfinite(factor);
  const int64_t size = dtype_size(t);
  parallel_for(n, kRangeElements, useful_threads(n, threads), [&](int64_t begin, int64_t end) {
    alignas(64) R v[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t m = std::min(kBlock, end - at);
      char* p = static_cast<char*>(data) + at * size;
      load_values(p, t, m, v);
      if (finite) {
        block_affine(v, m, factor, R(0), static_cast<const R*>(nullptr), v);
      } else {
        for (int64_t i = 0; i < m; ++i) v[i] = scaled_gradient(v[i], factor);
      }
      store_block(v, m, t, p, false);
    }
  });
}

}  // namespace

void row_softmax_forward(const RowSoftmaxProblem& p, const RowSoftmaxForward& f, int threads) {
  p.dtype == DType::kF64 ? forward<double>(p, f, threads) : forward<float>(p, f, threads);
}

void row_softmax_backward(const RowSoftmaxProblem& p, const RowSoftmaxBackward& b, int threads) {
  p.dtype == DType::kF64 ? backward<double>(p, b, threads) : backward<float>(p, b, threads);
}

void small_row_softmax(const SmallRowSoftmax& s) {
  RowSoftmaxProblem p{};
  p.outer = s.rows;
  p.classes = s.classes;
  p.inner = 1;
  p.dtype = DType::kF32;
  p.x = s.x;
  p.x_strides = {s.classes, 1, 1};
  p.kind = TargetKind::kIndex;
  p.target = s.target;
  p.target_dtype = s.target_dtype;
  p.options.logit_scale = p.options.temperature = p.options.tau = 1;
  p.options.max_nll = HUGE_VAL;
  p.options.ignore_index = s.ignore_index;
  p.options.reduction = s.mean ? Reduction::kMean : Reduction::kSum;
  std::vector<float> buffer(kNormCount + p.stat_rows() * s.rows);
  RowSoftmaxForward f{};
  f.loss = s.loss;
  f.loss_dtype = DType::kF32;
  f.norm = buffer.data();
  f.stats = buffer.data() + kNormCount;
  f.grad = s.grad;
  f.grad_strides = p.x_strides;
  row_softmax_forward(p, f, 1);
}

void scale_inplace(void* data, DType t, int64_t n, const void* factor, int threads) {
  if (t == DType::kF64) {
    scale(data, t, n, *static_cast<const double*>(factor), threads);
  } else {
    scale(data, t, n, *static_cast<const float*>(factor), threads);
  }
}

}  // namespace pyloss::cpu
