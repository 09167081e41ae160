// Betti matching by its definition: boundary matrices reduced column by column. Nothing here knows
// how the kernels work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

namespace definition {

struct Cell {
  int corner, axes;         // bit a: spans axis a of (planes, rows, cols)
  int64_t id;               // as in the rows of the ops
  std::vector<int> voxels;  // ascending
  std::vector<int> faces;   // cells of one dimension less
};

// Of an image of 1 to 3 dimensions; sizes are 1 along axes that it does not have.
struct Complex {
  std::vector<Cell> cells[4];  // by dimension, in the order of equal values

  Complex(int planes, int rows, int cols, int dims) {
    const int size[3] = {planes, rows, cols}, stride[3] = {rows * cols, cols, 1};
    const int types = dims == 3 ? 3 : 2;
    std::map<std::pair<int, int>, int> index;  // (corner, axes)
    for (int corner = 0; corner < planes * rows * cols; ++corner) {
      for (const int axes : {0, 1, 2, 4, 6, 5, 3, 7}) {  // in the order of the types
        Cell cell{corner, axes, corner, {corner}, {}};
        int type = 0;
        bool inside = true;
        for (int a = 2; a >= 0; --a) {
          if (axes >> a & 1) {
            inside = inside && corner / stride[a] % size[a] + 1 < size[a];
            for (size_t i = cell.voxels.size(); i-- > 0;) {
              cell.voxels.push_back(cell.voxels[i] + stride[a]);
            }
          }
        }
        if (!inside) continue;
        const int k = (axes & 1) + (axes >> 1 & 1) + (axes >> 2);
        for (int a = 0; a < 3; ++a) {
          // Of an edge its own axis, of a square the one it is normal to.
          if ((axes >> a & 1) == (k == 1)) type = a - (3 - types);
        }
        if (k > 0 && k < types) cell.id = int64_t(types) * corner + type;
        std::sort(cell.voxels.begin(), cell.voxels.end());
        index[{corner, axes}] = int(cells[k].size());
        cells[k].push_back(cell);
      }
    }
    for (auto& of_dim : cells) {
      for (Cell& c : of_dim) {
        for (int a = 0; a < 3; ++a) {
          if (!(c.axes >> a & 1)) continue;
          for (const int step : {0, stride[a]}) {
            c.faces.push_back(index.at({c.corner + step, c.axes ^ 1 << a}));
          }
        }
      }
    }
  }
};

// A filtration: the values of all cells, and every dimension's cells in order.
struct Filtration {
  std::vector<double> value[4];
  std::vector<int> order[4], place[4];
  std::vector<int> voxel[4];  // that carries the value

