// Folds and maps of segments on the GPU: formulas in common/segment.h.
//
// Decomposition of a fold: a team of lanes of one warp owns a segment and up to 32 adjacent columns
// of it; how many rows it takes at a time follows from the mean length, which the host knows. A
// segment longer than part_rows is cut into parts, counted from its own beginning: a block takes
// the parts that begin in its window of rows, and a thread for each column merges them in their
// order. Both find nothing to do where no segment is long, and are not launched where none can be.
// No atomics: the bits depend on the segment and on the mean length alone.
//
// A map: a block takes adjacent values and looks up the range of their segments, a thread in that
// range the segment of its value.
//
// Memory traffic per value of b bytes: a fold reads b (twice, from the caches, where a maximum or
// a mean comes first), a map reads b and writes b. Scratch memory comes from Python, full of NaN.
// Offsets out of order or out of range give NaN and are never followed. Accumulator: float, double
// for double.
#include "cuda/segment.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/row_softmax_walk.cuh"

namespace pyloss::cuda {
namespace {

using namespace segment;

constexpr int kThreads = 128;
constexpr int kBlockWarps = kThreads / kWarp;
constexpr int kMapValues = 4;  // of a thread
constexpr unsigned kMostTiles = 65535;

// Adjacent columns of a team, a power of two, and rows that it takes at a time.
struct Team {
  int columns, rows;

