// Near-linear tensor attention on the CPU: choice of the instruction set, threads, sums over
// partial results.
//
// Decomposition without causality or windows: tasks are ranges of monomials times chunks of rows
// for the sums over rows (A_x; in the backward E = U(q)^T [dN | dy]), whose partial sums are added
// in the order of the chunks; and blocks of rows for everything that stays with its row. Tasks do
// not depend on the number of threads, so the results do not either. Per row and monomial: forward
// m + 1 products of length dv + 1, backward 2 m + 2, and the multiplications that make the
// monomial. Memory traffic: every row is read once per pass (1 forward, 2 backward) and per range
// of monomials; monomials live in a tile in the first-level cache, sums in the second-level one.
// Accumulator: float, double for fp64. Longest chain of additions: into a state 64 rows, 128
// blocks, n / 8192 groups of blocks and 16 chunks; over monomials a tile of 84, then r / 84 tiles.
//
// With causality or windows a task is one query head and a range of monomials; the ranges are added
// up in their order. Per row, monomial and column of [v | 1] a few vector operations of 1 / lanes
// each, forward and backward (tensor_attention_lowrank_scan.h). Longest chain: 64 keys, n / 64
// blocks, 64 keys inside a chunk. The backward keeps the running sums at every 64th query, for 128
// monomials at a time: 2 (dv + 1) numbers per query and axis, and as many gradients.
#include "cpu/tensor_attention_lowrank.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/compiler.h"
#include "common/math.h"
#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tasks.h"
#include "cpu/tensor_attention_lowrank_plan.h"

namespace pyloss::cpu {
namespace {

using Problem = LowrankProblem;

template <class R>
PYLOSS_INLINE int flags_of(R y) {
  if (!(std::fabs(y) < infinity_<R>())) return kNotFinite;
  return y > R(0) ? 0 : kNotPositive;
}

struct LowrankTasks {
  void (*key_sums)(const Problem&, const Monomials&, const SumPlan&, int64_t, void*, void*);
  void (*query_sums)(const Problem&, const LowrankBackward&, const Monomials&, const SumPlan&,
                     int64_t, void*, void*);
  int (*query)(const Problem&, const LowrankForward&, const Monomials&, int64_t, const void*,
               void*);
  void (*query_gradient)(const Problem&, const LowrankBackward&, const Monomials&, int64_t,
                         const void*, void*);
  void (*key_gradient)(const Problem&, const LowrankBackward&, const Monomials&, int64_t, int64_t,
                       const void*, void*);
  void (*scan)(const Problem&, const Monomials&, const ScanPlan&, int64_t, void*, void*);
  void (*scan_gradient)(const Problem&, const LowrankBackward&, const Monomials&, const ScanPlan&,
                        int64_t, void*, void*);
};

// to[l][t] = from[t][l], 4 x 4.
template <class R>
PYLOSS_INLINE void transpose_4(R* to, int64_t to_stride, const R* from, int64_t from_stride) {
#if defined(__SSE2__)
  if constexpr (std::is_same<R, float>::value) {
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
    __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
    return;
  }
#endif
  for (int l = 0; l < 4; ++l) {
    for (int t = 0; t < 4; ++t) to[l * to_stride + t] = from[t * from_stride + l];
  }
}

// out, lse and y of a row from [N | y]; returns flags.
template <class R>
PYLOSS_INLINE int finish_row(const LowrankForward& f, const Problem& p, int64_t row, bool sees,
                             const R* sums, R y) {
  R* out = static_cast<R*>(f.out) + row * p.dv;
  static_cast<R*>(f.y)[row] = sees ? y : R(0);
  static_cast<R*>(f.lse)[row] = sees ? log_(y) + R(p.centre) : -infinity_<R>();
  const R inverse = sees ? R(1) / y : R(0);
  for (int64_t c = 0; c < p.dv; ++c) out[c] = sees ? sums[c] * inverse : R(0);
  return sees ? flags_of(y) : 0;
}

#define PYLOSS_KERNELS "cpu/tensor_attention_lowrank_scan.h"
#include "cpu/per_instruction_set.h"

template <class R>
LowrankTasks best_tasks() {
#if PYLOSS_HAS_TARGET_PRAGMA
  if (instruction_set() == InstructionSet::kV4) return v4::lowrank_tasks<R>();
  if (instruction_set() == InstructionSet::kV3) return v3::lowrank_tasks<R>();
#endif
  return base::lowrank_tasks<R>();
}

// fn(float{}) or fn(double{}).
template <class Fn>
auto with_type(DType t, Fn&& fn) {
  if (t == DType::kF64) return fn(double{});
  return fn(float{});
}

// Without their sign, the bits of floating numbers are ordered as their sizes, and NaN comes last.
template <class Bits, class R>
PYLOSS_INLINE Bits largest_bits(const R* x, int64_t n) {
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(R));
    most = std::max(most, Bits(bits & std::numeric_limits<Bits>::max()));
  }
  return most;
}
PYLOSS_MULTIVERSION int64_t largest_of(const float* x, int64_t n) {
  return largest_bits<int32_t>(x, n);
}
PYLOSS_MULTIVERSION int64_t largest_of(const double* x, int64_t n) {
  return largest_bits<int64_t>(x, n);
}

