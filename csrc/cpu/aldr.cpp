// ALDR-KL on the CPU. Formulas: common/aldr.h.
//
// Decomposition: threads take rows. A row becomes float once, in a buffer that fits the
// second-level cache for usual class counts; the passes of the search for lambda, some four, and
// the gradient read it there. The next row is fetched from memory during the first pass.
//
// Memory traffic per score of b bytes: read b, and write b for the gradient in the forward; the
// backward reads b and writes b.
//
// Numerics: float lanes within a block of 2048 classes, double between blocks (double scores:
// double). No sum depends on the thread count.
// Paper: Zhu, Ying, Yang, arXiv 2112.14869.
#include "cpu/aldr.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/aldr_blocks.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/row_access.h"
#include "cpu/row_blocks.h"

namespace pyloss::cpu {
namespace {

using aldr::Problem;

void check_labels(const Problem& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t y = p.target[r];
    if (y == p.ignore_index || (y >= 0 && y < p.classes)) continue;
    throw std::out_of_range("Target " + std::to_string(y) + " is out of bounds.");
  }
}

template <class R>
class Rows {
 public:
  explicit Rows(const Problem& p)
      : p_(p),
        size_(dtype_size(p.dtype)),
        log_classes_(log_(R(p.classes))),
        values_(buffer(padded(p.classes))) {}

  void forward(int64_t row, R* stats) {
    const aldr::Row<R> r = load(row);
    const char* next = x_row(row + 1 < p_.rows ? row + 1 : row);
    R lambda;
    aldr::Moments<R> m;
    if (p_.start) {
      const R before = static_cast<const R*>(p_.start)[row];
      aldr::Search<R> search(p_, log_classes_);
      const aldr::Pass<R> pass(pass_at(r, before, next), label_exponent(r, before));
      lambda = search.plain_step(pass.divergence(log_classes_));
      m = pass_at(r, lambda, nullptr);
    } else {
      aldr::Search<R> search(p_, log_classes_);
      for (bool more = true; more; next = nullptr) {
        m = pass_at(r, search.lambda, next);
        const R u = label_exponent(r, search.lambda);
        const aldr::Pass<R> pass(m, u);
        more = search.move(pass.divergence(log_classes_), pass.variance(m, u));
      }
      lambda = search.lambda;
    }
    aldr::store_row(p_, r, m, lambda, log_classes_, stats + row, p_.rows);
  }

  // After forward or load of the same row.
  void gradient(int64_t row, const R* stats, R factor, char* out_row, bool stream) {
    const aldr::Coeffs<R> c(p_, stats + row, p_.rows, factor);
    const int64_t y = p_.target[row];
    alignas(64) R out[kBlock];
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      aldr_gradient(values_ + at, n, c, out);
      if (y >= at && y < at + n) out[y - at] = c.l - c.f * aldr::sign(label_);
      store_block(out, n, p_.dtype, out_row + at * size_, stream);
    }
  }

  aldr::Row<R> load(int64_t row) {
    const char* x = x_row(row);
    const int64_t y = p_.target[row];
    double sum_abs = 0;
    R others = -infinity_<R>();
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      R* z = values_ + at;
      load_values(x + at * size_, p_.dtype, n, z);
      R sum = 0, top;
      if (y >= at && y < at + n) {
        label_ = z[y - at];
        z[y - at] = 0;
        aldr_scan(z, n, &sum, &top);
        sum += label_ < 0 ? -label_ : label_;
        z[y - at] = -infinity_<R>();
        R unused;
        aldr_scan(z, n, &unused, &top);
      } else {
        aldr_scan(z, n, &sum, &top);
      }
      for (int64_t i = n; i < padded(n); ++i) z[i] = -infinity_<R>();
      sum_abs += double(sum);
      others = max_(top, others);
    }
    return aldr::Row<R>(p_, others, label_, R(sum_abs));
  }

  char* out_row(void* grad, int64_t row) const {
    return static_cast<char*>(grad) + row * p_.classes * size_;
  }

 private:
  static R* buffer(int64_t n) {
    thread_local std::vector<R> values;
    if (int64_t(values.size()) < n) values.resize(n);
    return values.data();
  }

  const char* x_row(int64_t row) const {
    return static_cast<const char*>(p_.x) + row * p_.classes * size_;
  }

  aldr::Moments<R> pass_at(const aldr::Row<R>& r, R lambda, const char* next) const {
    double s0 = 0, s1 = 0, s2 = 0;
    for (int64_t at = 0; at < p_.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - at);
      if (next) prefetch(next + at * size_, n * size_);
      const aldr::Moments<R> m = aldr_moments(values_ + at, n, r.top, r.scale / lambda);
      s0 += double(m.s0);
      s1 += double(m.s1);
      s2 += double(m.s2);
    }
    return {R(s0), R(s1), R(s2)};
  }

  const Problem& p_;
  const int64_t size_;
  const R log_classes_;
  R* const values_;  // the row, -inf in place of the label
  R label_ = 0;
};

bool should_stream(const Problem& p) {
  return p.rows * p.classes * dtype_size(p.dtype) > 4 * l2_cache_bytes();
}

template <class R, class Fn>
void for_rows(const Problem& p, void* grad, int threads, const Fn& fn) {
  const bool stream = grad && should_stream(p);
  if (grad) advise_huge_pages(grad, p.rows * p.classes * dtype_size(p.dtype));
  parallel_for(p.rows, rows_per_range(p.classes), useful_threads(p.rows * p.classes, threads),
               [&](int64_t begin, int64_t end) {
                 Rows<R> rows(p);
                 for (int64_t row = begin; row < end; ++row) {
                   if (p.target[row] != p.ignore_index) {
                     fn(rows, row, stream);
                     continue;
                   }
                   if (!grad) continue;
                   memset(rows.out_row(grad, row), 0, p.classes * dtype_size(p.dtype));
                 }
                 if (stream) stream_fence();
               });
}

template <class R>
void forward(const Problem& p, R* stats, const R* factor, void* grad, int threads) {
  check_labels(p);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.target[row] == p.ignore_index) aldr::store_ignored(p, stats, row);
  }
  for_rows<R>(p, grad, threads, [&](Rows<R>& rows, int64_t row, bool stream) {
    rows.forward(row, stats);
    if (grad) rows.gradient(row, stats, factor[row], rows.out_row(grad, row), stream);
  });
}

template <class R>
void backward(const Problem& p, const R* stats, const R* factor, void* grad, int threads) {
  check_labels(p);
  for_rows<R>(p, grad, threads, [&](Rows<R>& rows, int64_t row, bool stream) {
    rows.load(row);
    rows.gradient(row, stats, factor[row], rows.out_row(grad, row), stream);
  });
}

}  // namespace

void aldr_forward(const Problem& p, void* stats, const void* factor, void* grad, int threads) {
  if (p.dtype == DType::kF64) {
    forward(p, static_cast<double*>(stats), static_cast<const double*>(factor), grad, threads);
  } else {
    forward(p, static_cast<float*>(stats), static_cast<const float*>(factor), grad, threads);
  }
}

void aldr_backward(const Problem& p, const void* stats, const void* factor, void* grad,
                   int threads) {
  if (p.dtype == DType::kF64) {
    backward(p, static_cast<const double*>(stats), static_cast<const double*>(factor), grad,
             threads);
  } else {
    backward(p, static_cast<const float*>(stats), static_cast<const float*>(factor), grad, threads);
  }
}

}  // namespace pyloss::cpu