  __host__ __device__ int lanes() const { return columns * rows; }
};

// Rows of a segment; nothing of one whose offsets are no range of rows, or that is not there.
struct Range {
  int64_t begin, n;
  bool good;
};
__device__ __forceinline__ Range range_of(const Problem& p, int64_t s) {
  const int64_t begin = p.offset(s), end = s < p.segments ? p.offset(s + 1) : begin;
  const bool good = begin >= 0 && begin <= end && end <= p.rows && p.offset(0) == 0 &&
                    p.offset(p.segments) == p.rows;
  return {good ? begin : 0, good ? end - begin : 0, good};
}

template <Pass P, class R>
__device__ __forceinline__ void add(Sums<R>& s, R x, R y, R m) {
  if constexpr (P == Pass::kSum) s.a += x;
  if constexpr (P == Pass::kProd) s.a *= x;
  if constexpr (P == Pass::kMin) s.a = smaller(s.a, x);
  if constexpr (P == Pass::kMax) s.a = larger(s.a, x);
  if constexpr (P == Pass::kExp) s.a += exp_(x - m);
  if constexpr (P == Pass::kTies) s.a += x == m ? R(1) : R(0);
  if constexpr (P == Pass::kInner) s.a += x * y;
  if constexpr (P == Pass::kSquares) {
    const R d = x - m;
    s.a += d;
    s.b += d * d;
  }
  if constexpr (P == Pass::kFactors) {
    s.a *= x == 0 ? R(1) : x;
    s.b += x == 0 ? R(1) : R(0);
  }
}

// Rows first, first + step, ... < n from `begin` of column c.
template <Pass P, class T, class R = RealOf<T>>
__device__ __forceinline__ Sums<R> sums_of(const Problem& p, int64_t begin, int64_t n, int64_t c,
                                           int first, int step, R m) {
  Sums<R> s = nothing<P, R>();
  const T* x = static_cast<const T*>(p.x) + begin * p.x_stride + c;
  const T* y = static_cast<const T*>(p.other);
  if (P == Pass::kInner) y += begin * p.other_stride + c;
#pragma unroll 4
  for (int64_t i = first; i < n; i += step) {
    R other = 0;
    if constexpr (P == Pass::kInner) other = to_real(y[i * p.other_stride]);
    add<P>(s, R(to_real(x[i * p.x_stride])), other, m);
  }
  return s;
}

// Of the lanes that differ in the bits from `columns` to below `lanes`.
template <Pass P, class R>
__device__ __forceinline__ Sums<R> warp_join(Sums<R> s, int columns, int lanes) {
  for (int step = columns; step < lanes; step *= 2) {
    Sums<R> t{__shfl_xor_sync(kFullMask, s.a, step), s.b};
    if constexpr (P == Pass::kSquares || P == Pass::kFactors) {
      t.b = __shfl_xor_sync(kFullMask, s.b, step);
    }
    s = join<P>(s, t);
  }
  return s;
}

template <Pass P>
inline constexpr Pass kFirst = P == Pass::kExp ? Pass::kMax : Pass::kSum;
template <Pass P>
inline constexpr bool kTwice = P == Pass::kExp || P == Pass::kSquares;

// What a pass subtracts, or compares with, of a part whose first pass has found `s`.
template <Pass P, class R>
__device__ __forceinline__ R middle(const Sums<R>& s, int64_t n) {
  return P == Pass::kSquares ? s.a / R(n) : s.a;
}
template <Pass P, class R>
__device__ __forceinline__ R base_of(R m) {
  return P == Pass::kExp ? finite_or_zero(m) : m;
}

template <class R>
__device__ __forceinline__ void store(const Problem& p, Fold f, void* out, int64_t at,
                                      const Part<R>& part, bool good) {
  R found[2] = {};
  finish(f, part, found, 1);
  const int64_t step = p.segments * p.width;
  R* to = static_cast<R*>(out) + at;
  to[0] = good ? found[0] : nan_<R>();
  if (results(f) == 2) to[step] = good ? found[1] : nan_<R>();
}

// ---- Segments ----------------------------------------------------------------------------------

template <Pass P, class T>
__global__ void __launch_bounds__(kThreads, 4)
    segment_fold_kernel(Problem p, Fold f, Team team, int64_t size, void* out) {
  using R = RealOf<T>;
  const int lane = threadIdx.x % team.lanes();
  const int64_t teams = kThreads / team.lanes();
  const int64_t s = int64_t(blockIdx.x) * teams + threadIdx.x / team.lanes();
  const bool is_there = s < p.segments;
  const Range range = is_there ? range_of(p, s) : Range{0, 0, true};
  const int64_t n = range.n > size ? 0 : range.n;  // the long ones go by parts
  for (int64_t tile = blockIdx.y; tile * team.columns < p.width; tile += gridDim.y) {
    const int64_t c = tile * team.columns + lane % team.columns;
    const bool is_column = is_there && c < p.width;
    const int64_t rows = is_column ? n : 0;
    const int first = lane / team.columns;
    R m = 0;
    if (P == Pass::kTies && is_column) {
      m = static_cast<const R*>(p.given[0])[s * p.width + c];
    }
    if constexpr (kTwice<P>) {
      const auto sums = sums_of<kFirst<P>, T>(p, range.begin, rows, c, first, team.rows, R(0));
      m = middle<P>(warp_join<kFirst<P>>(sums, team.columns, team.lanes()), n);
    }
    auto sums = sums_of<P, T>(p, range.begin, rows, c, first, team.rows, base_of<P>(m));
    sums = warp_join<P>(sums, team.columns, team.lanes());
    if (is_column && first == 0 && range.n <= size) {
      store(p, f, out, s * p.width + c, settled(P, Part<R>{R(n), m, sums}), range.good);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    segment_argmax_kernel(Problem p, Team team, int64_t* out) {
  using R = RealOf<T>;
  const int lane = threadIdx.x % team.lanes();
  const int64_t s = int64_t(blockIdx.x) * (kThreads / team.lanes()) + threadIdx.x / team.lanes();
  const bool is_there = s < p.segments;
  const Range range = is_there ? range_of(p, s) : Range{0, 0, true};
  for (int64_t tile = blockIdx.y; tile * team.columns < p.width; tile += gridDim.y) {
    const int64_t c = tile * team.columns + lane % team.columns;
    const bool is_column = is_there && c < p.width;
    const R m = is_column ? static_cast<const R*>(p.given[0])[s * p.width + c] : R(0);
    long long found = p.rows;
    for (int64_t i = lane / team.columns; is_column && i < range.n; i += team.rows) {
      const int64_t row = range.begin + i;
      const R x = to_real(static_cast<const T*>(p.x)[row * p.x_stride + c]);
      if (x == m || x != x) {
        found = row;
        break;
      }
    }
    for (int step = team.columns; step < team.lanes(); step *= 2) {
      found = MinOp{}(found, __shfl_xor_sync(kFullMask, found, step));
    }
    if (is_column && lane < team.columns) {
      out[s * p.width + c] = found < p.rows ? int64_t(found) : -1;
    }
  }
}

// ---- Parts of long segments --------------------------------------------------------------------

// Of all threads of the block, for each column; `slots` is free again behind the next barrier.
template <Pass P, class R>
__device__ __forceinline__ Sums<R> block_join(Sums<R> s, int columns, R (*slots)[2][kWarp]) {
  s = warp_join<P>(s, columns, kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  if (lane < columns) {
    slots[warp][0][lane] = s.a;
    slots[warp][1][lane] = s.b;
  }
  __syncthreads();
  const int column = lane % columns;
  s = {slots[0][0][column], slots[0][1][column]};
  for (int w = 1; w < kBlockWarps; ++w) {
    s = join<P>(s, Sums<R>{slots[w][0][column], slots[w][1][column]});
  }
  return s;
}

// Of the long segment s the part that begins in window w, if there is one: its first, or a later.
struct PartRange {
  int64_t begin, n, slot;
};
__device__ __forceinline__ PartRange part_in(const Problem& p, int64_t s, int64_t w, int64_t size) {
  const PartRange none{0, 0, 0};
  if (s < 0) return none;
  const Range range = range_of(p, s);
  const int64_t from = w * size, end = range.begin + range.n;
  const int64_t last = from + size < end ? from + size : end;
  if (range.n <= size) return none;
  int64_t begin = range.begin;
  if (begin < from) begin += (from - begin + size - 1) / size * size;
  if (begin >= last) return none;
  return {begin, size < end - begin ? size : end - begin, 2 * w + (begin == range.begin)};
}

template <Pass P, class T>
__global__ void __launch_bounds__(kThreads, 4)
    segment_parts_kernel(Problem p, int columns, int64_t size, void* scratch) {
  using R = RealOf<T>;
  __shared__ R slots[kBlockWarps][2][kWarp];
  const int64_t w = blockIdx.x;
  const int rows = kThreads / columns, first = threadIdx.x / columns;
  // A segment of which a part begins here begins before the window, or is the last in it.
  const int64_t before = p.first_from(w * size) - 1, last = p.first_from((w + 1) * size) - 1;
  for (int which = 0; which < (last == before ? 1 : 2); ++which) {
    const int64_t s = which == 0 ? before : last;
    const PartRange part = part_in(p, s, w, size);
    if (part.n == 0) continue;  // all of the block
    for (int64_t tile = blockIdx.y; tile * columns < p.width; tile += gridDim.y) {
      const int64_t c = tile * columns + threadIdx.x % columns;
      const int64_t n = c < p.width ? part.n : 0;
      R m = 0;
      if (P == Pass::kTies && c < p.width) {
        m = static_cast<const R*>(p.given[0])[s * p.width + c];
      }
      if constexpr (kTwice<P>) {
        const auto sums = sums_of<kFirst<P>, T>(p, part.begin, n, c, first, rows, R(0));
        m = middle<P>(block_join<kFirst<P>>(sums, columns, slots), part.n);
      }
      auto sums = sums_of<P, T>(p, part.begin, n, c, first, rows, base_of<P>(m));
      sums = block_join<P>(sums, columns, slots);
      if (n > 0 && int(threadIdx.x) < columns) {
        const Part<R> done = settled(P, Part<R>{R(n), m, sums});
        R* to = static_cast<R*>(scratch) + (part.slot * p.width + c) * kPartNumbers;
        to[0] = done.m;
        to[1] = done.sums.a;
        to[2] = done.sums.b;
      }
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads, 4)
    segment_merge_kernel(Problem p, Fold f, int64_t size, const R* scratch, void* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.segments * p.width) return;
  const int64_t s = at / p.width, c = at % p.width;
  const Range range = range_of(p, s);
  if (range.n <= size) return;
  const Pass pass = pass_of(f);
  Part<R> all{};
  for (int64_t i = 0; i < range.n; i += size) {
    const int64_t slot = 2 * ((range.begin + i) / size) + (i == 0);
    const R* part = scratch + (slot * p.width + c) * kPartNumbers;
    const int64_t n = size < range.n - i ? size : range.n - i;
    all = merge(pass, all, Part<R>{R(n), part[0], {part[1], part[2]}});
  }
  store(p, f, out, at, all, true);
}

// ---- Maps --------------------------------------------------------------------------------------

template <Form F, class R>
__device__ __forceinline__ R mapped(R x, R y, const Coeffs<R>& k) {
  switch (F) {
    case Form::kChosen:
      return x == k.b ? k.a : k.c;
    case Form::kQuotient:
      return x == 0 ? k.b : k.a / x;
    case Form::kExp:
      return k.a * exp_(x - k.b);
    case Form::kAffine:
      return k.a + k.b * (x - k.c);
    case Form::kSoftmax: {
      const R e = k.a * exp_(x - k.b);
      return x == k.c ? e + k.d : e;
    }
    case Form::kProduct:
      return y * (x - k.a);
    default:
      return k.a;
  }
}

template <Form F, class T>
__global__ void __launch_bounds__(kThreads, 4) segment_map_kernel(Problem p, Map f, T* out) {
  using R = RealOf<T>;
  __shared__ int64_t ends[2];
  const int64_t values = p.rows * p.width, begin = int64_t(blockIdx.x) * kThreads * kMapValues;
  if (threadIdx.x < 2) {  // the segments of the first and of the last value
    const int64_t end = begin + kThreads * kMapValues;
    const int64_t value = threadIdx.x == 0 ? begin : (end < values ? end : values) - 1;
    const int64_t s = p.first_from(value / p.width + 1) - 1;
    ends[threadIdx.x] = s < 0 ? 0 : s;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMapValues; ++i) {
    const int64_t at = begin + i * kThreads + threadIdx.x;
    if (at >= values) return;
    const int64_t row = at / p.width, c = at % p.width;
    int64_t s = ends[0], high = ends[1];
    while (s < high) {  // the last segment that begins at the row or before
      const int64_t mid = high - (high - s) / 2;
      if (p.offset(mid) <= row) {
        s = mid;
      } else {
        high = mid - 1;
      }
    }
    const Range range = range_of(p, s);
    if (!range.good || row < range.begin || row >= range.begin + range.n) {
      out[at] = from_real<T>(nan_<R>());
      continue;
    }
    R g[kMostGiven];
#pragma unroll
    for (int j = 0; j < kMostGiven; ++j) {
      g[j] = j < given(f) ? static_cast<const R*>(p.given[j])[s * p.width + c] : R(0);
    }
    R x = 0, y = 0;
    if (F != Form::kSpread) x = to_real(static_cast<const T*>(p.x)[row * p.x_stride + c]);
    if (F == Form::kProduct) y = to_real(static_cast<const T*>(p.other)[row * p.other_stride + c]);
    out[at] = from_real<T>(mapped<F>(x, y, coeffs(f, g, R(range.n))));
  }
}

// ---- Launches ----------------------------------------------------------------------------------

int power_from(int64_t n, int most) {
  int found = 1;
  while (found < most && found < n) found *= 2;
  return found;
}

unsigned tiles_of(const Problem& p, int columns) {
  return unsigned(std::min<int64_t>(ceil_div(p.width, columns), kMostTiles));
}

template <Pass P, class T>
void fold(const Problem& p, Fold f, const Team& team, void* out, void* scratch, void* stream) {
  using R = RealOf<T>;
  const int64_t size = part_rows(p.width);
  const unsigned tiles = tiles_of(p, team.columns);
  launch(segment_fold_kernel<P, T>,
         dim3(grid_size(ceil_div(p.segments, kThreads / team.lanes())), tiles), dim3(kThreads), 0,
         stream, p, f, team, size, out);
  if (p.rows <= size) return;
  launch(segment_parts_kernel<P, T>, dim3(grid_size(windows(p)), tiles), dim3(kThreads), 0, stream,
         p, team.columns, size, scratch);
  launch(segment_merge_kernel<R>, dim3(grid_size(ceil_div(p.segments * p.width, kThreads))),
         dim3(kThreads), 0, stream, p, f, size, static_cast<const R*>(scratch), out);
}

template <class T>
void fold(const Problem& p, Fold f, const Team& team, void* out, void* scratch, void* stream) {
  switch (pass_of(f)) {
    case Pass::kProd:
      return fold<Pass::kProd, T>(p, f, team, out, scratch, stream);
    case Pass::kMin:
      return fold<Pass::kMin, T>(p, f, team, out, scratch, stream);
    case Pass::kMax:
      return fold<Pass::kMax, T>(p, f, team, out, scratch, stream);
    case Pass::kExp:
      return fold<Pass::kExp, T>(p, f, team, out, scratch, stream);
    case Pass::kSquares:
      return fold<Pass::kSquares, T>(p, f, team, out, scratch, stream);
    case Pass::kTies:
      return fold<Pass::kTies, T>(p, f, team, out, scratch, stream);
    case Pass::kFactors:
      return fold<Pass::kFactors, T>(p, f, team, out, scratch, stream);
    case Pass::kInner:
      return fold<Pass::kInner, T>(p, f, team, out, scratch, stream);
    default:
      return fold<Pass::kSum, T>(p, f, team, out, scratch, stream);
  }
}

template <Form F, class T>
void map(const Problem& p, Map f, void* out, void* stream) {
  launch(segment_map_kernel<F, T>,
         dim3(grid_size(ceil_div(p.rows * p.width, kThreads * kMapValues))), dim3(kThreads), 0,
         stream, p, f, static_cast<T*>(out));
}

}  // namespace

void segment_fold(const Problem& p, Fold f, void* out, void* scratch, void* stream) {
  if (p.segments * p.width == 0) return;
  Team team{power_from(p.width, kWarp), 1};
  team.rows = power_from(p.rows / p.segments, kWarp / team.columns);
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (f != Fold::kArgmax) return fold<T>(p, f, team, out, scratch, stream);
    launch(
        segment_argmax_kernel<T>,
        dim3(grid_size(ceil_div(p.segments, kThreads / team.lanes())), tiles_of(p, team.columns)),
        dim3(kThreads), 0, stream, p, team, static_cast<int64_t*>(out));
  });
}

void segment_map(const Problem& p, Map f, void* out, void* stream) {
  if (p.rows * p.width == 0) return;
  dispatch_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (form_of(f)) {
      case Form::kChosen:
        return map<Form::kChosen, T>(p, f, out, stream);
      case Form::kQuotient:
        return map<Form::kQuotient, T>(p, f, out, stream);
      case Form::kExp:
        return map<Form::kExp, T>(p, f, out, stream);
      case Form::kAffine:
        return map<Form::kAffine, T>(p, f, out, stream);
      case Form::kSoftmax:
        return map<Form::kSoftmax, T>(p, f, out, stream);
      case Form::kProduct:
        return map<Form::kProduct, T>(p, f, out, stream);
      default:
        return map<Form::kSpread, T>(p, f, out, stream);
    }
  });
}

}  // namespace pyloss::cuda
