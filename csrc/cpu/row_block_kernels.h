// The block loops that every row goes through, on vectors that stay in registers, for one
// instruction set. No include guard: per_instruction_set.h.
//
// What row_blocks.cpp leaves to the compiler's own vectors is as fast but for its accumulators,
// which it keeps in memory where a loop also stores: here the maximum's chain is then the time.
#include "cpu/gemm_tile.h"
// After its vector types.
#include "cpu/exp_vector.h"

// kLanes partial results, whatever the width of a vector: the same order of sums everywhere.
constexpr int kWidth = Vec<float>::kLanes, kCount = kLanes / kWidth;
typedef uint16_t HalfBits PYLOSS_VECTOR(PYLOSS_VECTOR_BYTES / 2);
typedef uint16_t LooseHalfBits PYLOSS_LOOSE_VECTOR(PYLOSS_VECTOR_BYTES / 2, 2);

PYLOSS_INLINE Vec<float>::V load_float(const float* p) {
  return load(p);
}
PYLOSS_INLINE Vec<float>::V load_float(const BF16* p) {
  using I = Vec<float>::I;
#if PYLOSS_VECTOR_BYTES == 64  // gcc widens by halves
  const I bits = I(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  const I bits = PYLOSS_CONVERT(*reinterpret_cast<const LooseHalfBits*>(p), I);
#endif
  return reinterpret_cast<Vec<float>::V>(bits << 16);
}

PYLOSS_INLINE void store_float(float* p, Vec<float>::V v) {
  store(p, v);
}
// As float_to_bf16 of common/dtype.h.
PYLOSS_INLINE void store_float(BF16* p, Vec<float>::V v) {
  using I = Vec<float>::I;
  const I u = reinterpret_cast<I>(v);
  const I rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  const I found = (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  *reinterpret_cast<LooseHalfBits*>(p) = PYLOSS_CONVERT(found, HalfBits);
}

// One value of kLanes, by halves.
template <class Fn>
PYLOSS_INLINE float fold(Vec<float>::V* v, const Fn& fn) {
  PYLOSS_UNROLL(8)
  for (int half = kCount / 2; half > 0; half /= 2) {
    PYLOSS_UNROLL(8)
    for (int k = 0; k < half; ++k) v[k] = fn(v[k], v[k + half]);
  }
  float lane[kWidth];
  store(lane, v[0]);
  PYLOSS_UNROLL(8)
  for (int half = kWidth / 2; half > 0; half /= 2) {
    PYLOSS_UNROLL(8)
    for (int l = 0; l < half; ++l) lane[l] = fn(lane[l], lane[l + half]);
  }
  return lane[0];
}

// z = x, padded with -inf; returns the maximum. False comparisons pass NaN by: it reaches the
// result through the sums.
template <class T>
float load_max(const T* x, int64_t n, float* z) {
  using V = Vec<float>::V;
  V most[kCount];
  PYLOSS_UNROLL(16)
  for (int k = 0; k < kCount; ++k) most[k] = V{} - infinity_<float>();
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    PYLOSS_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const V v = load_float(x + i + k * kWidth);
      store(z + i + k * kWidth, v);
      most[k] = v > most[k] ? v : most[k];
    }
  }
  if (whole < n) {
    for (int64_t i = whole; i < whole + kLanes; ++i) {
      z[i] = i < n ? to_float(x[i]) : -infinity_<float>();
    }
    PYLOSS_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const V v = load(z + whole + k * kWidth);
      most[k] = v > most[k] ? v : most[k];
    }
  }
  return fold(most, [](auto a, auto b) PYLOSS_ALWAYS_INLINE { return b > a ? b : a; });
}

// Not left to the compiler, which makes a call of memcpy of one half and a loop of the other.
template <class T>
void load_lines(const T* x, int64_t n, float* z, float* m) {
  using V = Vec<float>::V;
  const auto add = [&](int64_t i, V v) PYLOSS_ALWAYS_INLINE {
    const V most = load(m + i);
    store(z + i, v);
    store(m + i, v > most ? v : most);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) add(i, load_float(x + i));
  for (; i < padded(n); i += kWidth) {
    float some[kWidth];
    for (int64_t l = 0; l < kWidth; ++l) {
      some[l] = i + l < n ? to_float(x[i + l]) : -infinity_<float>();
    }
    add(i, load(some));
  }
}

