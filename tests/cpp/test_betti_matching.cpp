// Rows of Betti matching of images, in every instruction set that this CPU has, against union-find
// over all cells in the order of the definition. Sizes about a word of 64 columns, and images that
// make local pairs long: spirals, slopes, plateaus.
#include "cpu/betti_matching.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "instruction_sets.h"

namespace {

using pyloss::betti::kNone;
using Image = std::vector<double>;
using Rows = std::vector<std::array<int64_t, 12>>;

std::mt19937 generator(1);

struct Grid {
  uint32_t rows, cols;

  uint32_t voxels() const { return rows * cols; }
  uint32_t edges() const { return rows * cols * 2; }  // ids, not all of them cells
  bool is_edge(uint32_t e) const {
    const uint32_t p = e >> 1;
    return (e & 1) ? p % cols + 1 < cols : p / cols + 1 < rows;
  }
  uint32_t second_end(uint32_t e) const { return (e >> 1) + ((e & 1) ? 1 : cols); }
  // The squares on the two sides of an edge; kNone where the image ends.
  void sides(uint32_t e, uint32_t& before, uint32_t& after) const {
    const uint32_t p = e >> 1, row = p / cols, col = p % cols;
    if (e & 1) {
      before = row > 0 ? p - cols : kNone;
      after = row + 1 < rows ? p : kNone;
    } else {
      before = col > 0 ? p - 1 : kNone;
      after = col + 1 < cols ? p : kNone;
    }
  }
  bool is_square(uint32_t p) const { return p / cols + 1 < rows && p % cols + 1 < cols; }
};

// The voxel that carries a cell's value, among equals the one with the largest index. `key` is
// anything with operator[] that orders voxels by value.
template <class Keys>
uint32_t edge_voxel(const Grid& g, const Keys& key, uint32_t e) {
  const uint32_t p = e >> 1, q = g.second_end(e);
  return key[p] > key[q] ? p : q;
}
template <class Keys>
uint32_t square_voxel(const Grid& g, const Keys& key, uint32_t p) {
  uint32_t best = p;
  if (key[p + 1] >= key[best]) best = p + 1;
  if (key[p + g.cols] >= key[best]) best = p + g.cols;
  if (key[p + g.cols + 1] >= key[best]) best = p + g.cols + 1;
  return best;
}

// (value, number) of a cell; the outside of the squares is above all.
using Age = std::pair<double, int64_t>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double largest(const Grid& g, const Image& f, int dim, uint32_t cell) {
  if (dim == 0) return f[cell];
  if (dim == 1) return std::max(f[cell >> 1], f[g.second_end(cell)]);
  return std::max(std::max(f[cell], f[cell + 1]), std::max(f[cell + g.cols], f[cell + g.cols + 1]));
}

struct Bar {
  uint32_t birth, death;
};

// What merges, in the order of the edges of `edges`: per merge the edge, and the cell that ends
// there by the ages of each image of `ages`.
struct Merge {
  uint32_t edge;
  std::vector<uint32_t> dead;
};
std::vector<Merge> merges(const Grid& g, bool dual, const Image& edges,
                          const std::vector<const Image*>& ages) {
  std::vector<uint32_t> order;
  for (uint32_t e = 0; e < g.edges(); ++e) {
    if (g.is_edge(e)) order.push_back(e);
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return largest(g, edges, 1, a) < largest(g, edges, 1, b);
  });
  if (dual) std::reverse(order.begin(), order.end());
  const uint32_t outside = g.voxels();
  const auto age = [&](const Image& f, uint32_t cell) {
    if (cell == outside) return Age(kInfinity, int64_t(1) << 40);
    return Age(largest(g, f, dual ? 2 : 0, cell), cell);
  };
  std::vector<uint32_t> parent(outside + 1);
  std::iota(parent.begin(), parent.end(), 0);
  const auto find = [&](uint32_t x) {
    while (parent[x] != x) x = parent[x] = parent[parent[x]];
    return x;
  };
  std::vector<std::vector<uint32_t>> oldest(ages.size(), parent);
  std::vector<Merge> found;
  for (uint32_t e : order) {
    uint32_t p = e >> 1, q = g.second_end(e);
    if (dual) {
      g.sides(e, p, q);
      if (p == kNone || !g.is_square(p)) p = outside;
      if (q == kNone || !g.is_square(q)) q = outside;
    }
    const uint32_t a = find(p), b = find(q);
    if (a == b) continue;
    parent[a] = b;
    Merge m{e, {}};
    for (size_t k = 0; k < ages.size(); ++k) {
      uint32_t x = oldest[k][a], y = oldest[k][b];
      if ((age(*ages[k], x) < age(*ages[k], y)) == dual) std::swap(x, y);
      oldest[k][b] = x;
      m.dead.push_back(y);
    }
    found.push_back(m);
  }
  return found;
}

