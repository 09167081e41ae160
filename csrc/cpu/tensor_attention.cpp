// Tensor attention on the CPU: choice of the instruction set, threads, sums over partial results.
//
// Decomposition: the forward's tasks are ranges of queries of one head; the backward's are ranges
// of keys of the first axis of one head, each of which adds up its own dQ, dK2, dV2; a second pass
// adds these partial gradients in the order of the ranges. Tasks do not depend on the number of
// threads, so the results do not either. Memory traffic: a task reads its head's q, k, v once and
// works in the cache; the backward writes and reads at most 8 partial gradients per head. Beyond
// that O(n d) per thread. Accumulator: float; double for fp64. The products are those of
// tensor_attention_gemm.h.
#include "cpu/tensor_attention.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/compiler.h"
#include "common/math.h"
#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/tasks.h"
#include "cpu/tensor_attention_plan.h"

namespace pyloss::cpu {
namespace {

struct Tasks {
  void (*forward)(const TensorAttentionProblem&, const TensorAttentionForward&, const ForwardPlan&,
                  int64_t, void*);
  void (*backward)(const TensorAttentionProblem&, const TensorAttentionBackward&,
                   const BackwardPlan&, int64_t, void*, void*);
};

#define PYLOSS_KERNELS "cpu/tensor_attention_tasks.h"
#include "cpu/per_instruction_set.h"

Tasks tasks_for(DType t) {
#if PYLOSS_HAS_TARGET_PRAGMA
  if (instruction_set() == InstructionSet::kV4) return v4::tasks_of(t);
  if (instruction_set() == InstructionSet::kV3) return v3::tasks_of(t);
#endif
  return base::tasks_of(t);
}

TensorAttentionProblem ordered(TensorAttentionProblem p) {
  if (swap_axes(p)) std::swap(p.axes[0], p.axes[1]);
  return p;
}
TensorAttentionBackward ordered(TensorAttentionBackward b, const TensorAttentionProblem& p) {
  if (swap_axes(p)) {
    std::swap(b.dk[0], b.dk[1]);
    std::swap(b.dv[0], b.dv[1]);
    std::swap(b.dmask[0], b.dmask[1]);
  }
  return b;
}

template <class Fn>
void with_accumulator(DType t, Fn&& fn) {
  if (t == DType::kF64) {
    fn(double{});
  } else {
    fn(float{});
  }
}

int64_t forward_slot_bytes(const TensorAttentionProblem& p, const ForwardPlan& plan) {
  Arena count(nullptr);
  with_accumulator(p.dtype, [&](auto r) { ForwardBuffers<decltype(r)>(p, plan, count); });
  return count.used();
}
int64_t backward_slot_bytes(const TensorAttentionProblem& p, const BackwardPlan& plan) {
  Arena count(nullptr);
  with_accumulator(p.dtype, [&](auto r) { BackwardBuffers<decltype(r)>(p, plan, count); });
  return count.used();
}
int64_t partial_bytes(const TensorAttentionProblem& p, const BackwardPlan& plan) {
  const int64_t element = p.dtype == DType::kF64 ? 8 : 4;
  return (p.batch * p.heads * plan.per_head * element + 63) / 64 * 64;
}

// to[l] = the sum of `rows`, in their order.
template <class T, class R>
void write_sum(T* to, const std::vector<const R*>& rows, int64_t n) {
  for (int64_t l = 0; l < n; ++l) {
    R sum = 0;
    for (const R* row : rows) sum += row[l];
    to[l] = FromFloat<T>::of(sum);
  }
}

template <class T, class R>
void add_up(const TensorAttentionProblem& p, const TensorAttentionBackward& b,
            const BackwardPlan& plan, const R* partial, int threads) {
  const auto head_parts = [&](int64_t batch, int64_t head) {
    return partial + (batch * p.heads + head) * plan.per_head;
  };
  if (b.dq) {
    parallel_for(p.batch * p.heads * p.n_q, 64, threads, [&](int64_t begin, int64_t end) {
      std::vector<const R*> rows;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t i = at % p.n_q;
        const R* parts = partial + at / p.n_q * plan.per_head;
        rows.clear();
        for (const KeyRange& r : plan.ranges) {
          if (r.i0 <= i && i < r.i1) rows.push_back(plan.dq(parts, r) + (i - r.i0) * plan.dp);
        }
        write_sum(static_cast<T*>(b.dq) + at * p.d, rows, p.d);
      }
    });
  }
  // A kv head's gradients: over the query heads of its group, and the ranges.
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t n = p.axes[axis].band.n;
    for (const bool is_key : {true, false}) {
      void* const result = is_key ? b.dk[axis] : b.dv[axis];
      if (!result) continue;
      const int64_t features = is_key ? p.d : p.dv, stride = is_key ? plan.dp : plan.dvp;
      parallel_for(p.batch * p.kv_heads * n, 64, threads, [&](int64_t begin, int64_t end) {
        std::vector<const R*> rows;
        for (int64_t at = begin; at < end; ++at) {
          const int64_t key = at % n, kv = at / n;
          rows.clear();
          for (int64_t m = 0; m < p.group(); ++m) {
            const R* parts = head_parts(kv / p.kv_heads, kv % p.kv_heads * p.group() + m);
            if (axis == 0) {
              const R* base = is_key ? plan.dk_first(parts) : plan.dv_first(parts, n);
              rows.push_back(base + key * stride);
              continue;
            }
            for (const KeyRange& r : plan.ranges) {
              if (key < r.c0 || key >= r.c1) continue;
              const R* base = is_key ? plan.dk_second(parts, r) : plan.dv_second(parts, r);
              rows.push_back(base + (key - r.c0) * stride);
            }
          }
          write_sum(static_cast<T*>(result) + at * features, rows, features);
        }
      });
    }
  }
}

}  // namespace

