// Runs the CUDA Betti matching on the CPU shim, over random small images, and compares it with the
// definition.
// Every problem runs in four thread orders and over other rests of memory, whose outputs must be
// equal to the last bit.
// Arguments: number of problems, seed, and optionally the only problem to run, or --few: without
// the large ones.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "betti_definition.h"
#include "cuda/betti_matching.cuh"
#include "cuda/betti_matching.h"
#include "cuda_runtime.h"
#include "runs.h"

namespace {

using namespace pyloss;

int64_t voxels(const betti::Problem& p) {
  return p.depth * p.rows * p.cols;
}

const double kNan = std::nan("");
int64_t checked = 0, failed = 0;
int64_t cavities[3] = {};  // rows of dimension 2 that were compared, by term

void require(bool ok, const std::string& what) {
  ++checked;
  if (!ok && ++failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

// ---- Problems ----------------------------------------------------------------------------------

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
  double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }
  bool chance(double p) { return uniform() < p; }
  template <class T>
  T pick(std::initializer_list<T> l) {
    return *(l.begin() + below(int64_t(l.size())));
  }
};

struct Case {
  betti::Problem p{};
  cuda::BettiLoss l{};
  std::vector<double> image[2];  // as the kernels see them, rounded to the dtypes
  std::vector<char> bytes[2];
  bool pairs = false;  // rows without a target
  int multiprocessors = 4;
  std::string text;
};

double round_to(DType t, double v) {
  switch (t) {
    case DType::kF64:
      return v;
    case DType::kF32:
      return float(v);
    case DType::kBF16:
      return to_float(float_to_bf16(float(v)));
    case DType::kF16:
      return to_float(float_to_f16(float(v)));
    default:
      return std::floor(v * 3);
  }
}
void put(void* p, DType t, size_t i, double v) {
  switch (t) {
    case DType::kF64:
      static_cast<double*>(p)[i] = v;
      break;
    case DType::kF32:
      static_cast<float*>(p)[i] = float(v);
      break;
    case DType::kBF16:
      static_cast<BF16*>(p)[i] = float_to_bf16(float(v));
      break;
    case DType::kF16:
      static_cast<F16*>(p)[i] = float_to_f16(float(v));
      break;
    case DType::kI64:
      static_cast<int64_t*>(p)[i] = int64_t(v);
      break;
    case DType::kI32:
      static_cast<int32_t*>(p)[i] = int32_t(v);
      break;
    case DType::kU8:
      static_cast<uint8_t*>(p)[i] = uint8_t(v);
  }
}
double get(const std::vector<char>& bytes, DType t, size_t i) {
  double v = 0;
  dispatch_float(t, [&](auto tag) {
    using T = decltype(tag);
    T x;
    std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
    v = double(to_float(x));
  });
  return v;
}

enum Pattern { kNoise, kGrey, kBinary, kConstant, kRamp, kSmooth, kPatterns };

double sample(Random& rnd, int pattern, int64_t levels, double slope, int64_t i, int64_t j) {
  switch (pattern) {
    case kNoise:
      return rnd.uniform() * 2 - 1;
    case kGrey:
      return double(rnd.below(levels)) / double(levels) * rnd.pick({1.0, -1.0});  // -0 as well
    case kBinary:
      return double(rnd.below(2));
    case kConstant:
      return 0.5;
    case kRamp:
      return slope * double(i) + double(j) / 64;
    default:
      return std::sin(double(i) * slope * 3) + std::cos(double(j) * 0.9) + rnd.uniform() * 0.05;
  }
}

void fill_images(Random& rnd, Case& c) {
  const size_t n = size_t(voxels(c.p)), size = n * size_t(c.p.items);
  const DType dtypes[2] = {c.p.input_dtype, c.p.target_dtype};
  for (int k = 0; k < 2; ++k) {
    c.image[k].resize(size);
    c.bytes[k].assign(size * size_t(dtype_size(dtypes[k])), 0);
    int pattern = 0;
    int64_t levels = 2;
    double slope = 0;
    for (size_t i = 0; i < size; ++i) {
      if (i % n == 0) {
        pattern = int(rnd.below(kPatterns));
        levels = 2 + rnd.below(4);
        slope = rnd.pick({0.25, -0.25, 0.0, 0.01});
      }
      double v =
          sample(rnd, pattern, levels, slope, int64_t(i % n) / c.p.cols, int64_t(i % n) % c.p.cols);
      if (dtypes[k] == DType::kU8 && v < 0) v = -v;
      c.image[k][i] = round_to(dtypes[k], v);
      put(c.bytes[k].data(), dtypes[k], i, c.image[k][i]);
    }
  }
  c.p.input = c.bytes[0].data();
  c.p.target = c.pairs ? nullptr : c.bytes[1].data();
}

void make_case(Random& rnd, Case& c) {
  betti::Problem& p = c.p;
  p.dims = rnd.chance(0.15) ? 1 : rnd.chance(0.4) ? 3 : 2;
  p.items = 1 + rnd.below(3);
  const int64_t most = p.dims == 3 ? 4 : 7;
  p.depth = p.dims == 3 ? 1 + rnd.below(most) : 1;
  p.rows = p.dims == 1 ? 1 + rnd.below(24) : 1 + rnd.below(most);
  p.cols = p.dims == 1 ? 1 : 1 + rnd.below(most);
  const bool first = p.dims == 1 || rnd.chance(0.85);
  const bool last = p.dims > 1 && (!first || rnd.chance(0.85));
  p.want = (first ? 1 : 0) | (last ? 1 << (p.dims - 1) : 0);
  p.superlevel = rnd.chance(0.5);
  p.input_dtype = rnd.pick({DType::kF32, DType::kF32, DType::kF64, DType::kBF16, DType::kF16});
  p.target_dtype = rnd.pick(
      {DType::kF32, DType::kF64, DType::kU8, DType::kI64, DType::kI32, DType::kF16, p.input_dtype});
  betti::Options& o = c.l.options;
  o.extreme = rnd.chance(0.3);
  o.essential = rnd.chance(0.3);
  o.min_persistence = rnd.pick({0.0, 0.0, 0.25});
  o.matched_weight = rnd.pick({1.0, 0.5});
  o.unmatched_weight = rnd.pick({1.0, 2.0});
  o.dim_weight[0] = rnd.pick({1.0, 0.25});
  o.dim_weight[1] = rnd.pick({1.0, 3.0});
  o.dim_weight[2] = rnd.pick({1.0, 0.5});
  c.l.target_weight = rnd.pick({1.0, 0.75});
  c.pairs = rnd.chance(0.15);
  c.multiprocessors = rnd.pick({1, 4, 64});
  p.scratch_limit = rnd.pick({0, 0, 1, 200000});  // groups of all, all, one and some items
  fill_images(rnd, c);
}

// ---- Runs --------------------------------------------------------------------------------------

struct Outputs {
  std::vector<definition::Row> rows[3];       // sorted
  std::vector<std::vector<int64_t>> columns;  // left to the host, by matrix and item
  std::vector<char> loss, grad[2];
  bool operator==(const Outputs& o) const {
    return columns == o.columns && rows[0] == o.rows[0] && rows[1] == o.rows[1] &&
           rows[2] == o.rows[2] && loss == o.loss && grad[0] == o.grad[0] && grad[1] == o.grad[1];
  }
};

// The columns of dimension 1 of a group's volumes, of `items` in all.
void collect_columns(const betti::Problem& p, int64_t first, int64_t items, char* scratch,
                     int64_t bytes, Outputs& r) {
  uint32_t counts[2] = {7, 7};
  cuda::betti_columns(p, counts, scratch, bytes, nullptr);
  std::vector<int64_t> names(counts[0]), keys(counts[0]);
  shim::poison(names);
  shim::poison(keys);
  cuda::betti_column_keys(p, counts[0], names.data(), keys.data(), scratch, bytes, nullptr);
  std::vector<std::pair<int64_t, int64_t>> sorted;
  for (size_t i = 0; i < names.size(); ++i) sorted.push_back({keys[i], names[i]});
  std::sort(sorted.begin(), sorted.end());
  const int64_t squares = 3 * voxels(p);
  r.columns.resize(size_t((p.target ? 5 : 1) * items));
  for (const auto& [key, name] : sorted) {
    const int64_t graph = name / squares, matrix = graph / p.items, item = graph % p.items;
    r.columns[size_t(matrix * items + first + item)].push_back(name % squares);
  }
}

// The rows of all items, group by group as the op asks for them. `nan`: none are made.
void collect_rows(const Case& c, char* scratch, int64_t bytes, bool nan, Outputs& r) {
  betti::Problem p = c.p;
  const int64_t group = cuda::betti_group(p), n = voxels(p);
  for (int64_t first = 0; first < c.p.items; first += group) {
    p.items = std::min(group, c.p.items - first);
    p.input = static_cast<const char*>(c.p.input) + first * n * dtype_size(p.input_dtype);
    if (c.p.target) {
      p.target = static_cast<const char*>(c.p.target) + first * n * dtype_size(p.target_dtype);
    }
    uint32_t counts[4] = {7, 7, 7, 7};
    cuda::betti_pairs(p, c.pairs && c.l.options.essential, counts, scratch, bytes, nullptr);
    if (counts[3] != 0) {
      const int64_t at = 2 * p.items - counts[3];
      require(nan, "a NaN that is none, " + c.text);
      r.rows[0].push_back({first + at / 2, at % 2});
      continue;
    }
    std::vector<int64_t> rows[3];
    int64_t* out[3];
    for (int k = 0; k < 3; ++k) {
      rows[k].resize(counts[k] * (k == 0 ? 12 : 6));
      shim::poison(rows[k]);
      out[k] = rows[k].data();
    }
    if (p.dims == 3 && p.want == 5) collect_columns(p, first, c.p.items, scratch, bytes, r);
    cuda::betti_rows(p, counts, out, scratch, bytes, nullptr);
    for (int k = 0; k < 3; ++k) {
      const size_t width = k == 0 ? 12 : 6;
      for (size_t i = 0; i < rows[k].size(); i += width) {
        rows[k][i] += first;
        r.rows[k].emplace_back(rows[k].begin() + long(i), rows[k].begin() + long(i + width));
      }
    }
  }
  for (auto& rows : r.rows) std::sort(rows.begin(), rows.end());
}

DType real_of(const Case& c) {
  return cuda::betti_in_double(c.p) ? DType::kF64 : DType::kF32;
}

Outputs run(Case& c, int number, bool nan) {
  shim::start_run(number);
  const char poison = char(shim::settings.poison);
  shim::settings.multiprocessors = c.multiprocessors;
  const size_t n = size_t(voxels(c.p)), items = size_t(c.p.items), dims = size_t(c.p.dims);
  const int64_t bytes = cuda::betti_scratch_bytes(c.p);
  std::vector<char> scratch(size_t(bytes) + 256, poison);
  char* at = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
  Outputs r;
  collect_rows(c, at, bytes, nan, r);
  if (c.pairs) return r;
  r.loss.assign(items * dims * 3 * size_t(dtype_size(real_of(c))), poison);
  r.grad[0].assign(items * n * size_t(dtype_size(c.p.input_dtype)), poison);
  c.l.loss = r.loss.data();
  c.l.grad_input = r.grad[0].data();
  c.l.grad_target = nullptr;
  if (c.p.target_dtype <= DType::kF16) {
    r.grad[1].assign(items * n * size_t(dtype_size(c.p.target_dtype)), poison);
    c.l.grad_target = r.grad[1].data();
  }
  scratch.assign(scratch.size(), poison);
  cuda::betti_loss(c.p, c.l, at, bytes, nullptr);
  return r;
}

void expect(const Case& c, const char* what, int64_t item, double got, double want,
            double tolerance) {
  ++checked;
  if (std::isnan(want)
          ? std::isnan(got)
          : got == want || std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) {
    return;
  }
  if (++failed <= 20) {
    std::printf("FAILED %s of item %lld: %.9g, should be %.9g\n  %s\n", what, (long long)item, got,
                want, c.text.c_str());
  }
}

void check_item(Case& c, const Outputs& r, size_t item, bool nan, bool sick) {
  const size_t n = size_t(voxels(c.p)), images = c.pairs ? 1 : 2, dims = size_t(c.p.dims);
  std::vector<double> value[2], f[2];
  for (size_t k = 0; k < images; ++k) {
    value[k].assign(c.image[k].begin() + long(item * n), c.image[k].begin() + long(item * n + n));
    for (double v : value[k]) f[k].push_back(c.p.superlevel ? -v : v);
  }
  const betti::Options& o = c.l.options;
  std::vector<double> grad[2] = {std::vector<double>(n), std::vector<double>(n)};
  std::vector<double> loss(dims * 3);
  if (!sick) {
    const definition::Complex x(int(c.p.depth), int(c.p.rows), int(c.p.cols), c.p.dims);
    definition::Result ref = definition::match(x, c.p.want, f[0], c.pairs ? nullptr : &f[1]);
    if (c.pairs && o.essential && c.p.wanted(0)) {
      ref.rows[1].push_back({0, ref.oldest[0], -1, ref.oldest[0], -1});
      std::sort(ref.rows[1].begin(), ref.rows[1].end());
    }
    for (size_t k = 0; k < 3 && !nan; ++k) {
      std::vector<definition::Row> found;
      for (const definition::Row& row : ref.rows[k]) cavities[k] += row[0] == 2;
      for (const definition::Row& row : r.rows[k]) {
        if (row[0] == int64_t(item)) found.emplace_back(row.begin() + 1, row.end());
      }
      require(found == ref.rows[k],
              "rows " + std::to_string(k) + " of item " + std::to_string(item) + ", " + c.text);
    }
    if (!r.columns.empty()) {
      int64_t wrong = 0;
      const auto left = definition::columns_left(x, f[0], c.pairs ? nullptr : &f[1], &wrong);
      for (size_t m = 0; m < left.size(); ++m) {
        require(r.columns[m * size_t(c.p.items) + item] == left[m] && wrong == 0,
                "columns of matrix " + std::to_string(m) + ", " + c.text);
      }
    }
    if (c.pairs) return;
    // Values and derivatives by the formulas of the loss.
    const auto at = [&](int64_t k, int64_t voxel) { return value[k][size_t(voxel)]; };
    const auto slope = [&](size_t k, int64_t voxel, double weight, double by) {
      if (weight != 0) grad[k][size_t(voxel)] += weight * by;  // not 0 times an infinite one
    };
    const auto match = [&](int64_t d, int64_t va, int64_t vb) {
      const double a = at(0, va), b = at(1, vb), x = a == b ? 0 : a - b;
      loss[size_t(d) * 3] += 2 * x * x;
      slope(0, va, o.dim_weight[d] * o.matched_weight, 4 * x);
      slope(1, vb, o.dim_weight[d] * o.matched_weight, -4 * x);
    };
    for (const definition::Row& row : ref.rows[0]) {
      match(row[0], row[1], row[3]);
      match(row[0], row[2], row[4]);
    }
    if (o.essential && c.p.wanted(0)) match(0, ref.oldest[0], ref.oldest[1]);
    for (int k = 0; k < 2; ++k) {
      for (const definition::Row& row : ref.rows[1 + k]) {
        const double b = at(k, row[1]), e = at(k, row[2]);
        if (k == 0 && std::fabs(b - e) <= o.min_persistence) continue;
        double term = (b - e) * (b - e), db = 2 * (b - e), de = -db;
        if (o.extreme) {
          const double sign = c.p.superlevel ? -1 : 1, shift = c.p.superlevel ? 1 : 0;
          const double fb = shift + sign * b - 1, fe = shift + sign * e;
          term = 2 * (fb * fb + fe * fe);
          db = 4 * fb * sign;
          de = 4 * fe * sign;
        }
        const double scale =
            o.dim_weight[row[0]] * (k == 0 ? o.unmatched_weight : c.l.target_weight);
        loss[size_t(row[0]) * 3 + (k == 0 ? 1 : 2)] += term;
        slope(size_t(k), row[1], scale, db);
        slope(size_t(k), row[2], scale, de);
      }
    }
  } else {
    loss.assign(loss.size(), kNan);
    for (auto& g : grad) g.assign(n, kNan);
  }
  for (size_t i = 0; i < loss.size(); ++i) {
    expect(c, "loss", int64_t(item), get(r.loss, real_of(c), item * dims * 3 + i), loss[i], 1e-6);
  }
  for (int k = 0; k < 2; ++k) {
    const DType t = k == 0 ? c.p.input_dtype : c.p.target_dtype;
    if (r.grad[k].empty()) continue;
    const double tolerance = t == DType::kBF16 ? 0x1p-8 : t == DType::kF16 ? 0x1p-11 : 2e-6;
    for (size_t v = 0; v < n; ++v) {
      expect(c, "gradient", int64_t(item), get(r.grad[k], t, item * n + v), grad[k][v], tolerance);
    }
  }
}

// `sick`: the item with a NaN, or -1; in `image`.
void check(Case& c, int orders, int64_t sick = -1, int64_t image = 0) {
  const bool nan = sick >= 0;
  Outputs first;
  for (int k = 0; k < orders; ++k) {
    try {
      Outputs o = run(c, k, nan);
      if (k == 0) {
        first = o;
        for (int64_t i = 0; i < c.p.items; ++i) check_item(c, o, size_t(i), nan, i == sick);
        const std::vector<definition::Row> told{{sick, image}};
        if (nan) require(o.rows[0] == told, "where the NaN is, " + c.text);
      } else {
        require(o == first, "the order of threads, or old memory, changes the result, " + c.text);
      }
    } catch (const std::exception& e) {
      require(false, std::string(e.what()) + ", " + c.text);
    }
  }
}

std::string describe(const Case& c, const std::string& name) {
  const betti::Problem& p = c.p;
  char text[256];
  std::snprintf(
      text, sizeof text,
      "%s: items %lld planes %lld rows %lld cols %lld dims %d want %d superlevel %d dtypes %d %d "
      "extreme %d essential %d pairs %d",
      name.c_str(), (long long)p.items, (long long)p.depth, (long long)p.rows, (long long)p.cols,
      p.dims, int(p.want), p.superlevel, int(p.input_dtype), int(p.target_dtype),
      c.l.options.extreme, c.l.options.essential, c.pairs);
  return text;
}

Case plain_case(int64_t items, int64_t rows, int64_t cols) {
  Case c;
  c.p.items = items;
  c.p.depth = 1;
  c.p.rows = rows;
  c.p.cols = cols;
  c.p.dims = 2;
  c.p.want = 3;
  c.p.input_dtype = c.p.target_dtype = DType::kF32;
  c.l.options.matched_weight = c.l.options.unmatched_weight = c.l.target_weight = 1;
  for (double& w : c.l.options.dim_weight) w = 1;
  return c;
}

// Chains of more than one warp, and in the first case tiles of the sort of more than one warp.
void check_large(Random& rnd) {
  const struct {
    const char* name;
    int64_t rows, cols;
    int input, target;
  } cases[] = {{"ramp and noise", 37, 41, kRamp, kNoise},
               {"constant and ramp", 25, 23, kConstant, kRamp},
               {"smooth and binary", 23, 25, kSmooth, kBinary}};
  for (const auto& k : cases) {
    Case c = plain_case(1, k.rows, k.cols);
    c.p.superlevel = k.input == kConstant;
    if (k.input == kSmooth) c.p.input_dtype = DType::kF64;
    c.text = describe(c, k.name);
    fill_images(rnd, c);
    for (size_t i = 0; i < c.image[0].size(); ++i) {
      for (int m = 0; m < 2; ++m) {
        const DType t = m == 0 ? c.p.input_dtype : c.p.target_dtype;
        const double v = sample(rnd, m == 0 ? k.input : k.target, 3, 0.25, int64_t(i) / k.cols,
                                int64_t(i) % k.cols);
        c.image[m][i] = round_to(t, v);
        put(c.bytes[m].data(), t, i, c.image[m][i]);
      }
    }
    check(c, k.rows < 30 ? 2 : 1);
  }
}

// Few grey levels: chains whose edges tie, where the order of the ids decides who dies first.
void check_ties(Random& rnd, bool few) {
  for (int k = 0; k < (few ? 1 : 4); ++k) {
    Case c = plain_case(8, 9, 8);
    c.p.superlevel = k % 2 == 1;
    c.text = describe(c, "ties");
    fill_images(rnd, c);
    for (int m = 0; m < 2; ++m) {
      for (size_t i = 0; i < c.image[m].size(); ++i) {
        c.image[m][i] = double(rnd.below(3 + 2 * k));
        put(c.bytes[m].data(), DType::kF32, i, c.image[m][i]);
      }
    }
    check(c, 1);
  }
}

// Random volumes so small hardly ever have one.
void check_cavities(Random& rnd, bool few) {
  for (int k = 0; k < (few ? 2 : 6); ++k) {
    Case c = plain_case(2, 5, 5);
    c.p.dims = 3;
    c.p.depth = 4;
    c.p.want = 5;
    c.p.superlevel = k % 2 == 1;
    if (k == 2) c.p.input_dtype = DType::kF64;
    c.text = describe(c, "cavities");
    fill_images(rnd, c);
    for (int m = 0; m < 2; ++m) {
      const DType t = m == 0 ? c.p.input_dtype : c.p.target_dtype;
      for (size_t i = 0; i < c.image[m].size(); ++i) {
        const int64_t v = int64_t(i) % 100, plane = v / 25, row = v / 5 % 5, col = v % 5;
        const bool inside = plane % 3 > 0 && row % 4 > 0 && col % 4 > 0;
        const double wall = k < 4 ? double(rnd.below(3)) / 4 : rnd.uniform();
        const double f = wall + (inside && rnd.chance(0.3) ? 1 : 0);
        c.image[m][i] = round_to(t, c.p.superlevel ? -f : f);
        put(c.bytes[m].data(), t, i, c.image[m][i]);
      }
    }
    check(c, few ? 1 : 2);
  }
  require(cavities[0] > 0 && cavities[1] > 0 && cavities[2] > 0, "there were cavities");
}

// Infinities have their place in the order, equal ones differ by 0, and what has no weight has no
// gradient.
void check_infinities(Random& rnd, bool few) {
  for (int k = 0; k < (few ? 2 : 8); ++k) {
    Case c = plain_case(4, 3 + k % 2, 4);
    if (k % 2 == 1) {
      c.p.dims = 3;
      c.p.depth = 3;
      c.p.want = 5;
    }
    c.p.superlevel = k / 2 % 2 == 1;
    c.p.input_dtype = k / 4 == 0 ? DType::kF32 : DType::kF64;
    c.p.target_dtype = rnd.pick({DType::kF32, DType::kF16, DType::kBF16});
    c.l.options.essential = true;
    c.l.options.matched_weight = rnd.pick({1.0, 0.0});
    c.l.options.unmatched_weight = rnd.pick({1.0, 0.0});
    c.text = describe(c, "infinities");
    fill_images(rnd, c);
    const int64_t n = voxels(c.p);
    for (int m = 0; m < 2; ++m) {
      const DType t = m == 0 ? c.p.input_dtype : c.p.target_dtype;
      for (size_t i = 0; i < c.image[m].size(); ++i) {
        const double finite = round_to(t, double(rnd.below(4)) / 4);
        // Items of both signs, of one, and of nothing else.
        const int64_t item = int64_t(i) / n, kind = rnd.below(item == 3 ? 2 : 5);
        const bool negative = item == 0 || item == 3 ? kind == 1 : item == 2;
        const double infinite = negative ? -HUGE_VAL : HUGE_VAL;
        c.image[m][i] = kind < 2 ? infinite : finite;
        put(c.bytes[m].data(), t, i, c.image[m][i]);
      }
    }
    check(c, few ? 1 : 2);
  }
}

// A ramp is one chain, here for a whole block.
void check_chain(Random& rnd) {
  Case c = plain_case(1, 700, 1);
  c.p.dims = 1;
  c.p.want = 1;
  c.text = describe(c, "chain");
  fill_images(rnd, c);
  for (size_t i = 0; i < c.image[0].size(); ++i) {
    for (int m = 0; m < 2; ++m) {
      c.image[m][i] = double((m == 0 ? i : 3 * i + 1) % 700);
      put(c.bytes[m].data(), DType::kF32, i, c.image[m][i]);
    }
  }
  check(c, 2);
}

// One pass of the sort alone: holes, and more tiles than a block has threads.
void check_sort(Random& rnd) {
  for (const cuda::u32 count : {3000u, 600000u}) {
    std::vector<cuda::u64> keys, keys_out(count);
    std::vector<cuda::u32> values, values_out(count), digits(cuda::betti_sort_words(count));
    std::vector<std::pair<cuda::u64, cuda::u32>> want;
    for (cuda::u32 i = 0; i < count; ++i) {
      keys.push_back(rnd.chance(0.1) ? cuda::kNoKey : cuda::u64(rnd.below(256)));
      values.push_back(i);
      if (keys[i] != cuda::kNoKey) want.push_back({keys[i], i});
    }
    std::stable_sort(want.begin(), want.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    cuda::BettiWork w{};
    w.digits = digits.data();
    const bool in_b =
        cuda::betti_sort(w, {keys.data(), values.data()}, {keys_out.data(), values_out.data()},
                         count, cuda::u32(want.size()), 8, nullptr);
    bool right = in_b;
    for (size_t i = 0; i < want.size(); ++i) {
      right = right && keys_out[i] == want[i].first && values_out[i] == want[i].second;
    }
    require(right, "a pass of the sort over " + std::to_string(count));
  }
}

void check_nan(Random& rnd) {
  for (int k = 0; k < 4; ++k) {
    Case c = plain_case(3, 4, 5);
    c.p.input_dtype = k % 2 == 0 ? DType::kF32 : DType::kF64;
    c.p.superlevel = k >= 2;
    c.text = describe(c, "NaN");
    fill_images(rnd, c);
    const int64_t sick = rnd.below(3);
    const int image = int(rnd.below(2));
    const double nan = rnd.chance(0.5) ? kNan : -kNan;
    for (int i = 0; i < 1 + 3 * (k % 2); ++i) {  // several in one item: threads that agree
      put(c.bytes[image].data(), image == 0 ? c.p.input_dtype : c.p.target_dtype,
          size_t(sick * 20 + (i == 0 ? rnd.below(20) : 5 * i)), nan);
    }
    check(c, 2, sick, image);
  }
}

void check_refusals() {
  const auto refused = [](const betti::Problem& p) {
    try {
      cuda::betti_scratch_bytes(p);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  Case c = plain_case(1, 4, 4);
  char image[64] = {};
  c.p.input = c.p.target = image;
  require(!refused(c.p), "an ordinary image is accepted");
  betti::Problem p = c.p;
  p.cols = 0;
  require(refused(p), "no columns");
  p = c.p;
  p.dims = 1;
  require(refused(p), "1D with columns");
  p = c.p;
  p.dims = 3;
  p.depth = 4;
  require(refused(p), "dimension 1 of volumes");
  p.want = 5;
  require(!refused(p), "a volume");
  p.dims = 2;
  require(refused(p), "2D with planes");
  p = c.p;
  p.want = 0;
  require(refused(p), "no dimension");
  p = c.p;
  p.rows = p.cols = int64_t{1} << 15;
  require(refused(p), "too large an image");
  bool caught = false;
  try {
    cuda::betti_loss(c.p, c.l, image, 64, nullptr);
  } catch (const std::invalid_argument&) {
    caught = true;
  }
  require(caught, "too little scratch memory");
  c.p.items = 0;
  cuda::betti_loss(c.p, c.l, nullptr, 0, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 100;
  const uint64_t seed = argc > 2 ? uint64_t(std::atoll(argv[2])) : 0;
  const bool few = argc > 3 && std::strcmp(argv[3], "--few") == 0;
  const int64_t only = argc > 3 && !few ? std::atoll(argv[3]) : -1;
  for (int64_t i = 0; i < cases; ++i) {
    if (only >= 0 && i != only) continue;
    Random rnd{std::mt19937_64(seed * 1000003 + uint64_t(i))};
    Case c;
    make_case(rnd, c);
    c.text = describe(c, "problem " + std::to_string(i));
    check(c, 4);
  }
  if (only < 0) {
    Random rnd{std::mt19937_64(seed)};
    check_nan(rnd);
    check_ties(rnd, few);
    check_cavities(rnd, few);
    check_infinities(rnd, few);
    if (!few) check_large(rnd);
    check_chain(rnd);
    check_sort(rnd);
    check_refusals();
  }
  std::printf("%lld problems, %lld checks, %lld failed\n", (long long)cases, (long long)checked,
              (long long)failed);
  return failed != 0 || checked == 0;
}
