// Elements of a row and the walk over it: loads, stores, conversions, and vectors under way. What
// is done with the elements is in row_softmax.cuh.
//
// A row is walked in batches of K vectors of 16 bytes per thread, of which A are under way while
// one is worked on; the first are loaded before anything is known about the row, its label
// included. Rows need no alignment: the classes before the first and after the last whole vector go
// one by one, and so does a row whose classes are not adjacent.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/math.h"

namespace pyloss::cuda {

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
inline constexpr int kVec = 16 / int(sizeof(T));

// ---- Elements ----------------------------------------------------------------------------------

// The subtraction z - m comes first and is exact near the maximum; folding it into the exponent's
// multiply-add would cost |m| 2^-24. Results below the smallest normal number are 0.
__device__ __forceinline__ float exp_fast(float u) {
  const float t = u * exp_poly::kLog2e;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#else
  return ::exp2f(t);
#endif
}
__device__ __forceinline__ double exp_fast(double u) {
  return ::exp(u);
}

__device__ __forceinline__ float fmax_(float a, float b) {
  return ::fmaxf(a, b);
}
__device__ __forceinline__ double fmax_(double a, double b) {
  return ::fmax(a, b);
}

// Products that the compiler may not merge with a following addition: every kernel then sees the
// same z, and z_y == m holds exactly when y is a maximum.
__device__ __forceinline__ float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1 / x;
#endif
}

__device__ __forceinline__ float tanh_fast(float x) {
  using namespace tanh_ratio;
  float c = x > kMax ? kMax : x;  // comparisons, not fmin: a NaN must stay
  c = c < -kMax ? -kMax : c;
  const float s = c * c;
  const float p = c * (kP0 + s * (kP1 + s * (kP2 + s * (kP3 + s * kP4))));
  const float q = 1.0f + s * (kQ1 + s * (kQ2 + s * (kQ3 + s * kQ4)));
  const float r = reciprocal_fast(q), y = p * r;
  const float t = y + r * (p - q * y);               // one Newton step: the quotient to rounding
  return t > 1.0f ? 1.0f : (t < -1.0f ? -1.0f : t);  // 1 - tanh^2 must not turn negative
}
__device__ __forceinline__ double tanh_fast(double x) {
  return ::tanh(x);
}

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  return to_float(F16{bits});
#endif
}

__device__ __forceinline__ float to_real(float x) {
  return x;
}
__device__ __forceinline__ double to_real(double x) {
  return x;
}
__device__ __forceinline__ float to_real(BF16 x) {
  return to_float(x);
}
__device__ __forceinline__ float to_real(F16 x) {
  return f16_to_float(x.bits);
}

// Two values to two 16-bit numbers, the first in the low half.
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi, BF16) {
#if defined(__CUDA_ARCH__)
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  return uint32_t(float_to_bf16(lo).bits) | uint32_t(float_to_bf16(hi).bits) << 16;
#endif
}
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi, F16) {
#if defined(__CUDA_ARCH__)
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  return uint32_t(float_to_f16(lo).bits) | uint32_t(float_to_f16(hi).bits) << 16;
#endif
}

template <class T>
__device__ __forceinline__ T from_real(RealOf<T> x) {
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(pack_pair(x, 0.0f, T{}))};
  } else {
    return x;
  }
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& q, RealOf<T>* x) {
  if constexpr (std::is_same_v<T, BF16>) {
    const uint32_t w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = bits_to_float(w[i] << 16);
      x[2 * i + 1] = bits_to_float(w[i] & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<T, F16>) {
    const uint32_t w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = f16_to_float(uint16_t(w[i]));
      x[2 * i + 1] = f16_to_float(uint16_t(w[i] >> 16));
    }
  } else {
    memcpy(x, &q, sizeof q);
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const RealOf<T>* x) {
  uint4 q;
  if constexpr (sizeof(T) == 2) {
    q.x = pack_pair(x[0], x[1], T{});
    q.y = pack_pair(x[2], x[3], T{});
    q.z = pack_pair(x[4], x[5], T{});
    q.w = pack_pair(x[6], x[7], T{});
  } else {
    memcpy(&q, x, sizeof q);
  }
  return q;
}

// Element i of a floating tensor whose type is known at run time only.
template <class R>
__device__ __forceinline__ R load_float(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::kF64:
      return R(static_cast<const double*>(p)[i]);
    case DType::kF32:
      return R(static_cast<const float*>(p)[i]);
    case DType::kBF16:
      return R(to_real(static_cast<const BF16*>(p)[i]));
    default:
      return R(to_real(static_cast<const F16*>(p)[i]));
  }
}
template <class R>
__device__ __forceinline__ void store_float(void* p, DType t, int64_t i, R v) {
  switch (t) {
    case DType::kF64:
      static_cast<double*>(p)[i] = double(v);
      break;
    case DType::kF32:
      static_cast<float*>(p)[i] = float(v);
      break;
    case DType::kBF16:
      static_cast<BF16*>(p)[i] = from_real<BF16>(float(v));
      break;
    default:
      static_cast<F16*>(p)[i] = from_real<F16>(float(v));
  }
}

