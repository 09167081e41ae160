// Principal axes of clouds of points on the CPU. Formulas: common/frame_pca.h.
//
// Decomposition: threads take groups of kGroup clouds. The points of a cloud become lines of
// coordinates, a block of kPoints at a time in the first-level cache, and are summed there in
// lanes: the centre, then the products around it. What the centre lost by rounding is the mean of
// the differences, and is put back. The eigenproblems of a group are solved side by side. A range
// of clouds is computed the same way in any thread, so that threads cannot change a bit, nor can
// neighbours in a batch.
//
// Memory traffic per coordinate of b bytes: forward reads b, twice where a cloud has more than
// kPoints points; backward reads b and writes b.
//
// Numerics: float lanes within a block, double between blocks; double for double points.
// Paper: Puny et al. arXiv 2110.03336.
#include "cpu/frame_pca.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/compiler.h"
#include "cpu/parallel.h"
#include "cpu/row_blocks.h"

namespace pyloss::cpu {
namespace {

using namespace frame_pca;

constexpr int kGroup = 16;                 // clouds: float lanes of the widest registers
constexpr int64_t kPoints = 512;           // of a block; its lines take 8 KiB in float
constexpr int64_t kLanes = 16;             // partial sums
constexpr int64_t kRange = 16 * 1024;      // coordinates that a thread claims at a time
constexpr int64_t kSerial = 32 * 1024;     // below, a second thread would wake up too late
constexpr int64_t kCloudCoordinates = 64;  // what the eigenproblem of a cloud costs, in coordinates

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- Loops, compiled for each instruction set --------------------------------------------------

// A block of points as lines of coordinates, and their weights; filled up with weight 0.
template <class R, int D>
struct Lines {
  alignas(64) R x[D][kPoints], w[kPoints];
  int64_t n;  // whole groups of lanes

  template <class T>
  PYLOSS_INLINE void load(const T* from, const R* weight, int64_t count) {
    n = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < D; ++k) x[k][i] = R(to_float(from[i * D + k]));
    }
    for (int64_t i = count; i < n; ++i) {
      for (int k = 0; k < D; ++k) x[k][i] = 0;
      w[i] = 0;
    }
    if (!weight) {
      for (int64_t i = 0; i < count; ++i) w[i] = 1;
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      w[i] = weight[i];
      for (int k = 0; k < D; ++k) x[k][i] = counted(x[k][i], w[i]);
    }
  }
};

// By halves whose lengths are constants: a cloud of few points is mostly this.
template <class R>
PYLOSS_INLINE double sum_lanes(const R* acc) {
  static_assert(kLanes == 16, "as unrolled here");
  R a[8], b[4];
  for (int l = 0; l < 8; ++l) a[l] = acc[l] + acc[l + 8];
  for (int l = 0; l < 4; ++l) b[l] = a[l] + a[l + 4];
  return double((b[0] + b[2]) + (b[1] + b[3]));
}

template <int D>
struct Moments {
  double total, centre[D], products[kTriangle<D>];
};

