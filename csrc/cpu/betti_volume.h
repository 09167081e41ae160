// Betti matching and persistence pairs of one item of three dimensions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/betti_item.h"
#include "cpu/slab.h"

namespace pyloss {
namespace cpu {

// R: the dtype of the images, float or double. All throw std::invalid_argument at a NaN.
template <class R>
betti_item::ItemResult match_volume(const betti::Problem& batch, int64_t item, int threads,
                                    Slab& slab);
// Only the bars of the input.
template <class R>
betti_item::ItemResult bars_of_volume(const betti::Problem& batch, int64_t item, Slab& slab);

// Cycles that stand for the bars of dimension 1 of the one item of `volume`: rows (place in
// `squares`, edge) for each square that is the death of one. Public numbers.
template <class R>
std::vector<int64_t> loops_of_volume(const betti::Problem& volume, const int64_t* squares,
                                     int64_t count);

// What the slab of an item should hold.
size_t volume_bytes(const betti::Problem& batch);

}  // namespace cpu
}  // namespace pyloss
