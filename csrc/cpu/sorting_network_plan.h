// A call's network with its layers laid out, and which comparators a tile of rows needs. Nothing
// here looks at the number of threads, so that results do not depend on it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "common/compiler.h"
#include "cpu/lanes.h"
#include "cpu/sorting_network.h"

namespace pyloss::cpu {

// Elementary functions without branches and calls; in double those of libm.
template <class R>
struct LaneMath;
template <>
struct LaneMath<float> {
  using T = float;
  using R = float;
  static PYLOSS_INLINE float exp(float x) { return exp_lane(x); }
  static PYLOSS_INLINE float sqrt(float x) { return square_root(x); }
  static PYLOSS_INLINE float power(float x, float y) { return exp_lane(y * log_lane(x)); }
  static PYLOSS_INLINE float atan_pi(float z) { return sorting::atan_over_pi(z); }
  static PYLOSS_INLINE void normal(float u, float* density, float* tail) {
    sorting::float_normal<LaneMath<float>>(u, density, tail);
  }
};
template <>
struct LaneMath<double> : sorting::ScalarMath<double> {};

struct Net {
  explicit Net(const sorting::Problem& p)
      : network(p.network), n(p.n), table(p.table), distribution(p.distribution) {
    const bool by_table = network == sorting::Network::kSplitter;
    layers = by_table ? p.layers : sorting::layer_count(network, n);
    layer.resize(layers);
    first.resize(layers + 1);
    for (int l = 0; l < layers; ++l) {
      if (by_table) {
        layer[l].count = p.offsets[l + 1] - p.offsets[l];
      } else {
        layer[l] = sorting::layer_of(network, n, l);
      }
      first[l + 1] = first[l] + layer[l].count;
    }
    absent = network == sorting::Network::kBitonic ? (1 << sorting::ceil_log2(n)) - n : 0;
  }
  int64_t comparators() const { return first[layers]; }
  sorting::Comparator at(int l, int32_t c) const {
    if (table) {
      const int32_t* pair = table + 2 * (first[l] + c);
      return {pair[0], pair[1]};
    }
    return sorting::comparator(layer[l], c);
  }

  sorting::Network network;
  int32_t n, absent;  // bitonic: wire 0 is number `absent` of a power of two
  int layers;
  const int32_t* table;
  sorting::Distribution distribution;
  std::vector<sorting::Layer> layer;
  std::vector<int64_t> first;  // the number of a layer's first comparator
};

// Part of a layer: comparators begin .. end - 1 for `vectors` vectors of a tile.
struct Span {
  int32_t begin, end;
  int vector, vectors;
};
struct Spans {
  Span span[4];
  int count = 0;
  void add(const sorting::Layer& layer, int64_t begin, int64_t end, int vector, int vectors) {
    begin = std::max<int64_t>(begin, 0);
    end = std::min<int64_t>(end, layer.count);
    if (begin < end) span[count++] = {int32_t(begin), int32_t(end), vector, vectors};
  }
};

// Which rows of P a tile holds: `vectors` (1, 2 or 4) vectors of `lanes` rows each. Row i of P
// starts as the unit vector of wire i, and most of it is zero for a while:
//     bitonic     outside of the aligned block that the layers so far have worked on
//     odd-even    outside of the cone that widens by one wire per layer
// The same comparators suffice on the way back, where the gradients of the other wires are not
// wanted.
struct RowTile {
  int64_t row;  // of the first lane; negative or beyond n: lanes without a row
  int vectors, lanes;
  bool dense;  // features: no zeros to rely on

