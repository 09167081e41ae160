#include "cpu/betti_local.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/compiler.h"
#include "cpu/instruction_set.h"
#if PYLOSS_HAS_TARGET_PRAGMA
#include <immintrin.h>
#endif

namespace pyloss {
namespace cpu {
namespace betti_local {
namespace {

#define PYLOSS_KERNELS "cpu/betti_local_kernels.h"
#include "cpu/per_instruction_set.h"

}  // namespace

#if PYLOSS_HAS_TARGET_PRAGMA
#define PYLOSS_DISPATCH(call)  \
  switch (instruction_set()) { \
    case InstructionSet::kV4:  \
      return v4::call;         \
    case InstructionSet::kV3:  \
      return v3::call;         \
    default:                   \
      return base::call;       \
  }
#else
#define PYLOSS_DISPATCH(call) return base::call
#endif

template <class R>
bool make_keys(const R* image, const Grid& g, bool superlevel, typename KeyOf<R>::type* keys,
               Range<typename KeyOf<R>::type>& range) {
  PYLOSS_DISPATCH(make_keys(image, g, superlevel, keys, range));
}

template <class K>
Range<K> min_keys(const K* a, const K* b, const Grid& g, K* keys) {
  PYLOSS_DISPATCH(min_keys(a, b, g, keys));
}

namespace {

template <class K>
void pair_planes(const K* keys, const Grid& g, const Range<K>* range, Planes& planes) {
  PYLOSS_DISPATCH(pair_locally(keys, g, range, planes));
}

template <class K>
void fill_square_rises(const K* keys, const Grid& g, Edges* rises) {
  PYLOSS_DISPATCH(square_rises(keys, g, rises));
}

}  // namespace

template <class K>
Planes pair_locally(const K* keys, const Grid& g, const Range<K>* range, Slab& slab) {
  Planes planes;
  const uint32_t words = g.all_words(), below = (g.rows + 1) * g.words;
  for (Walks* w : {&planes.voxels, &planes.squares}) {
    w->squares = w == &planes.squares;
    w->directions = Array<Directions>(slab, words);
    w->roots = Array<Roots>(slab, words);
  }
  planes.rest = Array<Edges>(slab, words);
  if (range) {
    planes.rises = Array<Edges>(slab, words);
    planes.lowest = Array<uint64_t>(slab, words);
    planes.highest = Array<uint64_t>(slab, words);
    for (const uint32_t row : {0u, below}) {
      std::fill_n(planes.rises.get() + row, g.words, Edges{0, 0});
      std::fill_n(planes.lowest.get() + row, g.words, 0);
      std::fill_n(planes.highest.get() + row, g.words, 0);
    }
  }
  pair_planes(keys, g, range, planes);
  return planes;
}

template <class K>
Array<Edges> square_rises(const K* keys, const Grid& g, Slab& slab) {
  Array<Edges> rises(slab, g.all_words());
  fill_square_rises(keys, g, rises.get());
  return rises;
}

namespace {

void fill_codes(const Walks& walks, const Grid& g) {
  PYLOSS_DISPATCH(fill_codes(walks, g));
}

}  // namespace

void Walks::open(const Grid& g, Slab& slab) {
  code = Array<uint8_t>(slab, g.size());
  kept = Array<uint32_t>(slab, g.size());
  fill_codes(*this, g);
}

void find_sides(const Planes& planes, const Grid& g, Item* items, uint32_t n) {
  PYLOSS_DISPATCH(find_sides(planes, g, items, n));
}

void find_roots(const Walks& walks, const Grid& g, const uint32_t* cells, uint32_t n,
                uint32_t* found) {
  PYLOSS_DISPATCH(find_roots(walks, g, cells, n, found));
}

template <class K>
uint32_t collect(const K* keys, const Grid& g, const Planes& planes, const Events* events,
                 Item* items, Sortable<K>* order) {
  PYLOSS_DISPATCH(collect(keys, g, planes, events, items, order));
}

template bool make_keys<float>(const float*, const Grid&, bool, int32_t*, Range<int32_t>&);
template bool make_keys<double>(const double*, const Grid&, bool, int64_t*, Range<int64_t>&);
#define PYLOSS_INSTANTIATE(K)                                                           \
  template Range<K> min_keys(const K*, const K*, const Grid&, K*);                      \
  template Planes pair_locally(const K*, const Grid&, const Range<K>*, Slab&);          \
  template Array<Edges> square_rises(const K*, const Grid&, Slab&);                     \
  template uint32_t collect(const K*, const Grid&, const Planes&, const Events*, Item*, \
                            Sortable<K>*);
PYLOSS_INSTANTIATE(int32_t)
PYLOSS_INSTANTIATE(int64_t)
#undef PYLOSS_INSTANTIATE
#undef PYLOSS_DISPATCH

}  // namespace betti_local
}  // namespace cpu
}  // namespace pyloss
