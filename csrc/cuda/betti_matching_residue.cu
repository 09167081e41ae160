// Dimension 1 of volumes, as far as it is local: which columns (squares) are left to the reduction
// on the host. Five matrices, by the images whose order rows and columns have: (I, I), (T, T),
// (M, M), (I, M), (T, M); one without a target.
//
// Not left are squares that give birth in dimension 2, the joints of the dual tree of the columns'
// image (their columns vanish), and those of apparent pairs: sigma is the largest face of tau in
// the order of the rows, and tau the smallest coface of sigma in that of the columns. No column
// before tau has a one in the row of sigma, so that tau, as it stands, has the pivot sigma: a pair
// in any reduction, and whoever meets the pivot sigma finds its column in the same way.
//
// Memory traffic: 4 + 16 ranks of a square, from the cache; 4 bytes for each that is left.
#include "cuda/betti_matching.cuh"

namespace pyloss::cuda {
namespace {

constexpr int kThreads = 512;

struct Matrix {
  u32 item, rows, columns;  // images
};
__device__ Matrix matrix_of(const BettiWork& w, u32 graph) {
  const u32 m = graph / w.items, item = graph % w.items;
  return m < 3 ? Matrix{item, m, m} : Matrix{item, m - 3, kBoth};
}

__device__ u32 larger(u32 a, u32 b) {
  return a > b ? a : b;
}

__device__ u64 square_key(const Space& s, const u32* rank, u32 p, u32 normal) {
  return u64(rank[normal_square_voxel(s, rank, p, normal)]) << 32 | (3 * p + normal);
}

__device__ bool is_apparent(const Space& s, const u32* rows, const u32* columns, u32 square) {
  const u32 p = square / 3, normal = square % 3;
  const u32 a = normal == 0 ? 1 : 0, b = normal == 2 ? 1 : 2;
  const u32 at_b = p + s.stride(b), at_a = p + s.stride(a), far = at_a + s.stride(b);
  const u32 r = rows[p], r_b = rows[at_b], r_a = rows[at_a], r_far = rows[far];
  const u64 faces[] = {u64(larger(r, r_a)) << 32 | (3 * p + a),
                       u64(larger(r, r_b)) << 32 | (3 * p + b),
                       u64(larger(r_b, r_far)) << 32 | (3 * at_b + a),
                       u64(larger(r_a, r_far)) << 32 | (3 * at_a + b)};
  u64 largest = faces[0];
#pragma unroll
  for (int i = 1; i < 4; ++i) largest = faces[i] > largest ? faces[i] : largest;
  const u32 q = u32(largest) / 3, axis = u32(largest) % 3;
  const u64 own = square_key(s, columns, p, normal);
  for (u32 across = 0; across < 3; ++across) {
    if (across == axis) continue;
    const u32 other = 3 - axis - across, at = s.coordinate(q, across);
    if (at + 1 < s.extent(across) && square_key(s, columns, q, other) < own) return false;
    if (at > 0 && square_key(s, columns, q - s.stride(across), other) < own) return false;
  }
  return true;
}

__global__ void __launch_bounds__(kThreads) betti_no_columns_kernel(u32* counts) {
  for_each(0, 2, [&](u32 i) { counts[i] = 0; });
}

// In any order; counts[1] says where a NaN is.
__global__ void __launch_bounds__(kThreads)
    betti_columns_kernel(BettiWork w, u32 matrices, u32* counts, u32* names) {
  const u32 squares = 3 * w.n;
  for_blocks(0, matrices * w.items * squares, [&](u32 i, bool active) {
    bool left = false;
    if (active && w.space.is_joint(1, i % squares)) {
      const u32 square = i % squares;
      const Matrix m = matrix_of(w, i / squares);
      const u32 graph = (w.images + m.columns) * w.items + m.item;  // of the dual run
      left = !w.tree[u64(graph) * squares + square] &&
             !is_apparent(w.space, ranks_of(w, m.rows, m.item), ranks_of(w, m.columns, m.item),
                          square);
    }
    const u32 place = block_append(left, counts);
    if (left) names[place] = i;
  });
  find_nan(w, counts + 1);
}

// What a sort needs: the order of a column in its matrix as a signed number.
__global__ void __launch_bounds__(kThreads)
    betti_column_keys_kernel(BettiWork w, const u32* names, u32 count, int64_t* names_out,
                             int64_t* keys) {
  const u32 squares = 3 * w.n;
  for_each(0, count, [&](u32 i) {
    const u32 name = names[i], square = name % squares;
    const Matrix m = matrix_of(w, name / squares);
    const u32* rank = ranks_of(w, m.columns, m.item);
    names_out[i] = name;
    keys[i] = int64_t(square_key(w.space, rank, square / 3, square % 3) ^ u64{1} << 63);
  });
}

// Beside the partial sums of the loss, which lie at the beginning.
u32* names_of(const BettiWork& w) {
  return reinterpret_cast<u32*>(w.room_b + 20 * u64(w.total));
}
u32 matrices(const BettiWork& w) {
  return w.images == 3 ? 5 : 1;
}

}  // namespace

void betti_list_columns(const BettiWork& w, u32* counts, void* stream) {
  launch_over(w, 2, stream, betti_no_columns_kernel, counts);
  launch_over(w, u64(matrices(w)) * w.items * 3 * w.n, stream, betti_columns_kernel, w, matrices(w),
              counts, names_of(w));
}

void betti_write_columns(const BettiWork& w, u32 count, int64_t* names, int64_t* keys,
                         void* stream) {
  launch_over(w, count, stream, betti_column_keys_kernel, w, static_cast<const u32*>(names_of(w)),
              count, names, keys);
}

}  // namespace pyloss::cuda
