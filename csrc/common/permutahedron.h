// Soft rank and soft sort as projections onto the permutahedron: what CPU and CUDA share.
//
// A row is sorted, s_0 >= s_1 >= ..., w_i = n - i, e = strength. The regression v is non-increasing
// and constant on blocks [a, b) of neighbours, which pool adjacent violators finds in one pass:
//
//   rank   s = x / e (descending)   l2: v = mean s - mean w           y = s - v
//                                   kl: v = log sum exp s - log sum w  y = exp(s - v)
//   sort   s = -x (x ascending)     l2: v = mean w/e - mean s          y = v - w/e
//                                   kl: v = log sum exp w/e - log sum exp s
//
// Means of w and sums of w and exp(w/e) are closed formulas of a and b, so a block carries one sum:
// of s (l2), or of exp(s - s_a) (kl; s_a is its largest). All in double: a float row then has the
// accuracy of its rounding to float. Outputs are written so that no large numbers cancel: s - mean
// s before mean w is added, differences of w before they are divided; and a mean rank that the
// caller does not want is taken off before the rounding to float, whose last digits may hold all
// there is.
//
// Blondel, Teboul, Berthet, Djolonga, arXiv 2002.08871.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss {
namespace permutahedron {

struct Problem {
  int64_t rows, n;
  DType dtype;   // float32 or float64
  bool rank;     // else sort
  bool kl;       // else l2
  bool centred;  // ranks less their mean over the row, (n + 1) / 2; without a meaning for sort
  double strength;
};

// One int32 per sorted position: the element there, and two flags.
inline constexpr int32_t kStart = INT32_MIN;     // a block begins
inline constexpr int32_t kFixed = 1 << 30;       // an infinite element: no gradient
inline constexpr int32_t kElement = kFixed - 1;  // mask; as an element: the row holds a NaN
inline constexpr int64_t kMaxElements = kElement;

PYLOSS_HD inline bool is_nan_row(int32_t first) {
  return (first & kElement) == kElement;
}

PYLOSS_HD inline bool is_infinite(double s) {
  return s == HUGE_VAL || s == -HUGE_VAL;
}

// s at a sorted position, from the value there.
PYLOSS_HD inline double scaled(const Problem& p, double x) {
  return p.rank ? x * (1 / p.strength) : 0.0 - x;
}

PYLOSS_HD inline double mean_w(const Problem& p, int64_t a, int64_t b) {
  return double(p.n) - 0.5 * double(a + b - 1);
}
// The mean of w, less (n + 1) / 2 for centred ranks; exact.
PYLOSS_HD inline double mean_rank(const Problem& p, int64_t a, int64_t b) {
  return 0.5 * double((p.centred ? p.n : 2 * p.n + 1) - a - b);
}
PYLOSS_HD inline double sum_w(const Problem& p, int64_t a, int64_t b) {
  return double(b - a) * mean_w(p, a, b);
}
// log of the sum of exp((w_i - w_a) / e) over a block of c: a geometric series.
PYLOSS_HD inline double lse_w_rest(const Problem& p, int64_t c) {
  return c == 1 ? 0.0 : log_(expm1_(-double(c) / p.strength) / expm1_(-1 / p.strength));
}

// The blocks found so far; entry i at i * step. The caller gives room for n.
struct Stack {
  double* sum;
  double* value;
  int32_t* start;
  int64_t step;
};

// The regression's value on a block; `top` is s at its first position.
PYLOSS_HD inline double block_value(const Problem& p, int64_t a, int64_t b, double sum,
                                    double top) {
  if (!p.kl) {
    const double mean_s = sum / double(b - a);
    return p.rank ? mean_s - mean_w(p, a, b) : mean_w(p, a, b) / p.strength - mean_s;
  }
  const double lse_s = b - a == 1 ? top : top + log_(sum);
  if (p.rank) return lse_s - log_(sum_w(p, a, b));
  return (double(p.n - a) / p.strength - lse_s) + lse_w_rest(p, b - a);
}

// Pools the positions [begin, end) of finite s; returns the number of blocks on the stack.
template <class S>
PYLOSS_HD int64_t pool(const Problem& p, int64_t begin, int64_t end, const S& s, Stack t) {
  int64_t depth = 0;
  for (int64_t i = begin; i < end; ++i) {
    int64_t start = i;
    double top = s(i);
    double sum = p.kl ? 1.0 : top;
    double value = block_value(p, i, i + 1, sum, top);
    // Equal values belong to one block too: there the projection has a kink, and the gradient of
    // the pooled side is taken.
    for (; depth > 0 && t.value[(depth - 1) * t.step] <= value; --depth) {
      const int64_t at = (depth - 1) * t.step;
      start = t.start[at];
      const double before = s(start);
      sum = t.sum[at] + (p.kl ? sum * exp_(top - before) : sum);
      top = before;
      value = block_value(p, start, i + 1, sum, top);
    }
    const int64_t at = depth * t.step;
    t.start[at] = int32_t(start);
    t.sum[at] = sum;
    t.value[at] = value;
    ++depth;
  }
  return depth;
}

// The output at sorted position i of the block [a, b), but for the centred ranks of kl.
PYLOSS_HD inline double output(const Problem& p, int64_t a, int64_t b, int64_t i, double sum,
                               double top, double s_i) {
  if (p.rank) {
    if (p.kl) return exp_(s_i - top) / sum * sum_w(p, a, b);
    return (s_i - sum / double(b - a)) + mean_rank(p, a, b);
  }
  if (p.kl) return double(i - a) / p.strength + lse_w_rest(p, b - a) - (top + log_(sum));
  return (mean_w(p, a, b) - double(p.n - i)) / p.strength - sum / double(b - a);
}

// The centred ranks of kl on the block [a, b): m (1 + d) / (1 + mean d) - c, d = exp(s - top) - 1,
// where c and m, nearly equal, cancel first.
template <class S, class Index, class Put, class Mark>
PYLOSS_HD void centred_kl_block(const Problem& p, int64_t a, int64_t b, const S& s,
                                const Index& index, const Put& put, const Mark& mark) {
  const double top = s(a), m = mean_w(p, a, b), from_middle = mean_rank(p, a, b);
  double mean = 0;
  for (int64_t i = a; i < b; ++i) mean += expm1_(s(i) - top);
  mean /= double(b - a);
  const double scale = 1 / (1 + mean), rest = (from_middle - (m - from_middle) * mean) * scale;
  for (int64_t i = a; i < b; ++i) {
    const int32_t element = index(i);
    put(element, m * scale * expm1_(s(i) - top) + rest);
    mark(i, element | (i == a ? kStart : 0));
  }
}

// Whether a row's outputs are those of centred_kl_block.
PYLOSS_HD inline bool is_centred_kl(const Problem& p) {
  return p.rank && p.kl && p.centred;
}

// Forward of a sorted row. x(i): value at a sorted position, index(i): its element;
// put(element or position, y), mark(position, packed). kCentredKl is is_centred_kl(p), known when
// compiled: on a GPU, a kernel with both kinds of output spills registers.
template <bool kCentredKl, class X, class Index, class Put, class Mark>
PYLOSS_HD void forward_row(Problem p, bool has_nan, Stack t, const X& x, const Index& index,
                           const Put& put, const Mark& mark) {
  if constexpr (kCentredKl) p.rank = p.kl = p.centred = true;
  const auto s = [&](int64_t i) { return scaled(p, x(i)); };
  if (has_nan) {
    for (int64_t i = 0; i < p.n; ++i) {
      put(i, nan_<double>());
      mark(i, int32_t(kStart | kElement));
    }
    return;
  }
  for (int64_t begin = 0, end; begin < p.n; begin = end) {
    const double first = s(begin);
    end = begin + 1;
    if (is_infinite(first)) {
      while (end < p.n && s(end) == first) ++end;
      for (int64_t i = begin; i < end; ++i) {
        const int32_t element = index(i);
        put(p.rank ? element : i, p.rank ? mean_rank(p, begin, end) : -first);
        mark(i, element | kFixed | (i == begin ? kStart : 0));
      }
      continue;
    }
    while (end < p.n && !is_infinite(s(end))) ++end;
    const int64_t depth = pool(p, begin, end, s, t);
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t a = t.start[k * t.step];
      const int64_t b = k + 1 < depth ? t.start[(k + 1) * t.step] : end;
      if constexpr (kCentredKl) {
        centred_kl_block(p, a, b, s, index, put, mark);
      } else {
        const double sum = t.sum[k * t.step], top = s(a);
        for (int64_t i = a; i < b; ++i) {
          const int32_t element = index(i);
          put(p.rank ? element : i, output(p, a, b, i, sum, top, s(i)));
          mark(i, element | (i == a ? kStart : 0));
        }
      }
    }
  }
}