std::vector<Bar> bars(const Grid& g, int dim, const Image& f) {
  std::vector<Bar> found;
  for (const Merge& m : merges(g, dim == 1, f, {&f})) {
    const Bar b = dim == 0 ? Bar{m.dead[0], m.edge} : Bar{m.edge, m.dead[0]};
    if (largest(g, f, dim, b.birth) < largest(g, f, dim + 1, b.death)) found.push_back(b);
  }
  return found;
}

// Partners in I of the deaths of M: of its edges in dimension 0, of its squares in dimension 1.
std::map<uint32_t, uint32_t> image_pairs(const Grid& g, int dim, const Image& f, const Image& m) {
  std::map<uint32_t, uint32_t> found;
  for (const Merge& x : merges(g, dim == 1, dim == 0 ? m : f, {dim == 0 ? &f : &m})) {
    found[dim == 0 ? x.edge : x.dead[0]] = dim == 0 ? x.dead[0] : x.edge;
  }
  return found;
}

void put(std::array<int64_t, 12>& row, const Grid& g, int dim, const Image& f, const Bar& b,
         int voxels, int cells) {
  const auto place = [&](int d, uint32_t cell) -> int64_t {
    if (d == 0) return cell;
    return d == 1 ? edge_voxel(g, f, cell) : square_voxel(g, f, cell);
  };
  row[voxels] = place(dim, b.birth);
  row[voxels + 1] = place(dim + 1, b.death);
  row[cells] = b.birth;
  row[cells + 1] = b.death;
}

// Matched, of the input alone, of the target alone; the short rows are filled up with 0.
std::array<Rows, 3> matching(const Grid& g, const Image& input, const Image& target) {
  std::array<Rows, 3> found;
  Image m(input.size());
  for (size_t i = 0; i < m.size(); ++i) m[i] = std::min(input[i], target[i]);
  for (int dim = 0; dim < 2; ++dim) {
    if (dim == 1 && (g.rows < 2 || g.cols < 2)) break;
    std::map<uint32_t, Bar> of[2];
    std::map<uint32_t, uint32_t> in[2];
    for (int k = 0; k < 2; ++k) {
      const Image& f = k == 0 ? input : target;
      for (const Bar& b : bars(g, dim, f)) of[k][b.birth] = b;
      in[k] = image_pairs(g, dim, f, m);
    }
    for (const Bar& b : bars(g, dim, m)) {
      const auto a = of[0].find(in[0][b.death]), c = of[1].find(in[1][b.death]);
      if (a == of[0].end() || c == of[1].end()) continue;
      std::array<int64_t, 12> row{0, dim};
      put(row, g, dim, input, a->second, 2, 6);
      put(row, g, dim, target, c->second, 4, 8);
      row[10] = b.birth;
      row[11] = b.death;
      found[0].push_back(row);
      of[0].erase(a);
      of[1].erase(c);
    }
    for (int k = 0; k < 2; ++k) {
      for (const auto& b : of[k]) {
        found[1 + k].push_back({0, dim});
        put(found[1 + k].back(), g, dim, k == 0 ? input : target, b.second, 2, 4);
      }
    }
  }
  for (Rows& rows : found) std::sort(rows.begin(), rows.end());
  return found;
}

Rows unpacked(const std::vector<int64_t>& flat, int width) {
  Rows rows(flat.size() / width);
  for (size_t i = 0; i < flat.size(); ++i) rows[i / width][i % width] = flat[i];
  return rows;
}