// V elements from element i of such a tensor, of adjacent ones when `step` is 1, by vector loads
// where their addresses allow it.
template <int V, class T, class R>
__device__ __forceinline__ void load_vectors(const T* p, R* out) {
  constexpr int kEach = 16 / int(sizeof(T));
#pragma unroll
  for (int i = 0; i < V; i += kEach) {
    RealOf<T> x[kEach];
    unpack<T>(*reinterpret_cast<const uint4*>(p + i), x);
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[i + j] = R(x[j]);
  }
}
template <int V, class R>
__device__ __forceinline__ bool load_vectors_of(const void* p, DType t, int64_t i, R* out) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + uintptr_t(i * dtype_size(t));
  if (V * dtype_size(t) % 16 != 0 || at % 16 != 0) return false;
  const void* from = reinterpret_cast<const void*>(at);
  if (t == DType::kF32) {
    if constexpr (V % 4 == 0) load_vectors<V>(static_cast<const float*>(from), out);
  } else if (t == DType::kF64) {
    if constexpr (V % 2 == 0) load_vectors<V>(static_cast<const double*>(from), out);
  } else if constexpr (V % 8 == 0) {
    if (t == DType::kBF16) load_vectors<V>(static_cast<const BF16*>(from), out);
    if (t == DType::kF16) load_vectors<V>(static_cast<const F16*>(from), out);
  }
  return true;
}

// ---- Walking a row -----------------------------------------------------------------------------

// Classes [begin, end) of a row: `head` single ones, `vectors` whole vectors, the rest single.
template <class T>
struct RowSpan {
  const T* x;  // class c is x[c * cls]
  int64_t cls;
  int begin, end, head, vectors;

  __device__ int vector_begin() const { return begin + head; }
  __device__ const uint4* vector_data() const {
    return reinterpret_cast<const uint4*>(x + vector_begin());
  }
  __device__ int vector_end() const { return begin + head + vectors * kVec<T>; }
  __device__ int singles() const { return end - begin - vectors * kVec<T>; }
  __device__ int single_class(int i) const {
    return begin + i + (i < head ? 0 : vectors * kVec<T>);
  }
};

// `out` (may be null) is written at the same classes: vectors need both on the same footing.
template <class T>
__device__ __forceinline__ RowSpan<T> make_span(const T* x, int64_t cls, int begin, int end,
                                                const T* out, int64_t out_cls) {
  RowSpan<T> s{x, cls, begin, end, end - begin, 0};
  const uintptr_t at = reinterpret_cast<uintptr_t>(x + begin);
  const uintptr_t out_at = out ? reinterpret_cast<uintptr_t>(out + begin) : at;
  if (cls != 1 || (out && out_cls != 1) || ((at ^ out_at) & 15) != 0) return s;
  const int head = int((16 - (at & 15)) & 15) / int(sizeof(T));
  if (head >= s.head) return s;
  s.vectors = (s.head - head) / kVec<T>;
  s.head = head;
  return s;
}

// What a thread has under way of a row: A batches of K vectors, and its class beside them.
template <class T, int K, int A>
struct Ahead {
  uint4 vectors[A][K];
  T edge{};
};

