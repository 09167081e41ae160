// Betti matching and persistence pairs of one item of up to two dimensions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/betti_item.h"
#include "cpu/slab.h"

namespace pyloss {
namespace cpu {

// R: the dtype of the images, float or double. Both throw std::invalid_argument at a NaN.
template <class R>
betti_item::ItemResult match_image(const betti::Problem& batch, int64_t item, int threads,
                                   Slab& slab);
// Only the bars of the input.
template <class R>
betti_item::ItemResult bars_of_image(const betti::Problem& batch, int64_t item, Slab& slab);

// What the slab of an item should hold.
size_t image_bytes(const betti::Problem& batch);

}  // namespace cpu
}  // namespace pyloss
