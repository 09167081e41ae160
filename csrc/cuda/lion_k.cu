// Lion-K on the GPU: formulas in common/lion_k.h.
//
// Decomposition: a launch serves up to kTensors tensors, whose addresses are its argument, so that
// nothing is copied to the device and the step can be captured in a CUDA graph. A block owns kChunk
// elements of one tensor, which it finds by the number of blocks before each. A thread takes four
// neighbouring elements at a time, by one load where they are aligned.
// Memory: x and m are read and written, g is read, once each: 20 bytes per float.
// Numerics: float, double where the parameters are double. No atomics; the bits do not depend on
// how tensors are packed into launches.
#include "cuda/lion_k.h"

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"

namespace pyloss::cuda {
namespace {

using lion_k::Factors;
using lion_k::Kappa;
using lion_k::Options;
using lion_k::Problem;
using lion_k::Rounding;

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int64_t kChunk = 4096;
constexpr int kTensors = 60;  // 4 KiB of arguments are what every architecture takes

struct Batch {
  lion_k::Tensor tensors[kTensors];
  uint32_t first[kTensors + 1];  // blocks before each tensor
  int count;
  DType g_dtype, m_dtype;
};
static_assert(sizeof(Batch) + sizeof(Options) + sizeof(LionKScalars) <= 4096, "kernel arguments");

// Four elements as R; `n` of them are there.
template <class T, class R>
__device__ __forceinline__ void load(const void* array, int64_t at, int n, R* to) {
  struct alignas(sizeof(T) * kVector) Vector {
    T v[kVector];
  };
  const T* from = static_cast<const T*>(array) + at;
  if (n == kVector && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
    const Vector read = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = R(to_float(read.v[i]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = i < n ? R(to_float(from[i])) : R(0);
}

template <class T>
__device__ __forceinline__ void store(T* to, int n, const T* values) {
  struct alignas(sizeof(T) * kVector) Vector {
    T v[kVector];
  };
  if (n == kVector && reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0) {
    Vector written;
#pragma unroll
    for (int i = 0; i < kVector; ++i) written.v[i] = values[i];
    *reinterpret_cast<Vector*>(to) = written;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < n) to[i] = values[i];
  }
}

template <class R>
__device__ __forceinline__ void load_any(const void* array, DType t, int64_t at, int n, R* to) {
  switch (t) {
    case DType::kF64:
      return load<double>(array, at, n, to);
    case DType::kF32:
      return load<float>(array, at, n, to);
    case DType::kBF16:
      return load<BF16>(array, at, n, to);
    default:
      return load<F16>(array, at, n, to);
  }
}
template <class T, class R>
__device__ __forceinline__ void store_as(void* array, int64_t at, int n, const R* from) {
  T values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = FromFloat<T>::of(from[i]);
  store(static_cast<T*>(array) + at, n, values);
}
template <class R>
__device__ __forceinline__ void store_any(void* array, DType t, int64_t at, int n, const R* from) {
  switch (t) {
    case DType::kF64:
      return store_as<double>(array, at, n, from);
    case DType::kF32:
      return store_as<float>(array, at, n, from);
    case DType::kBF16:
      return store_as<BF16>(array, at, n, from);
    default:
      return store_as<F16>(array, at, n, from);
  }
}

template <class R>
__device__ __forceinline__ void update_any(Kappa kappa, const Factors<R>& f, const R* g,
                                           const R* given, R* x, R* m) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    switch (kappa) {
      case Kappa::kL1:
        lion_k::update<Kappa::kL1>(f, g[i], given[i], x + i, m + i);
        break;
      case Kappa::kSoft:
        lion_k::update<Kappa::kSoft>(f, g[i], given[i], x + i, m + i);
        break;
      case Kappa::kHuber:
        lion_k::update<Kappa::kHuber>(f, g[i], given[i], x + i, m + i);
        break;
      case Kappa::kSmooth:
        lion_k::update<Kappa::kSmooth>(f, g[i], given[i], x + i, m + i);
        break;
      default:
        lion_k::update<Kappa::kGiven>(f, g[i], given[i], x + i, m + i);
    }
  }
}

template <class T, class R>
__device__ __forceinline__ void store_parameter(const lion_k::Tensor& t, Rounding rounding,
                                                uint32_t key, int64_t at, int n, const R* x) {
  if constexpr (sizeof(T) == 2) {
    T values[kVector];
    if (rounding == Rounding::kStochastic) {
      // Four neighbours never lie on both sides of 2^32.
      const uint32_t own = lion_k::block_key(key, uint32_t(uint64_t(at) >> 32));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const uint32_t random = lion_k::random_bits(own, uint32_t(uint64_t(at)) + uint32_t(i));
        values[i] = lion_k::round_stochastic(T{}, x[i], random);
      }
      return store(static_cast<T*>(t.x) + at, n, values);
    }
    if (rounding == Rounding::kCompensated) {
      T rest[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = FromFloat<T>::of(x[i]);
        const float lost = x[i] - to_float(values[i]);
        rest[i] = FromFloat<T>::of(lost - lost == 0 ? lost : 0.0f);
      }
      store(static_cast<T*>(t.compensation) + at, n, rest);
      return store(static_cast<T*>(t.x) + at, n, values);
    }
  }
  store_as<T>(t.x, at, n, x);
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    lion_k_kernel(Batch batch, Options o, LionKScalars scalars) {
  if (scalars.found_inf && *scalars.found_inf != 0) return;
  int low = 0, high = batch.count;  // the last tensor that begins at this block or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const lion_k::Tensor t = batch.tensors[low];
  const Factors<R> f = lion_k::factors<R>(o, scalars.lr ? double(*scalars.lr) : o.lr);
  const int64_t step = scalars.step ? int64_t(*scalars.step) : o.step;
  const uint32_t key =
      o.rounding == Rounding::kStochastic ? lion_k::tensor_key(o.seed, step, t.position) : 0u;
  const int64_t begin = int64_t(blockIdx.x - batch.first[low]) * kChunk;
  const int64_t end = begin + kChunk < t.n ? begin + kChunk : t.n;
  for (int64_t at = begin + int64_t(threadIdx.x) * kVector; at < end; at += kThreads * kVector) {
    const int n = end - at < kVector ? int(end - at) : kVector;
    R x[kVector], g[kVector], m[kVector], given[kVector] = {};
    load<T>(t.x, at, n, x);
    load_any(t.g, batch.g_dtype, at, n, g);
    load_any(t.m, batch.m_dtype, at, n, m);
    if (t.given) load<R>(t.given, at, n, given);
    if (t.compensation) {
      R rest[kVector];
      load<T>(t.compensation, at, n, rest);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] += rest[i];
    }
    update_any(o.kappa, f, g, given, x, m);
    store_parameter<T>(t, o.rounding, key, at, n, x);
    store_any(t.m, batch.m_dtype, at, n, m);
  }
}

// The kernel on as many tensors as fit, from `at` on; returns the first that did not.
template <class T, class R>
int64_t launch_batch(const Problem& p, const LionKScalars& scalars, int64_t at, void* stream) {
  Batch batch{};
  batch.g_dtype = p.g_dtype;
  batch.m_dtype = p.m_dtype;
  int64_t blocks = 0;
  for (; at < p.count && batch.count < kTensors; ++at) {
    const int64_t more = ceil_div(p.tensors[at].n, kChunk);
    if (more == 0) continue;
    if (blocks > 0 && blocks + more > 0x7fffffff) break;
    batch.tensors[batch.count] = p.tensors[at];
    batch.first[batch.count++] = uint32_t(blocks);
    blocks += more;
  }
  if (blocks == 0) return at;
  batch.first[batch.count] = grid_size(blocks);
  launch(lion_k_kernel<T, R>, dim3(grid_size(blocks)), dim3(kThreads), 0, stream, batch, p.options,
         scalars);
  return at;
}

}  // namespace

void lion_k_step(const Problem& p, const LionKScalars& scalars, void* stream) {
  dispatch_float(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t at = 0; at < p.count;) at = launch_batch<T, R>(p, scalars, at, stream);
  });
}

}  // namespace pyloss::cuda
