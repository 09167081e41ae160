#include "cpu/betti_volume_order.h"

#include <utility>

#include "common/compiler.h"

namespace pyloss {
namespace cpu {
namespace betti_volume {
namespace {

template <class K>
struct Keyed {
  K key;
  uint32_t voxel;
};

}  // namespace

template <class R>
bool make_keys(const R* image, const Lattice& l, bool superlevel,
               typename betti::KeyOf<R>::type* keys) {
  bool nan = false;
  l.each_row([&](uint32_t begin, uint32_t at) {
    bool bad = false;
    for (uint32_t col = 0; col < l.cols; ++col) {
      bad |= image[at + col] != image[at + col];
      keys[begin + col] = betti::filtration_key(image[at + col], superlevel);
    }
    nan |= bad;
  });
  return !nan;
}

template <class K>
Order sort_voxels(const K* keys, const Lattice& l, Slab& slab) {
  constexpr int kBits = 11, kPasses = (8 * sizeof(K) + kBits - 1) / kBits;
  constexpr uint32_t kBuckets = 1u << kBits;
  const uint32_t n = l.voxels();
  Order o;
  o.voxel = Array<uint32_t>(slab, n);
  o.rank = Array<uint32_t>(slab, l.size());
  o.repeated = Bits(l.size(), slab);
  std::fill(o.rank.get(), o.rank.get() + l.size(), kNone);

  std::vector<uint32_t> counts(kPasses * kBuckets, 0);
  Array<Keyed<K>> from(slab, n), to(slab, n);
  l.each_row([&](uint32_t begin, uint32_t at) {
    for (uint32_t col = 0; col < l.cols; ++col) {
      const K key = keys[begin + col];
      for (int pass = 0; pass < kPasses; ++pass) {
        ++counts[pass * kBuckets + ((key >> (pass * kBits)) & (kBuckets - 1))];
      }
      from[at + col] = {key, begin + col};
    }
  });
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* count = counts.data() + pass * kBuckets;
    if (std::find(count, count + kBuckets, n) != count + kBuckets) continue;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kBuckets; ++i) {
      const uint32_t c = count[i];
      count[i] = sum;
      sum += c;
    }
    const int shift = pass * kBits;
    for (uint32_t i = 0; i < n; ++i) {
      const Keyed<K> x = from[i];
      to[count[(x.key >> shift) & (kBuckets - 1)]++] = x;
    }
    std::swap(from, to);
  }
  for (uint32_t i = 0, first = 0; i < n; ++i) {
    if (i > 0) {
      if (from[i].key == from[i - 1].key) {
        o.repeated.add(from[i - 1].voxel);
        o.repeated.add(from[i].voxel);
      } else {
        first = i;
      }
    }
    o.voxel[i] = from[i].voxel;
    o.rank[from[i].voxel] = first;
  }
  return o;
}

template bool make_keys<float>(const float*, const Lattice&, bool, uint32_t*);
template bool make_keys<double>(const double*, const Lattice&, bool, uint64_t*);
template Order sort_voxels<uint32_t>(const uint32_t*, const Lattice&, Slab&);
template Order sort_voxels<uint64_t>(const uint64_t*, const Lattice&, Slab&);

namespace {

PYLOSS_MULTIVERSION
void cube_ranks_of_row(const uint32_t* r, uint32_t row, uint32_t slice, uint32_t count,
                       uint32_t* out) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t a = std::max(std::max(r[i], r[i + 1]), std::max(r[i + row], r[i + row + 1]));
    const uint32_t* q = r + slice;
    const uint32_t b = std::max(std::max(q[i], q[i + 1]), std::max(q[i + row], q[i + row + 1]));
    out[i] = std::max(a, b);
  }
}

}  // namespace

void cube_ranks(const Order& o, const Lattice& l, uint32_t* ranks) {
  std::fill(ranks, ranks + l.size(), kNone);
  for (uint32_t slice = 0; slice + 1 < l.depth; ++slice) {
    for (uint32_t r = 0; r + 1 < l.rows; ++r) {
      const uint32_t begin = l.row(slice, r);
      cube_ranks_of_row(o.rank.get() + begin, l.step[1], l.step[0], l.cols - 1, ranks + begin);
    }
  }
}

}  // namespace betti_volume
}  // namespace cpu
}  // namespace pyloss