  Spans spans(const Net& net, int l) const {
    Spans s;
    const sorting::Layer& layer = net.layer[l];
    const int64_t height = int64_t(vectors) * lanes;
    if (!dense && net.network == sorting::Network::kOddEven) {
      const int64_t low = row - l, high = row + height - 1 + l;
      s.add(layer, (low - 1 - layer.shift + 1) / 2, (high - layer.shift) / 2 + 1, 0, vectors);
    } else if (!dense && net.network == sorting::Network::kBitonic) {
      const int64_t start = row + net.absent;
      const int64_t width = std::max<int64_t>(int64_t(2) << layer.block, lanes);
      const int64_t step = std::min(width, height);
      for (int64_t at = 0; at < height; at += step) {
        const int64_t block = (start + at) / width * width;
        s.add(layer, block / 2 - layer.skip, (block + width) / 2 - layer.skip, int(at / lanes),
              int(step / lanes));
      }
    } else {
      s.add(layer, 0, layer.count, 0, vectors);
    }
    return s;
  }
  // Vectors of differences that a layer leaves behind.
  int64_t kept(const Net& net, int l) const {
    const Spans s = spans(net, l);
    int64_t count = 0;
    for (int i = 0; i < s.count; ++i) {
      count += int64_t(s.span[i].end - s.span[i].begin) * s.span[i].vectors;
    }
    return count;
  }
};

// Layers in the order of P^T f, or reversed for P f: step s is layer s or L - 1 - s.
struct Order {
  const Net& net;
  bool reversed;
  int layer(int step) const { return reversed ? net.layers - 1 - step : step; }
};

// The tiles of one row of the batch, and the steps at which each is cut, so that the differences of
// a segment fit into the cache: those of the other segments are computed again, from copies.
struct TilePlan {
  int vectors = 1, lanes = 1;
  std::vector<RowTile> tiles;
  std::vector<std::vector<int>> cuts;
  int64_t kept = 0;  // vectors of differences in the largest segment
  int64_t copies = 0;

  // `width` rows of P (or dense: features), at most `most` vectors to a tile.
  TilePlan(const Order& order, int64_t width, int lanes_of_tile, int most, bool dense,
           bool differences, int64_t room)
      : lanes(lanes_of_tile) {
    const Net& net = order.net;
    const int64_t begin = dense ? 0 : net.absent;  // of the rows, by their number in bitonic blocks
    for (vectors = most; vectors > 1; vectors /= 2) {
      const int64_t size = int64_t(vectors) * lanes;
      if (size >= 2 * width) continue;
      const RowTile middle{(begin + width / 2) / size * size - begin, vectors, lanes, dense};
      if (!differences || kept_in(order, middle, 0, net.layers) <= room) break;
    }
    const int64_t height = int64_t(vectors) * lanes;
    for (int64_t row = begin / height * height; row < begin + width; row += height) {
      const RowTile tile{row - begin, vectors, lanes, dense};
      tiles.push_back(tile);
      cuts.push_back(differences ? cuts_of(order, tile, room) : std::vector<int>{0, net.layers});
      const std::vector<int>& c = cuts.back();
      copies = std::max<int64_t>(copies, int64_t(c.size()) - 2);
      for (size_t i = 0; differences && i + 1 < c.size(); ++i) {
        kept = std::max(kept, kept_in(order, tile, c[i], c[i + 1]));
      }
    }
  }

 private:
  static int64_t kept_in(const Order& order, const RowTile& tile, int begin, int end) {
    int64_t sum = 0;
    for (int step = begin; step < end; ++step) sum += tile.kept(order.net, order.layer(step));
    return sum;
  }
  // The whole if it fits, else segments of a third of that. Where hardly a layer fits, nothing
  // stays in the cache, and the sum of the copies (a tile each) and of one segment (half a tile for
  // each of its layers) is made least.
  static std::vector<int> cuts_of(const Order& order, const RowTile& tile, int64_t room) {
    const int layers = order.net.layers;
    const int64_t whole = kept_in(order, tile, 0, layers);
    if (whole <= room) return {0, layers};
    int64_t most = room / 3;
    if (most < 4 * (whole / layers)) most = int64_t(double(whole) / std::sqrt(0.5 * layers));
    std::vector<int> cuts{0};
    int64_t used = 0;
    for (int step = 0; step < layers; ++step) {
      const int64_t kept = tile.kept(order.net, order.layer(step));
      if (used > 0 && used + kept > most) {
        cuts.push_back(step);
        used = 0;
      }
      used += kept;
    }
    cuts.push_back(layers);
    return cuts;
  }
};

// Scratch array, aligned to cache lines.
template <class R>
class Array {
 public:
  explicit Array(int64_t count)
      : data_(static_cast<R*>(allocate_aligned(
            64, (size_t(std::max<int64_t>(count, 1)) * sizeof(R) + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Array() { free_aligned(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  R* get() const { return data_; }
  R& operator[](int64_t i) const { return data_[i]; }

 private:
  R* data_;
};

}  // namespace pyloss::cpu