template <class R, class Bits>
double largest(const R* x, int64_t n, int threads) {
  constexpr int64_t kGrain = 1 << 17;
  std::atomic<int64_t> most{0};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    const int64_t found = largest_of(x + begin, end - begin);
    int64_t before = most;
    while (before < found && !most.compare_exchange_weak(before, found)) {
    }
  });
  const Bits bits = Bits(most);
  R value;
  std::memcpy(&value, &bits, sizeof(R));
  return value;
}

int64_t most_keys(const Problem& p) {
  int64_t n = 0;
  for (const LowrankAxis& a : p.axes) n = std::max(n, a.band.n);
  return n;
}

int64_t row_tasks(int64_t rows) {
  return (blocks_of(rows) + kTaskBlocks - 1) / kTaskBlocks;
}

// Where everything lies in the scratch buffer; with a null base only its size.
template <class R>
struct ForwardLayout {
  SumPlan sums;
  int64_t sum_tasks, query_tasks, sum_slot, query_slot, total;
  R *partials, *weights;
  char* slots;

  ForwardLayout(const Problem& p, const Monomials& mono, int threads, void* base)
      : sums(mono, p.dv, p.batch * p.kv_heads * int64_t(p.axes.size()), blocks_of(most_keys(p))) {
    const int64_t heads = p.batch * p.kv_heads, sources = heads * int64_t(p.axes.size());
    sum_tasks = sources * sums.ranges * sums.chunks;
    query_tasks = p.batch * p.heads * row_tasks(p.n_q);
    Arena count(nullptr), count_query(nullptr), arena(base);
    SumBuffers<R>(mono, sums, count);
    RowBuffers<R>(mono, p.dv, false, count_query);
    sum_slot = count.used();
    query_slot = count_query.used();
    partials = arena.take<R>(sources * sums.chunks * sums.partial());
    weights = arena.take<R>(heads * mono.count * (p.dv + 1));
    slots = arena.take<char>(std::max(slots_for(sum_tasks, threads) * sum_slot,
                                      slots_for(query_tasks, threads) * query_slot));
    total = arena.used();
  }
};

template <class R>
struct BackwardLayout {
  SumPlan sums;
  int64_t sum_tasks, query_tasks, sum_slot, row_slot, total;
  R *partials, *weights, *state_gradients;  // the last: axis by axis, as the states
  char* slots;

  BackwardLayout(const Problem& p, const Monomials& mono, int threads, void* base)
      : sums(mono, p.dv, p.batch * p.kv_heads, p.group() * blocks_of(p.n_q)) {
    const int64_t heads = p.batch * p.kv_heads, m = int64_t(p.axes.size());
    sum_tasks = heads * sums.ranges * sums.chunks;
    query_tasks = p.batch * p.heads * row_tasks(p.n_q);
    const int64_t key_tasks = heads * row_tasks(most_keys(p));
    Arena count(nullptr), count_rows(nullptr), arena(base);
    SumBuffers<R>(mono, sums, count);
    RowBuffers<R>(mono, p.dv, true, count_rows);
    sum_slot = count.used();
    row_slot = count_rows.used();
    partials = arena.take<R>(heads * sums.chunks * sums.partial());
    weights = arena.take<R>(heads * mono.count * (p.dv + 1));
    state_gradients = arena.take<R>(m * heads * mono.count * (p.dv + 1));
    const int64_t row_slots = slots_for(std::max(query_tasks, key_tasks), threads);
    slots =
        arena.take<char>(std::max(slots_for(sum_tasks, threads) * sum_slot, row_slots * row_slot));
    total = arena.used();
  }
};