// block_exp_sum of row_blocks.h for logits of kBytes: kLanes of them are kBytes cache lines.
template <int kBytes>
float exp_sum(float* z, int64_t n, float m, const char* ahead) {
  using V = Vec<float>::V;
  static_assert(kLanes == 64, "elements in a cache line of bytes");
  V sum[kCount] = {};
  const V reference = V{} + m;
  for (int64_t i = 0; i < n; i += kLanes) {
    PYLOSS_UNROLL(8)
    for (int line = 0; line < kBytes; ++line) PYLOSS_PREFETCH(ahead + i * kBytes + line * 64);
    PYLOSS_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const V e = exp_of(load(z + i + k * kWidth) - reference);
      store(z + i + k * kWidth, e);
      sum[k] += e;
    }
  }
  return fold(sum, [](auto a, auto b) PYLOSS_ALWAYS_INLINE { return a + b; });
}

// Past the cache, to an address that is a multiple of the vector's size.
PYLOSS_INLINE void stream_vector(float* p, Vec<float>::V v) {
#if PYLOSS_VECTOR_BYTES == 64
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif PYLOSS_VECTOR_BYTES == 32
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}
PYLOSS_INLINE void stream_vector(BF16* p, Vec<float>::V v) {
  alignas(PYLOSS_VECTOR_BYTES / 2) BF16 half[kWidth];
  store_float(half, v);
#if PYLOSS_VECTOR_BYTES == 64
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(half));
#elif PYLOSS_VECTOR_BYTES == 32
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(half));
#else
  memcpy(p, half, sizeof half);
#endif
}

// dst[i] = value(x[i]) but for one entry, straight to where it stays: through a buffer it would
// take as long again. The entry is put in on the way: a store to a line that has just gone past the
// cache would fetch it back.
template <class From, class T, class Value>
PYLOSS_INLINE void write_row(const From* x, int64_t n, Entry entry, T* dst, bool stream,
                             const Value& value) {
  using V = Vec<float>::V;
  const auto at = [&](const From* from, int64_t i) PYLOSS_ALWAYS_INLINE {
    V v = value(load_float(from));
    if (PYLOSS_UNLIKELY(uint64_t(entry.at - i) < uint64_t(kWidth))) {
      v[entry.at - i] = entry.value;
    }
    return v;
  };
  const auto part = [&](int64_t i, int64_t count) PYLOSS_ALWAYS_INLINE {
    From some[kWidth] = {};
    T found[kWidth];
    memcpy(some, x + i, count * sizeof(From));
    store_float(found, at(some, i));
    memcpy(dst + i, found, count * sizeof(T));
  };
  int64_t i = 0;
  if (stream) {
    constexpr uintptr_t kSize = kWidth * sizeof(T);
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(dst) % kSize / sizeof(T));
    i = std::min(n, head);
    if (i > 0) part(0, i);
    for (; i + kWidth <= n; i += kWidth) stream_vector(dst + i, at(x + i, i));
  } else {
    for (; i + kWidth <= n; i += kWidth) store_float(dst + i, at(x + i, i));
  }
  if (i < n) part(i, n - i);
}

template <class T>
void scale_row(const float* e, int64_t n, float scale, Entry entry, T* dst, bool stream) {
  write_row(e, n, entry, dst, stream,
            [scale](Vec<float>::V v) PYLOSS_ALWAYS_INLINE { return v * scale; });
}
template <class T>
void exp_row(const T* x, int64_t n, float m, float scale, Entry entry, T* dst, bool stream) {
  write_row(x, n, entry, dst, stream,
            [m, scale](Vec<float>::V v) PYLOSS_ALWAYS_INLINE { return exp_of(v - m) * scale; });
}

BlockMath block_math() {
  return {load_max<float>, load_max<BF16>,   load_lines<float>, load_lines<BF16>, exp_sum<2>,
          exp_sum<4>,      scale_row<float>, scale_row<BF16>,   exp_row<float>,   exp_row<BF16>};
}