// Half types are converted a block at a time: the loops, which are long, exist for R alone.
template <class R, int D>
PYLOSS_INLINE void moments_of(const void* x, DType dtype, const R* weight, int64_t count,
                              bool centred, Moments<D>* m) {
  Lines<R, D> lines;
  R converted[kPoints * D];
  const auto load = [&](int64_t at) {
    const int64_t n = std::min(kPoints, count - at);
    const R* from = static_cast<const R*>(x) + at * D;
    if constexpr (std::is_same_v<R, float>) {
      if (dtype_size(dtype) == 2) {
        load_values(static_cast<const uint16_t*>(x) + at * D, dtype, n * D, converted);
        from = converted;
      }
    }
    lines.load(from, weight ? weight + at : nullptr, n);
  };
  double sum[D] = {}, total = 0;
  for (int64_t at = 0; at < count; at += kPoints) {
    load(at);
    R mass[kLanes] = {}, acc[D][kLanes] = {};
    for (int64_t i = 0; i < lines.n; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) mass[l] += lines.w[i + l];
      for (int k = 0; k < D; ++k) {
        for (int64_t l = 0; l < kLanes; ++l) acc[k][l] += lines.w[i + l] * lines.x[k][i + l];
      }
    }
    total += sum_lanes(mass);
    for (int k = 0; k < D; ++k) sum[k] += sum_lanes(acc[k]);
  }
  const bool moved = centred && total != 0;
  R centre[D];
  for (int k = 0; k < D; ++k) centre[k] = moved ? R(sum[k] / total) : R(0);
  double lost[D] = {}, products[kTriangle<D>] = {};
  for (int64_t at = 0; at < count; at += kPoints) {
    if (count > kPoints) load(at);
    R first[D][kLanes] = {}, second[kTriangle<D>][kLanes] = {};
    for (int64_t i = 0; i < lines.n; i += kLanes) {
      R d[D][kLanes], wd[D][kLanes];
      for (int k = 0; k < D; ++k) {
        for (int64_t l = 0; l < kLanes; ++l) {
          d[k][l] = lines.x[k][i + l] - centre[k];
          wd[k][l] = lines.w[i + l] * d[k][l];
          first[k][l] += wd[k][l];
        }
      }
      for (int k = 0; k < D; ++k) {
        for (int j = k; j < D; ++j) {
          for (int64_t l = 0; l < kLanes; ++l) second[entry<D>(k, j)][l] += wd[k][l] * d[j][l];
        }
      }
    }
    for (int k = 0; k < D; ++k) lost[k] += sum_lanes(first[k]);
    for (int k = 0; k < kTriangle<D>; ++k) products[k] += sum_lanes(second[k]);
  }
  m->total = total;
  for (int k = 0; k < D; ++k) m->centre[k] = moved ? double(centre[k]) + lost[k] / total : 0;
  for (int k = 0; k < kTriangle<D>; ++k) m->products[k] = products[k];
}

template <class T, class R, int D>
PYLOSS_INLINE void gradient_of(const T* x, const R* weight, int64_t count, const Slope<R, D>& slope,
                               T* dx, R* dw) {
  Lines<R, D> lines;
  alignas(64) R out[D][kPoints], mass[kPoints];
  for (int64_t at = 0; at < count; at += kPoints) {
    const int64_t n = std::min(kPoints, count - at);
    lines.load(x + at * D, weight ? weight + at : nullptr, n);
    for (int64_t i = 0; i < lines.n; ++i) {
      R point[D], found[D];
      for (int k = 0; k < D; ++k) point[k] = lines.x[k][i];
      mass[i] = slope.point(point, lines.w[i], found);
      for (int k = 0; k < D; ++k) out[k][i] = found[k];
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int k = 0; k < D; ++k) dx[(at + i) * D + k] = FromFloat<T>::of(out[k][i]);
    }
    if (dw) std::copy(mass, mass + n, dw + at);
  }
}

#define PYLOSS_FRAME_MOMENTS(R, D)                                                             \
  PYLOSS_MULTIVERSION void moments(const void* x, DType dtype, const R* weight, int64_t count, \
                                   bool centred, Moments<D>* m) {                              \
    moments_of<R, D>(x, dtype, weight, count, centred, m);                                     \
  }
PYLOSS_FRAME_MOMENTS(float, 2)
PYLOSS_FRAME_MOMENTS(float, 3)
PYLOSS_FRAME_MOMENTS(double, 2)
PYLOSS_FRAME_MOMENTS(double, 3)
#undef PYLOSS_FRAME_MOMENTS

#define PYLOSS_FRAME_GRADIENT(T, R, D)                                          \
  PYLOSS_MULTIVERSION void gradient(const T* x, const R* weight, int64_t count, \
                                    const Slope<R, D>& slope, T* dx, R* dw) {   \
    gradient_of<T, R, D>(x, weight, count, slope, dx, dw);                      \
  }
PYLOSS_FRAME_GRADIENT(float, float, 2)
PYLOSS_FRAME_GRADIENT(float, float, 3)
PYLOSS_FRAME_GRADIENT(BF16, float, 2)
PYLOSS_FRAME_GRADIENT(BF16, float, 3)
PYLOSS_FRAME_GRADIENT(F16, float, 2)
PYLOSS_FRAME_GRADIENT(F16, float, 3)
PYLOSS_FRAME_GRADIENT(double, double, 2)
PYLOSS_FRAME_GRADIENT(double, double, 3)
#undef PYLOSS_FRAME_GRADIENT

PYLOSS_MULTIVERSION void solve(Axes<float, 2, kGroup>* axes) {
  axes->solve();
}
PYLOSS_MULTIVERSION void solve(Axes<float, 3, kGroup>* axes) {
  axes->solve();
}
PYLOSS_MULTIVERSION void solve(Axes<double, 2, kGroup>* axes) {
  axes->solve();
}
PYLOSS_MULTIVERSION void solve(Axes<double, 3, kGroup>* axes) {
  axes->solve();
}