// to[c] for c <= dv: the sums of a source's monomial, added up over the chunks.
template <class R>
void merge_chunks(const SumPlan& plan, const R* partials, int64_t source, int64_t a, R* to) {
  std::fill(to, to + plan.dv + 1, R(0));
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const R* part = partials + (source * plan.chunks + chunk) * plan.partial();
    const R* row = part + a * plan.dvp;
    for (int64_t c = 0; c < plan.dv; ++c) to[c] += row[c];
    const R* lanes = part + plan.count * plan.dvp + a * kLanePad;
    // Halves onto each other, which vectorises: one by one is 2 us of a call with r = 153.
    R sums[kLanePad / 2];
    for (int64_t i = 0; i < kLanePad / 2; ++i) sums[i] = lanes[i] + lanes[i + kLanePad / 2];
    for (int64_t half = kLanePad / 4; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    to[plan.dv] += sums[0];
  }
}

// w prod_x A_x of every head and monomial.
template <class R, class States>
void multiply_states(const Problem& p, const Monomials& mono, const States& states, R* weights,
                     int threads) {
  const int64_t width = p.dv + 1;
  parallel_for(p.batch * p.kv_heads * mono.count, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      R* to = weights + row * width;
      std::fill(to, to + width, R(mono.weight[row % mono.count]));
      for (const auto* state : states) {
        const R* from = static_cast<const R*>(state) + row * width;
        for (int64_t c = 0; c < width; ++c) to[c] *= from[c];
      }
    }
  });
}

// ---- causal and windowed
// ---------------------------------------------------------------------------

template <class R>
struct ScanLayout {
  ScanPlan plan;
  int64_t tasks, slot, total;
  R* partials;
  char* slots;

  ScanLayout(const Problem& p, const Monomials& mono, bool backward, int threads, void* base)
      : plan(p, mono), tasks(p.batch * p.heads * plan.ranges) {
    Arena count(nullptr), arena(base);
    ScanBuffers<R>(plan, backward, count);
    slot = count.used();
    partials = arena.take<R>(tasks * (backward ? plan.gradients : p.n_q * plan.width));
    slots = arena.take<char>(slots_for(tasks, threads) * slot);
    total = arena.used();
  }
};

// Whether query i = 0, 1, .. of a head sees a key on every axis: keys in sight, counted.
class Sight {
 public:
  Sight(const Problem& p, int64_t b, int64_t g) : p_(p), b_(b), g_(g), axes_(p.axes.size()) {}
  bool next(int64_t i) {
    bool all = true;
    for (size_t x = 0; x < axes_.size(); ++x) {
      const LowrankAxis& axis = p_.axes[x];
      const uint8_t* keep =
          axis.mask ? axis.mask + b_ * axis.mask_strides[0] + g_ * axis.mask_strides[1] : nullptr;
      At& at = axes_[x];
      for (const int64_t end = axis.band.end(i); at.end < end; ++at.end) {
        at.count += !keep || keep[at.end];
      }
      for (const int64_t begin = std::min(at.end, axis.band.begin(i)); at.begin < begin;
           ++at.begin) {
        at.count -= !keep || keep[at.begin];
      }
      all = all && at.count > 0;
    }
    return all;
  }

 private:
  struct At {
    int64_t begin = 0, end = 0, count = 0;
  };
  const Problem& p_;
  int64_t b_, g_;
  std::vector<At> axes_;
};

template <class R>
int scan_forward(const LowrankTasks& run, const Problem& p, const LowrankForward& f, void* scratch,
                 int threads) {
  const Monomials mono(p.d, p.coefficients);
  const ScanLayout<R> layout(p, mono, false, threads, scratch);
  const ScanPlan& plan = layout.plan;
  run_tasks(layout.tasks, slots_for(layout.tasks, threads), [&](int64_t slot, int64_t t) {
    run.scan(p, mono, plan, t, layout.slots + slot * layout.slot, layout.partials);
  });
  std::atomic<int> flags{0};
  parallel_for(p.batch * p.heads, 1, threads, [&](int64_t first, int64_t last) {
    std::vector<R> sum(plan.width);
    for (int64_t head = first; head < last; ++head) {
      Sight sight(p, head / p.heads, head % p.heads / p.group());
      for (int64_t i = 0; i < p.n_q; ++i) {
        const int64_t row = head * p.n_q + i;
        std::fill(sum.begin(), sum.end(), R(0));
        for (int64_t range = 0; range < plan.ranges; ++range) {
          const R* part = layout.partials + ((head * plan.ranges + range) * p.n_q + i) * plan.width;
          for (int64_t c = 0; c < plan.width; ++c) sum[c] += part[c];
        }
        flags |= finish_row(f, p, row, sight.next(i), sum.data(), sum[p.dv]);
      }
    }
  });
  return flags;
}

