// Which pairs of a query and a key are left out, positive or of the denominator: from indices, so
// that no mask is ever in memory.
//
//   own       j = first + i: left out everywhere
//   positive  j = target_i, or with kPositive equal ids
//   dropped   with kDrop, equal ids but not the target: left out
//   negative  the rest
//
// The denominator has positives and negatives, with kNegatives the latter alone.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace pyloss::similarity {

inline constexpr int kPositive = 1, kDrop = 2, kNegatives = 4;

struct Kinds {
  int64_t first;                                // below 0: no query has a key of its own
  const int64_t *target, *query_ids, *key_ids;  // null where there are none
  int flags;

  PYLOSS_HD int64_t own(int64_t i) const { return first < 0 ? -1 : first + i; }
  PYLOSS_HD int64_t target_of(int64_t i) const { return target ? target[i] : -1; }
  PYLOSS_HD bool equal(int64_t i, int64_t j) const {
    return query_ids && query_ids[i] == key_ids[j];
  }
  PYLOSS_HD bool positive(int64_t i, int64_t j) const {
    return j != own(i) && (j == target_of(i) || ((flags & kPositive) && equal(i, j)));
  }
  PYLOSS_HD bool counted(int64_t i, int64_t j) const {
    if (j == own(i)) return false;
    if (positive(i, j)) return !(flags & kNegatives);
    return !((flags & kDrop) && equal(i, j));
  }
  // Whether something is known of the pair beyond its ids: there is at most one own key and one
  // target for each query, which are looked at one by one.
  PYLOSS_HD bool special(int64_t i, int64_t j) const { return j == own(i) || j == target_of(i); }
};

}  // namespace pyloss::similarity