int64_t tensor_attention_forward_scratch(const TensorAttentionProblem& problem, int threads) {
  const TensorAttentionProblem p = ordered(problem);
  const ForwardPlan plan(p);
  return slots_for(p.batch * p.heads * plan.blocks, threads) * forward_slot_bytes(p, plan);
}

int64_t tensor_attention_backward_scratch(const TensorAttentionProblem& problem,
                                          bool mask_gradients, int threads) {
  const TensorAttentionProblem p = ordered(problem);
  const BackwardPlan plan(p, mask_gradients);
  const int64_t tasks = p.batch * p.heads * static_cast<int64_t>(plan.ranges.size());
  return partial_bytes(p, plan) + slots_for(tasks, threads) * backward_slot_bytes(p, plan);
}

void tensor_attention_forward(const TensorAttentionProblem& problem,
                              const TensorAttentionForward& f, void* scratch, int threads) {
  const TensorAttentionProblem p = ordered(problem);
  const ForwardPlan plan(p);
  const Tasks run = tasks_for(p.dtype);
  const int64_t tasks = p.batch * p.heads * plan.blocks, bytes = forward_slot_bytes(p, plan);
  run_tasks(tasks, slots_for(tasks, threads), [&](int64_t slot, int64_t task) {
    run.forward(p, f, plan, task, static_cast<char*>(scratch) + slot * bytes);
  });
}

void tensor_attention_backward(const TensorAttentionProblem& problem,
                               const TensorAttentionBackward& backward, void* scratch,
                               int threads) {
  const TensorAttentionProblem p = ordered(problem);
  const TensorAttentionBackward b = ordered(backward, problem);
  const BackwardPlan plan(p, b.mask_gradients());
  const Tasks run = tasks_for(p.dtype);
  const int64_t tasks = p.batch * p.heads * static_cast<int64_t>(plan.ranges.size());
  const int64_t bytes = backward_slot_bytes(p, plan);
  char* const slots = static_cast<char*>(scratch) + partial_bytes(p, plan);
  run_tasks(tasks, slots_for(tasks, threads), [&](int64_t slot, int64_t task) {
    run.backward(p, b, plan, task, slots + slot * bytes, scratch);
  });
  dispatch_float(p.dtype, [&](auto x) {
    using T = decltype(x);
    using R = std::conditional_t<std::is_same<T, double>::value, double, float>;
    add_up<T, R>(p, b, plan, static_cast<const R*>(scratch), threads);
  });
}

}  // namespace pyloss::cpu