template <class R>
void scan_backward(const LowrankTasks& run, const Problem& p, const LowrankBackward& grads,
                   void* scratch, int threads) {
  const Monomials mono(p.d, p.coefficients);
  const ScanLayout<R> layout(p, mono, true, threads, scratch);
  const ScanPlan& plan = layout.plan;
  run_tasks(layout.tasks, slots_for(layout.tasks, threads), [&](int64_t slot, int64_t t) {
    run.scan_gradient(p, grads, mono, plan, t, layout.slots + slot * layout.slot, layout.partials);
  });
  // A head's gradients: `elements` from `start` on in the tasks of its group.
  const auto add_up = [&](void* result, int64_t heads, int64_t group, int64_t start,
                          int64_t elements) {
    if (!result) return;
    parallel_for(heads * elements, 4096, threads, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t head = at / elements, stop = std::min(end, (head + 1) * elements);
        R* to = static_cast<R*>(result) + at;
        std::fill(to, to + (stop - at), R(0));
        for (int64_t t = head * group * plan.ranges; t < (head + 1) * group * plan.ranges; ++t) {
          const R* part = layout.partials + t * plan.gradients + start + at - head * elements;
          for (int64_t i = 0; i < stop - at; ++i) to[i] += part[i];
        }
        at = stop;
      }
    });
  };
  add_up(grads.dq, p.batch * p.heads, 1, 0, p.n_q * p.d);
  for (size_t x = 0; x < p.axes.size(); ++x) {
    const int64_t n = p.axes[x].band.n, heads = p.batch * p.kv_heads;
    add_up(grads.dk[x], heads, p.group(), plan.key_partial[x], n * p.d);
    add_up(grads.dv[x], heads, p.group(), plan.key_partial[x] + n * p.d, n * p.dv);
  }
}

template <class R>
void advise_gradients(const Problem& p, const LowrankBackward& grads) {
  const int64_t size = int64_t(sizeof(R)), heads = p.batch * p.kv_heads;
  if (grads.dq) advise_huge_pages(grads.dq, p.batch * p.heads * p.n_q * p.d * size);
  for (size_t x = 0; x < p.axes.size(); ++x) {
    const int64_t rows = heads * p.axes[x].band.n;
    if (grads.dk[x]) advise_huge_pages(grads.dk[x], rows * p.d * size);
    if (grads.dv[x]) advise_huge_pages(grads.dv[x], rows * p.dv * size);
  }
}

template <class R>
int forward(const LowrankTasks& run, const Problem& p, const LowrankForward& f, void* scratch,
            int threads) {
  if (p.scans()) return scan_forward<R>(run, p, f, scratch, threads);
  const Monomials mono(p.d, p.coefficients);
  const ForwardLayout<R> layout(p, mono, threads, scratch);
  advise_huge_pages(f.out, p.batch * p.heads * p.n_q * p.dv * int64_t(sizeof(R)));
  const SumPlan& sums = layout.sums;
  run_tasks(layout.sum_tasks, slots_for(layout.sum_tasks, threads), [&](int64_t slot, int64_t t) {
    run.key_sums(p, mono, sums, t, layout.slots + slot * layout.sum_slot, layout.partials);
  });
  const int64_t m = int64_t(p.axes.size()), heads = p.batch * p.kv_heads, width = p.dv + 1;
  parallel_for(heads * mono.count, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t x = 0; x < m; ++x) {
        merge_chunks(sums, layout.partials, row / mono.count * m + x, row % mono.count,
                     static_cast<R*>(f.states[x]) + row * width);
      }
    }
  });
  multiply_states(p, mono, f.states, layout.weights, threads);
  std::atomic<int> flags{0};
  run_tasks(
      layout.query_tasks, slots_for(layout.query_tasks, threads), [&](int64_t slot, int64_t t) {
        flags |= run.query(p, f, mono, t, layout.weights, layout.slots + slot * layout.query_slot);
      });
  return flags;
}