template <class T, int K>
__device__ __forceinline__ void load_batch(const RowSpan<T>& s, const uint4* from, int first,
                                           uint4 (&q)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int i = first + k * int(blockDim.x);
    q[k] = uint4{0, 0, 0, 0};
    if (i < s.vectors) q[k] = from[i];
  }
}

// Starts the loads of a team's span; `from` are its vectors, in global or in shared memory.
template <class T, int K, int A>
__device__ __forceinline__ void start_row(const RowSpan<T>& s, const uint4* from,
                                          Ahead<T, K, A>* ahead) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int a = 0; a < A; ++a)
    load_batch(s, from, lane + a * K * int(blockDim.x), ahead->vectors[a]);
  // With vectors between head and tail there are fewer singles than lanes: one each.
  if (s.vectors > 0 && lane < s.singles()) ahead->edge = s.x[s.single_class(lane)];
}

// Calls fn(width, x, first, step, limit) for each batch of a team's span that start_row has begun:
// x[k * width + e] is the logit of class first + k step + e, for classes below `limit`; the others
// are not there. The vectors go into `keep` on the way, unless it is null; every thread reads back
// only what it has written there, so no barrier is needed.
template <class T, int K, int A, class Fn>
__device__ __forceinline__ void for_each_batch(const RowSpan<T>& s, const uint4* from, uint4* keep,
                                               Ahead<T, K, A>* ahead, const Fn& fn) {
  using R = RealOf<T>;
  constexpr int V = kVec<T>, kSingles = 4;
  const int lane = threadIdx.x, lanes = blockDim.x;
  for (int v = lane; v < s.vectors; v += A * K * lanes) {
#pragma unroll
    for (int a = 0; a < A; ++a) {
      const int i = v + a * K * lanes;
      if (a > 0 && i >= s.vectors) break;
      uint4(&q)[K] = ahead->vectors[a];
      if (keep) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (i + k * lanes < s.vectors) keep[i + k * lanes] = q[k];
        }
      }
      R x[K * V];
#pragma unroll
      for (int k = 0; k < K; ++k) unpack<T>(q[k], x + k * V);
      load_batch(s, from, i + A * K * lanes, q);
      fn(std::integral_constant<int, V>{}, x, s.vector_begin() + i * V, lanes * V, s.vector_end());
    }
  }
  const int singles = s.singles();
  for (int i = lane; i < singles; i += kSingles * lanes) {
    R x[kSingles];
#pragma unroll
    for (int k = 0; k < kSingles; ++k) {
      const int j = i + k * lanes;
      x[k] = R(0);
      if (k == 0 && s.vectors > 0) {
        x[k] = to_real(ahead->edge);
      } else if (j < singles) {
        x[k] = to_real(s.x[int64_t(s.single_class(j)) * s.cls]);
      }
    }
    const int first = s.single_class(i);
    fn(std::integral_constant<int, 1>{}, x, first, lanes, singles <= lanes ? first + 1 : s.end);
  }
}

// Zeros at the classes of a span whose x is the output.
template <class T>
__device__ __forceinline__ void write_zeros(const RowSpan<T>& s, T* out) {
  uint4* vectors = reinterpret_cast<uint4*>(out + s.vector_begin());
  for (int v = threadIdx.x; v < s.vectors; v += int(blockDim.x)) vectors[v] = uint4{0, 0, 0, 0};
  for (int i = threadIdx.x; i < s.singles(); i += int(blockDim.x)) {
    out[int64_t(s.single_class(i)) * s.cls] = from_real<T>(RealOf<T>(0));
  }
}

// The same for one thread that walks classes [begin, end) of a row alone.
template <int K, class T, class Fn>
__device__ __forceinline__ void for_each_alone(const T* x_row, int64_t cls, int begin, int end,
                                               const Fn& fn) {
  using R = RealOf<T>;
  for (int c = begin; c < end; c += K) {
    R x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = c + k < end ? to_real(x_row[int64_t(c + k) * cls]) : R(0);
    fn(std::integral_constant<int, 1>{}, x, c, 1, end);
  }
}

}  // namespace pyloss::cuda