// Backward of a row: from packed(i), the cotangent g(element or position) and, for kl, x(element).
template <class Packed, class G, class X, class Put>
PYLOSS_HD void backward_row(const Problem& p, const Packed& packed, const G& g, const X& x,
                            const Put& put) {
  if (is_nan_row(packed(0))) {
    for (int64_t i = 0; i < p.n; ++i) put(i, nan_<double>());
    return;
  }
  const double scale = 1 / p.strength;
  for (int64_t a = 0, b; a < p.n; a = b) {
    const int32_t first = packed(a);
    const int32_t leader = first & kElement;
    const bool fixed = (first & kFixed) != 0;
    const double top = p.kl && !fixed ? scaled(p, x(leader)) : 0.0;
    double mass = 0, sum = 0;
    for (b = a; b < p.n && (b == a || packed(b) >= 0); ++b) {
      const int32_t element = packed(b) & kElement;
      const double share = p.kl && !fixed ? exp_(scaled(p, x(element)) - top) : 1.0;
      const double up = g(p.rank ? element : b);
      mass += share;
      sum += p.rank ? share * up : up;
    }
    // sum: of the weighted cotangents (rank), of the cotangents (sort).
    const double w = p.rank && p.kl ? sum_w(p, a, b) * scale / mass : scale;
    for (int64_t i = a; i < b; ++i) {
      const int32_t element = packed(i) & kElement;
      const double share = p.kl && !fixed ? exp_(scaled(p, x(element)) - top) : 1.0;
      double dx =
          p.rank ? w * (p.kl ? share : 1.0) * (g(element) - sum / mass) : sum * share / mass;
      put(element, fixed ? 0.0 : dx);
    }
  }
}

}  // namespace permutahedron
}  // namespace pyloss