template <class R>
void check(uint32_t rows, uint32_t cols, const Image& input, const Image& target, int threads) {
  const Grid g{rows, cols};
  const std::vector<R> x(input.begin(), input.end()), y(target.begin(), target.end());
  pyloss::betti::Problem p{};
  p.items = p.depth = 1;
  p.rows = rows;
  p.cols = cols;
  p.dims = 2;
  p.want = 3;
  p.input = x.data();
  p.target = y.data();
  p.input_dtype = p.target_dtype = sizeof(R) == 8 ? pyloss::DType::kF64 : pyloss::DType::kF32;
  const auto found = pyloss::cpu::betti_matching(p, threads, nullptr);
  const auto expected = matching(g, input, target);
  Rows pairs = expected[1];
  for (const auto& row : expected[0]) {
    pairs.push_back({0, row[1], row[2], row[3], row[6], row[7]});
  }
  std::sort(pairs.begin(), pairs.end());
  const bool right =
      unpacked(found.matched, 12) == expected[0] &&
      unpacked(found.unmatched_input, 6) == expected[1] &&
      unpacked(found.unmatched_target, 6) == expected[2] &&
      unpacked(pyloss::cpu::persistence_pairs(p, false, threads, nullptr), 6) == pairs;
  if (!right) {
    std::fprintf(stderr, "%u x %u, %d bytes, %d threads\n", rows, cols, int(sizeof(R)), threads);
  }
  CHECK(right);
}

// Values below `levels`, or any float.
Image noise(uint32_t rows, uint32_t cols, int levels) {
  std::uniform_real_distribution<float> draw(0, levels ? float(levels) : 1);
  Image f(rows * cols);
  for (double& x : f) x = levels ? std::floor(draw(generator)) : draw(generator);
  return f;
}

// A corridor of width 1 that winds through walls, rising, with pits beside it.
Image corridor(uint32_t rows, uint32_t cols) {
  Image f(rows * cols, 1e4);
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t col = 0; col < cols; ++col) {
      const uint32_t turn = row / 2, along = turn % 2 ? cols - 1 - col : col;
      double& x = f[row * cols + col];
      if (row % 2 == 0) x = 2.0 * (turn * (cols + 1) + along);
      if (row % 2 == 1 && along == cols - 1) x = 2.0 * (turn * (cols + 1) + cols);
      if (row % 2 == 1 && along % 5 == 2) x = generator() % 3 ? 1e4 - 1 : 2.0 * turn;
    }
  }
  return f;
}

template <class R>
void check_all() {
  const std::array<uint32_t, 2> sizes[] = {{1, 1},  {1, 130}, {130, 1}, {2, 2},    {2, 64},
                                           {9, 63}, {9, 65},  {5, 129}, {40, 128}, {70, 20}};
  for (const auto& s : sizes) {
    for (const int levels : {0, 2, 5}) {
      check<R>(s[0], s[1], noise(s[0], s[1], levels), noise(s[0], s[1], 2), 1);
      check<R>(s[0], s[1], noise(s[0], s[1], 2), noise(s[0], s[1], levels), 3);
      check<R>(s[0], s[1], noise(s[0], s[1], levels), noise(s[0], s[1], 0), 1);
    }
  }
}

// Runs longer than a byte counts, up and down, and walks whose results are kept.
void check_long_walks() {
  for (const uint32_t sign : {0, 1}) {
    Image plateau = noise(600, 70, 0), steep = noise(600, 70, 0), winding = corridor(300, 67);
    for (uint32_t i = 0; i < plateau.size(); ++i) {
      plateau[i] = plateau[i] < 0.995 ? sign : 1.0 - sign;
      steep[i] = std::floor(4 * steep[i]) / 8 + (sign ? i / 70 : 600 - i / 70);
    }
    for (double& x : winding) x *= sign ? 1 : -1;
    check<float>(600, 70, steep, plateau, 1);
    check<float>(600, 70, plateau, steep, 1);
    check<float>(300, 67, winding, noise(300, 67, 2), 1);
    std::reverse(winding.begin(), winding.end());
    check<float>(300, 67, noise(300, 67, 0), winding, 2);
  }
}

}  // namespace

int main() {
  for_all_instruction_sets([](const char* name) {
    std::printf("%s\n", name);
    check_all<float>();
    check_all<double>();
    check_long_walks();
  });
  return check_result();
}