template <class R>
void backward(const LowrankTasks& run, const Problem& p, const LowrankBackward& grads,
              void* scratch, int threads) {
  if (p.scans()) return scan_backward<R>(run, p, grads, scratch, threads);
  const Monomials mono(p.d, p.coefficients);
  const BackwardLayout<R> layout(p, mono, threads, scratch);
  advise_gradients<R>(p, grads);
  const SumPlan& sums = layout.sums;
  const int64_t m = int64_t(p.axes.size()), heads = p.batch * p.kv_heads, width = p.dv + 1;
  if (grads.dq) {
    multiply_states(p, mono, grads.states, layout.weights, threads);
    run_tasks(layout.query_tasks, slots_for(layout.query_tasks, threads),
              [&](int64_t slot, int64_t t) {
                run.query_gradient(p, grads, mono, t, layout.weights,
                                   layout.slots + slot * layout.row_slot);
              });
  }
  const auto wanted = [&](int64_t x) { return grads.dk[x] || grads.dv[x]; };
  bool any = false;
  for (int64_t x = 0; x < m; ++x) any = any || wanted(x);
  if (!any) return;
  run_tasks(layout.sum_tasks, slots_for(layout.sum_tasks, threads), [&](int64_t slot, int64_t t) {
    run.query_sums(p, grads, mono, sums, t, layout.slots + slot * layout.sum_slot, layout.partials);
  });
  // dA_x = w E prod of the other axes' A.
  parallel_for(heads * mono.count, 256, threads, [&](int64_t begin, int64_t end) {
    std::vector<R> e(width);
    for (int64_t row = begin; row < end; ++row) {
      merge_chunks(sums, layout.partials, row / mono.count, row % mono.count, e.data());
      const R weight = R(mono.weight[row % mono.count]);
      for (int64_t x = 0; x < m; ++x) {
        R* to = layout.state_gradients + (x * heads * mono.count + row) * width;
        for (int64_t c = 0; c < width; ++c) to[c] = weight * e[c];
        for (int64_t other = 0; other < m; ++other) {
          if (other == x) continue;
          const R* state = static_cast<const R*>(grads.states[other]) + row * width;
          for (int64_t c = 0; c < width; ++c) to[c] *= state[c];
        }
      }
    }
  });
  for (int64_t x = 0; x < m; ++x) {
    if (!wanted(x)) continue;
    const int64_t tasks = heads * row_tasks(p.axes[x].band.n);
    run_tasks(tasks, slots_for(tasks, threads), [&](int64_t slot, int64_t t) {
      run.key_gradient(p, grads, mono, x, t,
                       layout.state_gradients + x * heads * mono.count * width,
                       layout.slots + slot * layout.row_slot);
    });
  }
}

}  // namespace

double largest_entry(const void* x, DType dtype, int64_t n, int threads) {
  if (dtype == DType::kF64)
    return largest<double, int64_t>(static_cast<const double*>(x), n, threads);
  return largest<float, int32_t>(static_cast<const float*>(x), n, threads);
}

int64_t monomial_count(int64_t d, int64_t degree) {
  int64_t count = 1;
  for (int64_t t = 1; t <= degree; ++t) {  // C(d + t, t) from C(d + t - 1, t - 1)
    if (multiply_overflows(count, d + t, &count)) return -1;
    count /= t;
    if (count > INT32_MAX) return -1;
  }
  return count;
}

int64_t tensor_attention_lowrank_forward_scratch(const Problem& p, int threads) {
  const Monomials mono(p.d, p.coefficients);
  return with_type(p.dtype, [&](auto x) {
    using R = decltype(x);
    return p.scans() ? ScanLayout<R>(p, mono, false, threads, nullptr).total
                     : ForwardLayout<R>(p, mono, threads, nullptr).total;
  });
}

int64_t tensor_attention_lowrank_backward_scratch(const Problem& p, int threads) {
  const Monomials mono(p.d, p.coefficients);
  return with_type(p.dtype, [&](auto x) {
    using R = decltype(x);
    return p.scans() ? ScanLayout<R>(p, mono, true, threads, nullptr).total
                     : BackwardLayout<R>(p, mono, threads, nullptr).total;
  });
}

int tensor_attention_lowrank_forward(const Problem& p, const LowrankForward& f, void* scratch,
                                     int threads) {
  return with_type(p.dtype, [&](auto x) {
    return forward<decltype(x)>(best_tasks<decltype(x)>(), p, f, scratch, threads);
  });
}

void tensor_attention_lowrank_backward(const Problem& p, const LowrankBackward& b, void* scratch,
                                       int threads) {
  with_type(p.dtype, [&](auto x) {
    backward<decltype(x)>(best_tasks<decltype(x)>(), p, b, scratch, threads);
  });
}

}  // namespace pyloss::cpu