// ---- Clouds ------------------------------------------------------------------------------------

template <class T, int D>
void forward_group(const Problem& p, RealOf<T>* frames, int64_t begin, int64_t end) {
  using R = RealOf<T>;
  using At = Row<D>;
  Axes<R, D, kGroup> axes{};
  for (int64_t cloud = begin; cloud < end; ++cloud) {
    const int64_t first = bound_of(p, cloud), l = cloud - begin;
    const R* weight = static_cast<const R*>(p.weight);
    Moments<D> m;
    moments(static_cast<const T*>(p.x) + first * D, p.dtype, weight ? weight + first : nullptr,
            bound_of(p, cloud + 1) - first, p.centred, &m);
    for (int k = 0; k < kTriangle<D>; ++k) axes.c[k][l] = R(m.products[k]);
    R* row = frames + cloud * At::kWidth;
    for (int k = 0; k < D; ++k) row[At::kCentre + k] = R(m.centre[k]);
    row[At::kTotal] = R(m.total);
  }
  solve(&axes);
  for (int64_t cloud = begin; cloud < end; ++cloud) {
    const int64_t l = cloud - begin;
    R* row = frames + cloud * At::kWidth;
    for (int i = 0; i < D; ++i) {
      for (int j = 0; j < D; ++j) row[At::kAxes + i * D + j] = axes.v[i][j][l];
      row[At::kValues + i] = axes.value[i][l];
    }
  }
}

template <class T, int D>
void backward_cloud(const Problem& p, const Backward& b, int64_t cloud) {
  using R = RealOf<T>;
  constexpr int64_t kWidth = Row<D>::kWidth;
  const int64_t first = bound_of(p, cloud), count = bound_of(p, cloud + 1) - first;
  const R* weight = static_cast<const R*>(p.weight);
  R* dw = static_cast<R*>(b.dw);
  const Slope<R, D> slope(static_cast<const R*>(b.frames) + cloud * kWidth,
                          static_cast<const R*>(b.grad) + cloud * kWidth, p.centred, b.tolerance);
  gradient(static_cast<const T*>(p.x) + first * D, weight ? weight + first : nullptr, count, slope,
           static_cast<T*>(b.dx) + first * D, dw ? dw + first : nullptr);
}

void check_offsets(const Problem& p) {
  if (!p.offsets) return;
  int64_t before = 0;
  for (int64_t cloud = 0; cloud <= p.clouds; ++cloud) {
    const int64_t at = load_index(p.offsets, p.offsets_dtype, cloud);
    const bool ends = cloud > 0 || at == 0, closes = cloud < p.clouds || at == p.points;
    if (!ends || !closes || at < before || at > p.points) {
      throw std::invalid_argument("offsets must rise from 0 to the number of points, got " +
                                  std::to_string(at));
    }
    before = at;
  }
}

// each(begin, end) over groups of kGroup clouds; ranges hold whole groups.
template <class Fn>
void for_groups(const Problem& p, int threads, const Fn& each) {
  const int64_t coordinates = p.points * p.dim + p.clouds * kCloudCoordinates;
  const int64_t of_group = coordinates / std::max<int64_t>(p.clouds, 1) * kGroup;
  const int64_t groups = std::max<int64_t>(1, kRange / std::max<int64_t>(of_group, 1));
  parallel_for(p.clouds, groups * kGroup, coordinates < kSerial ? 1 : threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t at = begin; at < end; at += kGroup) {
                   each(at, std::min<int64_t>(at + kGroup, end));
                 }
               });
}

}  // namespace

void frame_pca_forward(const Problem& p, void* frames, int threads) {
  check_offsets(p);
  dispatch(p, [&](auto zero, auto dim) {
    using T = decltype(zero);
    for_groups(p, threads, [&](int64_t begin, int64_t end) {
      forward_group<T, dim()>(p, static_cast<RealOf<T>*>(frames), begin, end);
    });
  });
}

void frame_pca_backward(const Problem& p, const Backward& b, int threads) {
  check_offsets(p);
  dispatch(p, [&](auto zero, auto dim) {
    using T = decltype(zero);
    for_groups(p, threads, [&](int64_t begin, int64_t end) {
      for (int64_t cloud = begin; cloud < end; ++cloud) backward_cloud<T, dim()>(p, b, cloud);
    });
  });
}

}  // namespace pyloss::cpu