  Filtration(const Complex& x, const std::vector<double>& f) {
    for (int k = 0; k < 4; ++k) {
      const size_t n = x.cells[k].size();
      for (const Cell& c : x.cells[k]) {
        double top = f[size_t(c.voxels[0])];
        for (int v : c.voxels) top = std::max(top, f[size_t(v)]);
        int at = -1;
        for (int v : c.voxels) {  // the last one, of a cube the first
          if (f[size_t(v)] == top && (k < 3 || at < 0)) at = v;
        }
        value[k].push_back(top);
        voxel[k].push_back(at);
      }
      order[k].resize(n);
      place[k].resize(n);
      std::iota(order[k].begin(), order[k].end(), 0);
      std::stable_sort(order[k].begin(), order[k].end(),
                       [&](int a, int b) { return value[k][size_t(a)] < value[k][size_t(b)]; });
      for (size_t i = 0; i < n; ++i) place[k][size_t(order[k][i])] = int(i);
    }
  }
};

// Persistence pairs in dimension d, rows ordered by one filtration and columns by another:
// partner of every (d+1)-cell, -1 where its column vanishes.
inline std::vector<int> reduce(const Complex& x, int d, const Filtration& rows,
                               const Filtration& columns) {
  std::vector<int> partner(x.cells[d + 1].size(), -1);
  std::map<int, std::vector<int>> by_pivot;
  for (int c : columns.order[d + 1]) {
    std::vector<int> column;
    for (int face : x.cells[d + 1][size_t(c)].faces) {
      column.push_back(rows.place[d][size_t(face)]);
    }
    std::sort(column.begin(), column.end());
    while (!column.empty()) {
      const auto other = by_pivot.find(column.back());
      if (other == by_pivot.end()) break;
      std::vector<int> sum;
      std::set_symmetric_difference(column.begin(), column.end(), other->second.begin(),
                                    other->second.end(), std::back_inserter(sum));
      column.swap(sum);
    }
    if (column.empty()) continue;
    partner[size_t(c)] = rows.order[d][size_t(column.back())];
    by_pivot[column.back()] = column;
  }
  return partner;
}

struct Bar {
  int birth = -1, death = -1;  // cells
  bool matched = false;
};
using Row = std::vector<int64_t>;

// Of one item, sorted: the rows of the loss terms, and what the loss needs of them.
struct Result {
  std::vector<Row> rows[3];  // matched, of the input, of the target: dimension, voxels, cells
  int oldest[2] = {-1, -1};
};

inline Row row_of(const Complex& x, int d,
                  std::initializer_list<std::pair<const Filtration*, Bar>> bars,
                  std::initializer_list<Bar> more) {
  Row row{d};
  for (const auto& [f, b] : bars) {
    row.push_back(f->voxel[d][size_t(b.birth)]);
    row.push_back(f->voxel[d + 1][size_t(b.death)]);
  }
  const auto put = [&](const Bar& b) {
    row.push_back(x.cells[d][size_t(b.birth)].id);
    row.push_back(x.cells[d + 1][size_t(b.death)].id);
  };
  for (const auto& [f, b] : bars) put(b);
  for (const Bar& b : more) put(b);
  return row;
}

inline std::map<int, Bar> bars_of(const Complex& x, int d, const Filtration& f) {  // by birth
  std::map<int, Bar> bars;
  const auto partner = reduce(x, d, f, f);
  for (size_t c = 0; c < partner.size(); ++c) {
    const int b = partner[c];
    if (b >= 0 && f.value[d][size_t(b)] != f.value[d + 1][c]) bars[b] = {b, int(c), false};
  }
  return bars;
}

// Dimensions of a mask, of an image or, with a target, of a pair.
inline Result match(const Complex& x, uint32_t want, const std::vector<double>& input,
                    const std::vector<double>* target) {
  std::vector<double> both = input;
  for (size_t i = 0; target && i < both.size(); ++i) both[i] = std::min(both[i], (*target)[i]);
  const Filtration f[3] = {{x, input}, {x, target ? *target : input}, {x, both}};
  Result r;
  for (int image = 0; image < 2; ++image) r.oldest[image] = f[image].order[0][0];
  for (int d = 0; d < 3; ++d) {
    if (!(want >> d & 1)) continue;
    std::map<int, Bar> bars[2] = {bars_of(x, d, f[0]), {}};
    if (target) {
      bars[1] = bars_of(x, d, f[1]);
      const auto of_input = reduce(x, d, f[0], f[2]), of_target = reduce(x, d, f[1], f[2]);
      for (const auto& [birth, bar] : bars_of(x, d, f[2])) {
        const auto i = bars[0].find(of_input[size_t(bar.death)]);
        const auto t = bars[1].find(of_target[size_t(bar.death)]);
        if (i == bars[0].end() || t == bars[1].end()) continue;
        i->second.matched = t->second.matched = true;
        r.rows[0].push_back(row_of(x, d, {{&f[0], i->second}, {&f[1], t->second}}, {bar}));
      }
    }
    for (int image = 0; image < 2; ++image) {
      for (const auto& [birth, bar] : bars[image]) {
        if (!bar.matched) r.rows[1 + image].push_back(row_of(x, d, {{&f[image], bar}}, {}));
      }
    }
  }
  for (auto& rows : r.rows) std::sort(rows.begin(), rows.end());
  return r;
}

// Squares, by their numbers in the order of the columns, that dimension 1 of a volume leaves to a
// reduction: no births of dimension 2 of the columns' filtration, and in no apparent pair. `wrong`
// counts apparent pairs that the reduction does not find.
inline std::vector<int64_t> columns_left(const Complex& x, const Filtration& rows,
                                         const Filtration& columns, int64_t* wrong) {
  const auto voids = reduce(x, 2, columns, columns), pairs = reduce(x, 1, rows, columns);
  std::vector<int> smallest(x.cells[1].size(), -1);  // coface
  for (int c : columns.order[2]) {
    for (int e : x.cells[2][size_t(c)].faces) {
      if (smallest[size_t(e)] < 0) smallest[size_t(e)] = c;
    }
  }
  std::vector<int64_t> left;
  for (int c : columns.order[2]) {
    if (std::count(voids.begin(), voids.end(), c)) continue;
    const auto& faces = x.cells[2][size_t(c)].faces;
    const int largest = *std::max_element(faces.begin(), faces.end(), [&](int a, int b) {
      return rows.place[1][size_t(a)] < rows.place[1][size_t(b)];
    });
    if (smallest[size_t(largest)] != c) {
      left.push_back(x.cells[2][size_t(c)].id);
    } else {
      *wrong += pairs[size_t(c)] != largest;
    }
  }
  return left;
}

// Of all matrices (rows, columns): (I, I), (T, T), (M, M), (I, M), (T, M), or without a target one.
inline std::vector<std::vector<int64_t>> columns_left(const Complex& x,
                                                      const std::vector<double>& input,
                                                      const std::vector<double>* target,
                                                      int64_t* wrong) {
  const std::vector<double>& other = target ? *target : input;
  std::vector<double> both = input;
  for (size_t i = 0; i < both.size(); ++i) both[i] = std::min(both[i], other[i]);
  const Filtration f[3] = {{x, input}, {x, other}, {x, both}};
  const int rows[] = {0, 1, 2, 0, 1}, columns[] = {0, 1, 2, 2, 2};
  std::vector<std::vector<int64_t>> left;
  for (int m = 0; m < (target ? 5 : 1); ++m) {
    left.push_back(columns_left(x, f[rows[m]], f[columns[m]], wrong));
  }
  return left;
}

}  // namespace definition
